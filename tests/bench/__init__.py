"""This connector, its peers and the limits on the same rows: `python -m tests.bench --help`."""
