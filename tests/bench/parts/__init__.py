"""The parts of the bench, a module each, with one function that runs it once."""
