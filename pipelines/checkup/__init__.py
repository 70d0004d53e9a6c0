"""What `aai doctor` looks at: a module for each kind of surroundings, each tried in a process of its own."""
