"""How long a committed row takes to a Kafka consumer, and into history, at a steady rate."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

from tests.bench import bare_loop
from tests.bench.arena import HISTORY, Arena, Rows, messages_in
from tests.bench.bench import Bench
from tests.bench.contenders import OUR_READER, OUR_SINK, READERS, Start
from tests.bench.steady import latencies
from tests.services import eventually

RATES: Final = (200, 1_000)


def to_kafka(rate: int) -> str:
    """Return the name of the part that ends at a Kafka consumer."""
    return f"commit to Kafka at {rate:,}/s"


def to_history(rate: int) -> str:
    """Return the name of the part that ends in history."""
    return f"commit to history at {rate:,}/s"


def measure(bench: Bench) -> None:
    """Let each reader that keeps up do it once, and a bare loop, and then our reader and our sink together.

    A broker that has not had such a load yet is slow at it for a minute. Nobody is measured meanwhile.
    """
    with bench.arena() as place:
        figures_of(bench, place, [bare_loop.start], max(RATES), bench.sizes.warm_up_rows)
    for rate in RATES:
        for reader in READERS:
            if bench.takes_part(reader.name) and rate <= (reader.most_a_second or rate):
                warm_up = min(bench.sizes.warm_up_rows, reader.most_rows or bench.sizes.warm_up_rows)
                with bench.arena() as place:
                    figures = figures_of(bench, place, [reader.start_for_latency], rate, warm_up)
                    bench.add(to_kafka(rate), reader.name, figures)
        with bench.arena() as place:
            figures = figures_of(bench, place, [bare_loop.start], rate, bench.sizes.warm_up_rows)
            bench.add(to_kafka(rate), bare_loop.NAME, figures)
    for rate in RATES:
        with bench.arena() as place:
            both = [OUR_SINK.start, OUR_READER.start]
            figures = figures_of(bench, place, both, rate, bench.sizes.warm_up_rows, in_history=True)
            bench.add(to_history(rate), OUR_READER.name, figures)


def figures_of(
    bench: Bench, place: Arena, starts: list[Start], rate: int, warm_up_rows: int, *, in_history: bool = False
) -> dict[str, float]:
    """Let processes warm up on a small backlog, and then measure them at a steady rate."""
    admin = place.kafka.admin()
    place.load(Rows(warm_up_rows))
    stored = f"select coalesce(max(id), 0) from {HISTORY}"
    with ExitStack() as stack:
        for start in starts:
            stack.callback(start(place).stop)
        eventually(
            lambda: (place.ask(stored) if in_history else messages_in(admin, place.topic)) >= warm_up_rows,
            within=120,
            what="the end of the warm-up",
        )
        sizes = bench.sizes
        found = latencies(
            place, rate, warm_up=sizes.warm_up_seconds, seconds=sizes.steady_seconds, in_history=in_history
        )
    return {"p50 ms": found.p50, "p99 ms": found.p99, "worst ms": found.worst, "pace kept": found.kept_pace}
