"""How long a committed row takes to a Kafka consumer, and into history, at a steady rate."""

from __future__ import annotations

from typing import Final

from tests.bench.bench import Bench
from tests.bench.contenders import OUR_READER, OUR_SINK, READERS
from tests.bench.steady import latencies

RATES: Final = (200, 1_000)


def to_kafka(rate: int) -> str:
    """Return the name of the part that ends at a Kafka consumer."""
    return f"commit to Kafka at {rate}/s"


def to_history(rate: int) -> str:
    """Return the name of the part that ends in history."""
    return f"commit to history at {rate}/s"


def measure(bench: Bench) -> None:
    """Let each reader that keeps up do it once, and then our reader and our sink together."""
    seconds, warm_up = bench.sizes.steady_seconds, bench.sizes.warm_up_seconds
    for rate in RATES:
        for reader in READERS:
            if bench.takes_part(reader.name) and rate <= (reader.most_a_second or rate):
                with bench.arena() as place:
                    process = reader.start_for_latency(place)
                    try:
                        found = latencies(place, rate, warm_up=warm_up, seconds=seconds, in_history=False)
                    finally:
                        process.stop()
                    bench.add(to_kafka(rate), reader.name, found.figures())
    for rate in RATES:
        with bench.arena() as place:
            both = [OUR_SINK.start(place), OUR_READER.start(place)]
            try:
                found = latencies(place, rate, warm_up=warm_up, seconds=seconds, in_history=True)
            finally:
                for process in both:
                    process.stop()
            bench.add(to_history(rate), OUR_READER.name, found.figures())
