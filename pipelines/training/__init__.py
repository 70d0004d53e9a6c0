"""Both trainings: Ray Train around `aai.fit`."""
