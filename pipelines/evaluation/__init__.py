"""What `aai evaluate` paints and how it grades it."""
