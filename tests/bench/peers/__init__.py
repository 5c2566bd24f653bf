"""What others use for the same work."""
