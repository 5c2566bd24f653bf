"""Whether a row costs the same in a large outbox, in a long backlog, with any payload, in any transaction."""

from __future__ import annotations

from typing import Final

from tests.bench.arena import Rows
from tests.bench.bench import Bench, Sizes
from tests.bench.contenders import OUR_READER, OUR_SINK
from tests.bench.parts import reading, storing

READING: Final = "growth, reading"
STORING: Final = "growth, storing"
_LOADED_AT_ONCE: Final = 10_000
SINKS: Final = 3


USUAL: Final = "as ever"
_OUTBOX: Final = "a large outbox"
_BACKLOG: Final = "a long backlog"
_SMALL: Final = "payloads of 10 bytes"
_BIG: Final = "payloads of 10 kB"
_TRANSACTIONS: Final = {f"{size:,} a transaction": size for size in (1, 10, 1_000, 10_000)}
_SINKS: Final = f"{SINKS} sinks"

DIMENSIONS: Final = {
    "outbox and backlog": (USUAL, _OUTBOX, _BACKLOG),
    "payloads": (USUAL, _SMALL, _BIG),
    "transactions": (USUAL, *_TRANSACTIONS),
    "sinks": (USUAL, _SINKS),
}
"""What grows, each with the cases that are compared."""


def cases(sizes: Sizes) -> dict[str, Rows]:
    """Return the backlogs, by what is different in each."""
    count = sizes.rows
    return {
        USUAL: sizes.backlog,
        _OUTBOX: Rows(count, already=sizes.already),
        _BACKLOG: Rows(sizes.large),
        _SMALL: Rows(count, bytes=10),
        _BIG: Rows(sizes.few, bytes=10_000),
        **{label: Rows(count, a_transaction=size) for label, size in _TRANSACTIONS.items()},
    }


def measure(bench: Bench) -> None:
    """Read each backlog once with our reader, and store with our sink what that has published."""
    for name, rows in cases(bench.sizes).items():
        for sinks in (1, SINKS) if name == USUAL else (1,):
            already = Rows(rows.already, a_transaction=_LOADED_AT_ONCE) if rows.already else None
            with bench.arena(already=already) as place:
                place.load(rows)
                if sinks == 1:
                    bench.add(READING, name, reading.figures_of(OUR_READER, place, rows))
                else:
                    reading.figures_of(OUR_READER, place, rows)
                label = name if sinks == 1 else _SINKS
                bench.add(STORING, label, storing.figures_of(OUR_SINK, place, rows, processes=sinks))
