"""The tables, as Markdown, which people read in a terminal too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from tests.bench.bars import BARS
from tests.bench.charts import number
from tests.bench.results import Figure, Results

_BEGIN: Final = "<!-- measured -->\n"
_END: Final = "<!-- /measured -->\n"


def into_page(page: str, results: Results, pictures: Mapping[str, str]) -> str:
    """Return a page of the documentation with what was measured in the place of what is between its two marks."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    shown = "".join(f"\n![{title}]({name}.svg)\n" for name, title in pictures.items())
    measured = "\n".join(report(results))
    return f"{before}{_BEGIN}{measured}\n{shown}{_END}{after}"


def report(results: Results) -> Iterator[str]:
    """Yield the lines of everything: what was measured under which conditions, part by part, and then the bars."""
    for what, value in results.conditions.items():
        yield f"- {what}: {value}"
    for contender, reason in results.left_out.items():
        yield f"- left out: {contender}: {reason}"
    for part in results.parts:
        yield ""
        yield f"### {part[0].upper()}{part[1:]}"
        yield ""
        yield from _table(results, part)
    yield ""
    yield "### Bars"
    yield ""
    yield from bars(results)


def _table(results: Results, part: str) -> Iterator[str]:
    names = results.names(part)
    rows = [["", *names]]
    for contender in results.contenders(part):
        medians = [results.median(Figure(part, contender, name)) for name in names]
        rows.append([contender, *("" if value is None else number(value) for value in medians)])
    yield from _markdown(rows)
    yield ""
    yield f"Medians of {results.runs(part)} runs." if results.runs(part) > 1 else "One run."


def bars(results: Results) -> Iterator[str]:
    """Yield the table of bars with what came out."""
    rows = [["figure", "measured", "bar", "verdict"]]
    for bar in BARS:
        verdict = bar.verdict(results)
        measured = "" if verdict.measured is None else number(verdict.measured)
        sense = "at least" if bar.at_least else "at most"
        rows.append([bar.what, measured, f"{sense} {number(bar.bar)} {bar.unit}", verdict.word])
    yield from _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for line, row in enumerate(rows):
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |"
        if line == 0:
            yield f"| {' | '.join('-' * (width - 1) + (':' if place else '-') for place, width in enumerate(widths))} |"
