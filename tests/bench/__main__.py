"""`python -m tests.bench`: this connector, its peers and the limits on the same rows; tables, charts and bars."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import psutil

from connector.cli.signals import interrupt_on_signals
from connector.demo.embedded import scratch_directory
from tests.bench.bars import BARS
from tests.bench.bench import Bench, Sizes, configure
from tests.bench.charts import CHARTS, charts
from tests.bench.contenders import left_out
from tests.bench.parts import crash, growth, idle, latency, reading, storing
from tests.bench.report import into_page, report
from tests.bench.results import Results
from tests.services.choice import Choice
from tests.services.kafka import Kafka, kafka_candidates
from tests.services.postgres import Postgres, postgres_candidates

PARTS: Final[Mapping[str, tuple[Callable[[Bench], None], tuple[str, ...]]]] = {
    "reading": (reading.measure, (reading.PART,)),
    "storing": (storing.measure, (storing.PART,)),
    "latency": (
        latency.measure,
        tuple(to(rate) for to in (latency.to_kafka, latency.to_history) for rate in latency.RATES),
    ),
    "crash": (crash.measure, (crash.PART,)),
    "idle": (idle.measure, (idle.PART,)),
    "growth": (growth.measure, (growth.READING, growth.STORING)),
}


def main() -> int:
    """Measure, print the tables, and draw the charts; 1 if a bar is missed."""
    given = _arguments()
    path = given.output / "results.json"
    results = Results.load(path)
    parts = [] if given.report else given.parts or list(PARTS)
    if parts:
        results.left_out = dict(left_out())
        for part in parts:
            for name in PARTS[part][1]:
                results.forget(name)
        sizes = Sizes(
            rows=given.rows,
            steady_seconds=given.steady_seconds,
            warm_up_seconds=given.warm_up_seconds,
            idle_seconds=given.idle_seconds,
        )
        _measure(parts, given.runs, sizes, results, path)
    for line in report(results):
        _say(line)
    given.docs.mkdir(parents=True, exist_ok=True)
    pictures = charts(results)
    for name, picture in pictures.items():
        (given.docs / f"{name}.svg").write_text(picture, encoding="utf-8")
    page = given.docs / "bench.md"
    if page.exists():
        titles = {name: CHARTS[name].title for name in pictures}
        page.write_text(into_page(page.read_text(encoding="utf-8"), results, titles), encoding="utf-8")
    return 1 if any(bar.verdict(results).passed is False for bar in BARS) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    sizes = Sizes()
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--runs", type=int, default=3, help="how often each part is measured (3)")
    add("--rows", type=int, default=sizes.rows, help=f"of the backlog ({sizes.rows:,}); the growth follows from it")
    add("--steady-seconds", type=float, default=sizes.steady_seconds, help="of steady load (%(default)g)")
    add("--warm-up-seconds", type=float, default=sizes.warm_up_seconds, help="of load before that (%(default)g)")
    add("--idle-seconds", type=float, default=sizes.idle_seconds, help="in which nothing happens (%(default)g)")
    add("--output", type=Path, default=Path(".cache/bench"), help="folder of the numbers (%(default)s)")
    add("--docs", type=Path, default=Path("docs"), help="folder of the charts and of bench.md (docs)")
    add("--report", action="store_true", help="measure nothing: tables and charts of what was measured before")
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return given


def _measure(parts: list[str], runs: int, sizes: Sizes, results: Results, path: Path) -> None:
    with scratch_directory() as directory:
        postgres: Choice[Postgres] = Choice("PostgreSQL", postgres_candidates(os.environ), directory)
        kafka: Choice[Kafka] = Choice("Kafka", kafka_candidates(os.environ, long_lived=True), directory)
        try:
            server, broker = postgres.private(), kafka.private()
            configure(server)
            results.conditions = _conditions(server, broker, sizes)
            bench = Bench(server, broker, sizes, results, _say)
            bench.warm_up()
            for part in parts:
                for run in range(1, runs + 1):
                    began = time.monotonic()
                    _say(f"{part}, run {run} of {runs}")
                    PARTS[part][0](bench)
                    results.save(path)
                    _say(f"  took {time.monotonic() - began:.0f} s")
        finally:
            kafka.close()
            postgres.close()


def _conditions(server: Postgres, broker: Kafka, sizes: Sizes) -> dict[str, str]:
    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{psutil.cpu_count()} cores, {memory:.0f} GB, {platform.system()}",
        "services": f"PostgreSQL {server.version} ({server.kind}), Kafka ({broker.kind}), on the same machine",
        "Python": platform.python_version(),
        "backlog": f"{sizes.rows:,} rows",
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Or what it has written in a temporary folder, which is gigabytes, would outlive it.
    interrupt_on_signals()
    sys.exit(main())
