"""A backlog from Kafka to history: messages and rows first, then the process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tests.bench import limits
from tests.bench.arena import HISTORY, Arena, Rows, Running
from tests.bench.bench import Bench
from tests.bench.contenders import SINKS, Sink
from tests.bench.measure import Meter, cpu_per_row, watch

PART: Final = "storing a backlog"

_LAST_ID: Final = f"select coalesce(max(id), 0) from {HISTORY}"
# Within a transaction now() stands still, so the rows of the first one are left out of count and time alike.
_RATE: Final = (
    f"select count(*) / extract(epoch from max(created_at) - first.at)::float"
    f"  from {HISTORY}, (select min(created_at) as at from {HISTORY}) as first"
    " where created_at > first.at group by first.at"
)


def measure(bench: Bench) -> None:
    """Let each sink and the limit do it once."""
    for sink in SINKS:
        if bench.takes_part(sink.name):
            rows = Rows(min(bench.sizes.rows, sink.most_rows or bench.sizes.rows))
            with bench.arena() as place:
                place.load(rows, "published")
                limits.produce(place, limits.messages(place, sink.encode))
                bench.add(PART, sink.name, figures_of(sink, place, rows))
    with bench.arena() as place:
        rows = bench.sizes.backlog
        place.load(rows, "published")
        copy, update = limits.store(place, rows.count)
        figures = {
            "rows/s": rows.count / (copy + update),
            "COPY rows/s": rows.count / copy,
            "UPDATE rows/s": rows.count / update,
        }
        bench.add(PART, limits.STORING, figures)


def figures_of(sink: Sink, place: Arena, rows: Rows, processes: int = 1) -> dict[str, float]:
    """Run a sink on a topic that is full, and return what it took."""
    running: Sequence[Running] = [sink.start(place) for _ in range(processes)]
    meter = Meter(running)
    try:
        samples = watch(meter, lambda: int(place.ask(_LAST_ID)), rows.count)
        cpu, peak = meter.cpu(), meter.peak_mb()
    finally:
        for process in running:
            process.stop()
    stored = place.ask(f"select count(distinct user_id) from {HISTORY}")
    if stored != rows.count:
        raise RuntimeError(f"{sink.name} has stored {stored} rows of {rows.count}")
    return {"rows/s": place.ask(_RATE), "CPU µs/row": cpu_per_row(samples, cpu, rows.count), "peak MB": peak}
