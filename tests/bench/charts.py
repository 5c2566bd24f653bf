"""The charts: each contender's median as a bar, with a tick for each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from tests.bench import bare_loop, limits
from tests.bench.parts import growth, idle, latency, reading, storing
from tests.bench.peers import debezium, jdbc_sink, poller
from tests.bench.results import Figure, Results
from tests.svg import document, text

_LEFT: Final = 190
_WIDTH: Final = 900
_BARS: Final = 560
_ROW: Final = 22
_PANEL: Final = 46
_TOP: Final = 36
_STYLE: Final = " .ours{fill:#1f6fb2} .limit{fill:#bbb} .peer{fill:#c98a3a} .run{stroke:#333;stroke-width:1.5}"


_PEERS: Final = frozenset({debezium.NAME, jdbc_sink.NAME, poller.NAME, idle.NOBODY})


class Panel(NamedTuple):
    """A figure of a part, drawn with a bar for each contender; one that would dwarf the others may be left out."""

    part: str
    name: str
    without: str | None = None


class Chart(NamedTuple):
    """Some figures in one picture."""

    title: str
    panels: Sequence[Panel]


CHARTS: Final[dict[str, Chart]] = {
    "bench-reading": Chart(
        "A backlog from outbox to Kafka",
        [
            Panel(reading.PART, "rows/s"),
            Panel(reading.PART, "CPU µs/row"),
            Panel(reading.PART, "peak MB"),
            Panel(reading.PART, "start to first row, s"),
        ],
    ),
    "bench-storing": Chart(
        "A backlog from Kafka to history",
        [
            Panel(storing.PART, "rows/s"),
            Panel(storing.PART, "CPU µs/row"),
            Panel(storing.PART, "peak MB"),
        ],
    ),
    "bench-latency": Chart(
        "From a transaction's commit, in milliseconds",
        [
            Panel(part, name, without=poller.NAME)
            for to in (latency.to_kafka, latency.to_history)
            for part in map(to, latency.RATES)
            for name in ("p50 ms", "p99 ms")
        ],
    ),
    "bench-idle": Chart(
        "A minute in which nothing happens",
        [Panel(idle.PART, name) for name in ("CPU %", "queries a minute", "WAL kB a minute")],
    ),
    "bench-growth": Chart(
        "Whether a row costs the same",
        [
            Panel(part, name)
            for part in (growth.READING, growth.STORING)
            for name in ("CPU µs/row", "rows/s", "peak MB")
        ],
    ),
}


def charts(results: Results) -> dict[str, str]:
    """Return the pictures by their names, those of which anything was measured."""
    drawn = {}
    for name, (title, panels) in CHARTS.items():
        there = [panel for panel in panels if panel.name in results.names(panel.part)]
        if there:
            drawn[name] = _chart(results, title, there)
    return drawn


def _chart(results: Results, title: str, panels: Sequence[Panel]) -> str:
    parts: list[str] = []
    top = _TOP
    for panel in panels:
        measured = [
            (one, results.values(Figure(panel.part, one, panel.name))) for one in results.contenders(panel.part)
        ]
        rows = [(contender, values) for contender, values in measured if values and contender != panel.without]
        if not rows:
            continue
        parts += _panel(results, panel, rows, top)
        top += _PANEL + _ROW * len(rows)
    return document(_WIDTH, top + 10, title, parts, left=_LEFT, style=_STYLE)


def _panel(results: Results, panel: Panel, rows: Sequence[tuple[str, list[float]]], top: float) -> Iterable[str]:
    everything = [value for _, values in rows for value in values]
    highest = max(everything)

    def x(value: float) -> float:
        return _LEFT + _BARS * value / highest if highest else float(_LEFT)

    yield text(_LEFT, top + 24, f"{panel.part}: {panel.name}")
    for place, (contender, values) in enumerate(rows):
        y = top + _PANEL - 14 + _ROW * place
        median = results.median(Figure(panel.part, contender, panel.name)) or 0.0
        yield text(_LEFT - 8, y + 11, contender, anchor="end")
        yield f'<rect class="{_kind(contender)}" x="{_LEFT}" y="{y}" width="{x(median) - _LEFT:.1f}" height="15"/>'
        for value in values:
            yield f'<line class="run" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y - 2}" y2="{y + 17}"/>'
        yield text(max(x(median), x(max(values))) + 6, y + 11, number(median))
    bottom = top + _PANEL - 18 + _ROW * len(rows)
    yield f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{top + _PANEL - 18}" y2="{bottom}"/>'


def _kind(contender: str) -> str:
    if contender in {limits.READING, limits.PRODUCING, limits.STORING, bare_loop.NAME}:
        return "limit"
    return "peer" if contender in _PEERS else "ours"


def number(value: float) -> str:
    """Return a figure as people read it: three digits that count."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}" if abs(value) < 1 else f"{value:.2f}"
