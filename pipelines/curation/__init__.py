"""What `aai curate` is made of."""
