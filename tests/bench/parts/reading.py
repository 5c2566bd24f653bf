"""A backlog from outbox to Kafka: slot first, then rows, then the process."""

from __future__ import annotations

import time
from typing import Final

from tests.bench import limits
from tests.bench.arena import Arena, Rows, messages_in
from tests.bench.bench import Bench
from tests.bench.contenders import READERS, Reader
from tests.bench.measure import Meter, cpu_per_row, read_log, watch

PART: Final = "reading a backlog"


def measure(bench: Bench) -> None:
    """Let each reader and each limit do it once."""
    for reader in READERS:
        if bench.takes_part(reader.name):
            rows = Rows(min(bench.sizes.rows, reader.most_rows or bench.sizes.rows))
            with bench.arena() as place:
                place.load(rows)
                bench.add(PART, reader.name, figures_of(reader, place, rows))
    rows = bench.sizes.backlog
    if limits.recvlogical() is not None:
        with bench.arena() as place:
            place.load(rows)
            bench.add(PART, limits.READING, {"rows/s": limits.read(place, rows.count)})
    with bench.arena() as place:
        place.load(rows)
        bench.add(PART, limits.PRODUCING, {"rows/s": limits.write(place, rows.count)})


def figures_of(reader: Reader, place: Arena, rows: Rows) -> dict[str, float]:
    """Run a reader on a backlog that is there, and return what it took."""
    admin = place.kafka.admin()
    began = time.time()
    process = reader.start(place)
    meter = Meter([process])
    try:
        samples = watch(meter, lambda: messages_in(admin, place.topic), rows.count)
        reader.settle(place)
        settled = time.time()
        cpu, peak = meter.cpu(), meter.peak_mb()
    finally:
        process.stop()
    log = read_log(place, rows.count)
    if log.missing:
        raise RuntimeError(f"{reader.name} has left out {log.missing} rows")
    return {
        "rows/s": log.rate,
        "rows/s, second half": log.warm_rate,
        "rows/s, all written down": rows.count / (settled - log.times[0]),
        "CPU µs/row": cpu_per_row(samples, cpu, rows.count),
        "peak MB": peak,
        "start to first row, s": log.times[0] - began,
    }
