"""A sweep over a stage: `space` what is tried, `sweep` Ray Tune around the stage, `standing` what came of it."""
