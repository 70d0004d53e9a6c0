"""What `aai bench` and `aai plan` measure."""
