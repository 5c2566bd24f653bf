"""Random faults from a seed against load, and the proof afterwards: `python -m tests.soak --help`."""
