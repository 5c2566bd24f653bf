"""The bytes of the replication stream."""
