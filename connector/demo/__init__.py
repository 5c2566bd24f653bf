"""The whole pipeline on one machine, without Docker: for a first look, and for the tests."""
