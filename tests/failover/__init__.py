"""The loss of the database's primary, and the promotion of its standby."""
