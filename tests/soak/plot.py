"""A plot of a run as SVG: throughput and lag over time, and beneath them the faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from tests.svg import document

_WIDTH: Final = 1_100
_LEFT: Final = 150
_RIGHT: Final = 20
_PANEL: Final = 170
_GAP: Final = 50
_STRIP: Final = 16
_STYLE: Final = (
    " .line{fill:none;stroke-width:1.2} .fault{fill:#c0392b;fill-opacity:.75} .outage{fill:#c0392b;fill-opacity:.08}"
)


class Sample(NamedTuple):
    """What was seen at a moment of the run, in seconds: messages stored a second, written a second, and the lag."""

    at: float
    stored: float
    written: float
    lag: float


class Mark(NamedTuple):
    """A fault as it happened. An `outage` is shaded through the panels as well."""

    at: float
    seconds: float
    label: str
    outage: bool


def svg(title: str, samples: Sequence[Sample], marks: Sequence[Mark]) -> str:
    """Return the plot of a run."""
    end = max([sample.at for sample in samples] + [mark.at + mark.seconds for mark in marks] + [1.0])
    labels = list(dict.fromkeys(mark.label for mark in sorted(marks, key=lambda mark: mark.label)))
    strips = 60 + 2 * (_PANEL + _GAP)
    height = strips + _STRIP * len(labels) + 40

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * at / end

    parts: list[str] = []
    for mark in marks:
        if mark.outage:
            width = max(1.0, x(mark.at + mark.seconds) - x(mark.at))
            parts.append(
                f'<rect class="outage" x="{x(mark.at):.1f}" y="50" width="{width:.1f}" height="{strips - 60}"/>'
            )
    stored = [(sample.at, sample.stored) for sample in samples]
    written = [(sample.at, sample.written) for sample in samples]
    lag = [(sample.at, sample.lag) for sample in samples]
    parts += _panel(50, "messages a second", [("written", "#bbb", written), ("stored", "#1f6fb2", stored)], x)
    parts += _panel(50 + _PANEL + _GAP, "age of the oldest waiting, s", [("lag", "#8e44ad", lag)], x)
    for place, label in enumerate(labels):
        y = strips + _STRIP * place
        count = sum(mark.label == label for mark in marks)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(label)}: {count}</text>')
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        for mark in marks:
            if mark.label == label:
                width = max(1.5, x(mark.at + mark.seconds) - x(mark.at))
                parts.append(f'<rect class="fault" x="{x(mark.at):.1f}" y="{y - 5}" width="{width:.1f}" height="10"/>')
    parts += _times(end, height - 14, x)
    return document(_WIDTH, height, title, parts, left=_LEFT, style=_STYLE)


Line = tuple[str, str, Sequence[tuple[float, float]]]


def _panel(top: float, title: str, lines: Sequence[Line], x: Callable[[float], float]) -> Iterable[str]:
    highest = max([value for _, _, points in lines for _, value in points] + [1.0])
    bottom = top + _PANEL
    yield f'<text x="{_LEFT}" y="{top - 6}">{escape(title)}</text>'
    for step in range(5):
        y = bottom - _PANEL * step / 4
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{highest * step / 4:,.0f}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{top}" y2="{bottom}"/>'
    for place, (name, colour, points) in enumerate(lines):
        path = " ".join(f"{x(at):.1f},{bottom - _PANEL * value / highest:.1f}" for at, value in points)
        yield f'<polyline class="line" stroke="{colour}" points="{path}"/>'
        yield (
            f'<text x="{_WIDTH - _RIGHT - 70 * place}" y="{top - 6}" text-anchor="end"'
            f' style="fill:{colour}">{escape(name)}</text>'
        )


def _times(end: float, y: float, x: Callable[[float], float]) -> Iterable[str]:
    step = next(seconds for seconds in (10, 30, 60, 120, 300, 600, 1_800, 86_400) if end / seconds <= 12)
    for at in range(0, int(end) + 1, step):
        label = f"{at // 60}:{at % 60:02d}"
        yield f'<text x="{x(at):.1f}" y="{y}" text-anchor="middle">{label}</text>'
