"""Dead letters as sinks write them."""

from __future__ import annotations

from confluent_kafka import Producer


def write_letter(
    producer: Producer, topic: str, value: bytes | None, reason: str = "not JSON", dead: str | None = None, **more: str
) -> None:
    """Write a letter whose message came from `topic` to its dead-letter topic, or to `dead`; `more` are headers."""
    told = {"dead_letter_reason": reason, "dead_letter_topic": topic, **more}
    producer.produce(dead or f"{topic}.dead", value, b"key", headers={"traceparent": "00-1", **told})
    assert producer.flush(20) == 0
