"""Random interleavings held to a model."""
