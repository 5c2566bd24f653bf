"""What an operator runs: setup, doctor, status."""
