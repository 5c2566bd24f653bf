"""Pure rooms, alone."""
