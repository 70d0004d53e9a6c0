"""The frozen foundation: which models, their loaders, and the features of the CLIP."""
