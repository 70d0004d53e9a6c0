"""What `aai data` does with tables."""
