"""The replication stream as values: bytes in, dataclasses out, without a socket or a clock."""
