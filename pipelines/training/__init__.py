"""Trained stages: `recipe` is what a stage is, `stage` the way it runs, `ray_train` Ray Train around `aai.fit`."""
