"""From clips to what was made of them, and back."""
