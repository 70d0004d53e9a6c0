"""Where a run stands, as its folder tells it."""
