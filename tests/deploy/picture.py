"""Draws the dashboard's panels as one SVG, from what Prometheus answered to their own queries.

It shows what the panels say, not how Grafana paints them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from tests.deploy.dashboard import Panel
from tests.deploy.prometheus import Series

_COLUMN, _LINE, _GAP = 50, 27, 6
_COLORS = ("#2f6fb5", "#d9822b", "#3d9a50", "#b8405e", "#7a5bb0", "#6b7785")
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#3b4450}.title{font-weight:600;font-size:12px;fill:#1c232b}"
    ".big{font-weight:600;font-size:22px;fill:#1c232b}.small{font-size:10px;fill:#6b7785}"
    ".row{font-weight:600;font-size:15px;fill:#1c232b}.card{fill:#fff;stroke:#d5dae0}.grid{stroke:#e8ebee}"
)

Answer = Sequence[tuple[str, Series]]
"""The series of one panel, each with its legend."""


def draw(answers: Sequence[tuple[Panel, Answer]], start: float, end: float) -> str:
    """Return the panels as an SVG, in their places in the grid, over a span of time in seconds since 1970."""
    depth = max(panel.place[1] + panel.place[3] for panel, _ in answers)
    width, height = 24 * _COLUMN + _GAP, depth * _LINE + _GAP
    body = "\n".join(line for panel, answer in answers for line in _panel(panel, answer, start, end))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>The dashboard's panels over a run with faults</title>\n<style>{_STYLE}</style>\n"
        f'<rect width="{width}" height="{height}" fill="#f4f6f8"/>\n{body}\n</svg>\n'
    )


def _panel(panel: Panel, answer: Answer, start: float, end: float) -> Iterator[str]:
    x, y, w, h = panel.place
    left, top = x * _COLUMN + _GAP, y * _LINE + _GAP
    width, height = w * _COLUMN - _GAP, h * _LINE - _GAP
    if panel.kind == "row":
        yield f'<text class="row" x="{left + 2}" y="{top + 15}">{escape(panel.title)}</text>'
        return
    yield f'<g transform="translate({left},{top})"><rect class="card" width="{width}" height="{height}" rx="3"/>'
    yield f'<text class="title" x="8" y="17">{escape(panel.title)}</text>'
    if panel.kind == "timeseries":
        yield from _lines(panel, answer, (start, end), width, height)
    elif panel.kind == "state-timeline":
        yield from _bands(answer, (start, end), width, height)
    elif panel.kind == "stat":
        shown = [_stat(panel, legend, series) for legend, series in answer if series.points[-1][0] >= end - 1]
        yield f'<text class="big" x="8" y="{height / 2 + 16:.0f}">{escape(", ".join(shown) or "no data")}</text>'
    else:
        rows = sorted({legend for legend, _ in answer})
        deep = (height - 26) // 15
        for index, row in enumerate(rows):
            yield f'<text x="{8 + 200 * (index // deep)}" y="{36 + 15 * (index % deep)}">{escape(row)}</text>'
    yield "</g>"


def _stat(panel: Panel, legend: str, series: Series) -> str:
    value = series.points[-1][1]
    return legend or panel.words.get(f"{value:g}") or number(value, panel.unit)


def _lines(panel: Panel, answer: Answer, span: tuple[float, float], width: int, height: int) -> Iterator[str]:
    left, right, top, bottom = 64, width - 10, 30, height - 36
    most = max((v for _, series in answer for _, v in series.points if math.isfinite(v)), default=0.0)
    ceiling = _round_up(most, panel.unit)
    for tick in range(5):
        y = bottom - (bottom - top) * tick / 4
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        label = number(ceiling * tick / 4, panel.unit)
        yield f'<text class="small" x="{left - 5}" y="{y + 3:.1f}" text-anchor="end">{label}</text>'
    legend_at = 8.0
    eventful = [(legend, series) for legend, series in answer if any(value for _, value in series.points)]
    for index, (legend, series) in enumerate(eventful or answer[:1]):
        color = _COLORS[index % len(_COLORS)]
        for stretch in _stretches(series.points):
            points = " ".join(
                f"{left + (right - left) * (at - span[0]) / (span[1] - span[0]):.1f},"
                f"{bottom - (bottom - top) * value / ceiling:.1f}"
                for at, value in stretch
            )
            yield f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>'
        yield f'<rect x="{legend_at:.0f}" y="{height - 20}" width="9" height="9" fill="{color}"/>'
        yield f'<text class="small" x="{legend_at + 12:.0f}" y="{height - 12}">{escape(legend)}</text>'
        legend_at += 24 + 5.6 * len(legend)


def _bands(answer: Answer, span: tuple[float, float], width: int, height: int) -> Iterator[str]:
    left, right = 110, width - 10
    each = (height - 40) / max(1, len(answer))
    for index, (legend, series) in enumerate(answer):
        y = 28 + each * index
        yield f'<text class="small" x="{left - 6}" y="{y + each / 2 + 3:.1f}" text-anchor="end">{escape(legend)}</text>'
        yield f'<rect x="{left}" y="{y:.1f}" width="{right - left}" height="{each - 4:.1f}" fill="#eef1f4"/>'
        for first, last in _times_at_one(series.points):
            x = left + (right - left) * (first - span[0]) / (span[1] - span[0])
            wide = max(1.0, (right - left) * (last - first) / (span[1] - span[0]))
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{each - 4:.1f}" fill="{_COLORS[2]}"/>'


def _stretches(points: Iterable[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Split points where one is missing or is no number."""
    stretch: list[tuple[float, float]] = []
    for at, value in points:
        if stretch and (not math.isfinite(value) or at - stretch[-1][0] > 1.0):
            yield stretch
            stretch = []
        if math.isfinite(value):
            stretch.append((at, value))
    if stretch:
        yield stretch


def _times_at_one(points: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    for stretch in _stretches((at, value if value == 1 else math.nan) for at, value in points):
        yield stretch[0][0], stretch[-1][0]


def _round_up(value: float, unit: str) -> float:
    if value <= 0:
        return 1.0
    if unit == "bytes":
        return 2.0 ** math.ceil(math.log2(value))
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)


def number(value: float, unit: str) -> str:
    """Return a value as people read it, in its unit."""
    if unit == "bytes":
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    if unit == "s" and 0 < value < 1:
        return f"{value * 1000:.3g} ms"
    if unit == "s":
        return f"{value:.3g} s" if value < 600 else f"{value / 60:.0f} min"
    return _scaled(value, 1000, ("", " K", " M")) + ("/s" if unit == "ops" else "")


def _scaled(value: float, base: int, names: Sequence[str]) -> str:
    step = 0
    while abs(value) >= base and step < len(names) - 1:
        value, step = value / base, step + 1
    space = " " if names[step].strip() and not names[step].startswith(" ") else ""
    return f"{value:.3g}{space}{names[step]}"
