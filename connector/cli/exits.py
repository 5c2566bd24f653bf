"""Exit codes, as the README tells them."""

DONE, FAILED, USAGE, UNAVAILABLE, CONFIGURATION = 0, 1, 2, 69, 78
