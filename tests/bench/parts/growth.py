"""Whether a row costs the same in a large outbox, in a long backlog, with any payload, in any transaction."""

from __future__ import annotations

from typing import Final

from tests.bench.arena import Rows
from tests.bench.bench import Bench, Sizes
from tests.bench.contenders import OUR_READER, OUR_SINK
from tests.bench.parts import reading, storing

READING: Final = "growth, reading"
STORING: Final = "growth, storing"
_SMALLEST, _LARGEST = 10, 10_000
_LOADED_AT_ONCE: Final = 10_000
SINKS: Final = 3


def cases(sizes: Sizes) -> dict[str, Rows]:
    """Return the backlogs, by what is different in each."""
    count = sizes.rows
    return {
        "as ever": sizes.backlog,
        "a large outbox": Rows(count, already=sizes.already),
        "a long backlog": Rows(sizes.large),
        "payloads of 10 bytes": Rows(count, bytes=_SMALLEST),
        "payloads of 10 kB": Rows(sizes.few, bytes=_LARGEST),
        **{f"{size:,} a transaction": Rows(count, a_transaction=size) for size in (1, 10, 1_000, 10_000)},
    }


def measure(bench: Bench) -> None:
    """Read each backlog once with our reader, and store with our sink what that has published."""
    for name, rows in cases(bench.sizes).items():
        for sinks in (1, SINKS) if name == "as ever" else (1,):
            already = Rows(rows.already, a_transaction=_LOADED_AT_ONCE) if rows.already else None
            with bench.arena(already=already) as place:
                place.load(rows)
                if sinks == 1:
                    bench.add(READING, name, reading.figures_of(OUR_READER, place, rows))
                else:
                    reading.figures_of(OUR_READER, place, rows)
                label = name if sinks == 1 else f"{sinks} sinks"
                bench.add(STORING, label, storing.figures_of(OUR_SINK, place, rows, processes=sinks))
