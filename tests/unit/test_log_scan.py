"""A scan of Kafka's logs connects only where there is something to read."""

from __future__ import annotations

from connector.kafka import Kafka, LogScan


def test_no_consumer_is_made_where_there_is_nothing_to_read() -> None:
    """Nor is any closed: librdkafka may crash where one is that has read nothing."""
    scan = LogScan(Kafka("127.0.0.1:1", {}), "group")
    assert list(scan.read({})) == []
    assert list(scan.read({("topic", 0): (7, 7)})) == []
    assert scan._consumer is None
    scan.close()
