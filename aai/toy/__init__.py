"""The toy world: a procedural audio-visual world and the small foundation models trained on it."""
