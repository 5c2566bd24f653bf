"""The commands as real processes, end to end."""
