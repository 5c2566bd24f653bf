"""Carries a PostgreSQL outbox to Kafka and from there into chat history, without losing, doubling or reordering.

An application needs `Outbox` or `AsyncOutbox` from here; everything else is run by the command `outbox-connector`.
"""

from connector.enqueue import AsyncOutbox, Outbox

__all__ = ["AsyncOutbox", "Outbox"]
