"""What generate, edit and stylize share."""
