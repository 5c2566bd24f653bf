"""The bars: what the connector must reach, as ratios to peers and limits of the same runs, and as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from tests.bench import limits, ours
from tests.bench.parts import crash, growth, idle, latency, reading, storing
from tests.bench.peers import debezium, jdbc_sink
from tests.bench.results import Figure, Results

Measured = Callable[[Results], float | None]


class Bar(NamedTuple):
    """A bar: what is measured, the least or the most that it may be, and in which words."""

    what: str
    measured: Measured
    bar: float
    at_least: bool
    unit: str = "times"

    def verdict(self, results: Results) -> Verdict:
        """Return how the medians stand to it."""
        measured = self.measured(results)
        if measured is None:
            return Verdict(self, None, passed=None)
        return Verdict(self, measured, passed=measured >= self.bar if self.at_least else measured <= self.bar)


class Verdict(NamedTuple):
    """What came out; nothing where it was not measured."""

    bar: Bar
    measured: float | None
    passed: bool | None

    @property
    def word(self) -> str:
        """The verdict in a word or two."""
        return "not measured" if self.passed is None else "pass" if self.passed else "FAIL"


def median(part: str, contender: str, name: str) -> Measured:
    """Measure a figure by its median."""
    return lambda results: results.median(Figure(part, contender, name))


def ratio(of: Measured, to: Measured) -> Measured:
    """Measure by how much one figure exceeds another."""

    def measured(results: Results) -> float | None:
        above, below = of(results), to(results)
        return above / below if above is not None and below else None

    return measured


def spread(part: str, name: str, contenders: Sequence[str]) -> Measured:
    """Measure how far a figure's medians lie apart: the largest as a multiple of the smallest; none may be missing."""

    def measured(results: Results) -> float | None:
        medians = [m for one in contenders if (m := results.median(Figure(part, one, name))) is not None]
        return max(medians) / min(medians) if len(medians) == len(contenders) else None

    return measured


def largest(part: str, contender: str, name: str) -> Measured:
    """Measure a figure by the worst of its runs, for what must never be."""
    return lambda results: max(results.values(Figure(part, contender, name)), default=None)


_OURS: Final = ours.NAME
_RATE: Final = "rows/s"
_CPU: Final = "CPU µs/row"
_PEAK: Final = "peak MB"
_FIRST: Final = "start to first row, s"
_READ: Final = median(reading.PART, _OURS, _RATE)
_STORED: Final = median(storing.PART, _OURS, _RATE)


def _least(what: str, measured: Measured, bar: float, unit: str = "times") -> Bar:
    return Bar(what, measured, bar, at_least=True, unit=unit)


def _most(what: str, measured: Measured, bar: float, unit: str = "times") -> Bar:
    return Bar(what, measured, bar, at_least=False, unit=unit)


def _to_debezium(part: str, name: str) -> Measured:
    return ratio(median(part, _OURS, name), median(part, debezium.NAME, name))


def _latency_bars(rate: int) -> list[Bar]:
    part = latency.to_kafka(rate)
    return [
        _most(f"commit to Kafka at {rate:,}/s: p50 to Debezium's", _to_debezium(part, "p50 ms"), 1 / 2),
        _most(f"commit to Kafka at {rate:,}/s: p99 to Debezium's", _to_debezium(part, "p99 ms"), 1 / 3),
    ]


def _idle_bars(process: str, contender: str) -> list[Bar]:
    queries = median(idle.PART, contender, "queries a minute")
    return [
        _most(f"{process}, idle: CPU", median(idle.PART, contender, "CPU %"), 0.3, "% of a core"),
        _most(f"{process}, idle: queries", queries, 0, "a minute"),
    ]


def _growth_bars(part: str) -> list[Bar]:
    return [
        _most(f"{part}: {what} over {dimension}", spread(part, name, contenders), 1.2)
        for dimension, contenders in growth.DIMENSIONS.items()
        for what, name in (("CPU a row", _CPU), ("peak memory", _PEAK))
        # Sinks have no part in reading.
        if (part, dimension) != (growth.READING, "sinks")
    ]


_WARM: Final = median(reading.PART, debezium.NAME, "rows/s, second half")
_DEBEZIUM_PEAK: Final = median(reading.PART, debezium.NAME, _PEAK)
_SINK_PEAK: Final = median(storing.PART, _OURS, _PEAK)
_IN_HISTORY: Final = latency.to_history(1_000)

BARS: Final[Sequence[Bar]] = (
    _least("reader, backlog: rate to Debezium's, first to last", _to_debezium(reading.PART, _RATE), 3.0),
    _least("reader, backlog: rate to Debezium's when warm", ratio(_READ, _WARM), 2.2),
    _least("reader, backlog: rate to pg_recvlogical's", ratio(_READ, median(reading.PART, limits.READING, _RATE)), 0.6),
    _most("reader: CPU a row to Debezium's", _to_debezium(reading.PART, _CPU), 1 / 5),
    _most("reader: peak memory to Debezium's", _to_debezium(reading.PART, _PEAK), 1 / 8),
    _most("reader: peak memory", median(reading.PART, _OURS, _PEAK), 110, "MB"),
    _most("sink: peak memory to Debezium's", ratio(_SINK_PEAK, _DEBEZIUM_PEAK), 1 / 8),
    _most("sink: peak memory", _SINK_PEAK, 110, "MB"),
    _most("reader: start to first row, to Debezium's", _to_debezium(reading.PART, _FIRST), 1 / 7),
    *_latency_bars(200),
    *_latency_bars(1_000),
    _most("SIGKILL: missing on Kafka", largest(crash.PART, _OURS, "missing on Kafka"), 0, "rows"),
    _most("SIGKILL: doubled on Kafka", largest(crash.PART, _OURS, "doubled on Kafka"), 2_000, "rows"),
    _most("SIGKILL: missing in history", largest(crash.PART, _OURS, "missing in history"), 0, "rows"),
    _most("SIGKILL: doubled in history", largest(crash.PART, _OURS, "doubled in history"), 0, "rows"),
    _least(
        "sink, backlog: rate to the storing limit", ratio(_STORED, median(storing.PART, limits.STORING, _RATE)), 0.6
    ),
    _least("sink, backlog: rate to the JDBC sink's", ratio(_STORED, median(storing.PART, jdbc_sink.NAME, _RATE)), 0.9),
    _most("commit to history at 1,000/s: p50", median(_IN_HISTORY, _OURS, "p50 ms"), 8, "ms"),
    _most("commit to history at 1,000/s: p99", median(_IN_HISTORY, _OURS, "p99 ms"), 30, "ms"),
    *_idle_bars("reader", _OURS),
    *_idle_bars("sink", f"{_OURS}, sink"),
    *_growth_bars(growth.READING),
    *_growth_bars(growth.STORING),
)
