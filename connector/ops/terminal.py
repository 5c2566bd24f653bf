"""`status --watch`: the pipeline as a line from the outbox to history, drawn over itself in a terminal."""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, NoReturn, TextIO

from connector.ops.findings import size
from connector.ops.flow import LATENCY_SECONDS, Flow, Look
from connector.ops.status import as_lines, counted, oldest
from connector.store.gauges import WAITING_BOUND

# ECMA-48 control sequences.
_HOME: Final = "\x1b[H"
_REST_OF_LINE: Final = "\x1b[K"
_REST_OF_SCREEN: Final = "\x1b[J"
_BOLD, _DIM, _RED, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m"

_STAGE_WIDTH: Final = 16
_LABEL: Final = 11
# Six stages side by side, each wide enough for what it says.
_LINE_WIDTH: Final = 6 * _STAGE_WIDTH - 2
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


Segments = Sequence[tuple[str, str]]
"""The parts of a line, each with its style."""


class _Stage(NamedTuple):
    """One station of the pipeline; `alarm` where nobody works there."""

    name: str
    facts: Sequence[str]
    alarm: bool = False


def watch(
    look: Callable[[], Look], text_of: Callable[[Look], str], out: TextIO, interval: float, *, drawn: bool
) -> NoReturn:
    """Show a look every so many seconds until interrupted; one that is `drawn` takes the place of the last."""
    while True:
        began = time.monotonic()
        text = text_of(look())
        if drawn:
            # Only what is left of the last look is cleared, so that nothing flickers.
            text = _HOME + text.replace("\n", f"{_REST_OF_LINE}\n") + f"{_REST_OF_LINE}\n{_REST_OF_SCREEN}"
        out.write(text if drawn else text + "\n")
        out.flush()
        time.sleep(max(0.0, interval - (time.monotonic() - began)))


def can_be_drawn_on(out: TextIO) -> bool:
    """Tell whether this is a terminal that can be drawn over."""
    return out.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def as_picture(look: Look, flow: Flow, interval: float) -> str:
    """Return a look as it fills this terminal, with the rates so far as bars."""
    width, height = shutil.get_terminal_size()
    colour = not os.environ.get("NO_COLOR")
    at = time.strftime("%H:%M:%S", time.localtime(look.at))
    title = f"outbox-connector status · {at} · every {interval:g} s · Ctrl-C ends it"
    bars = {
        "enqueued": flow.enqueued.sparkline(),
        "published": flow.published.sparkline(),
        "stored": flow.stored.sparkline(),
    }
    lines: list[Segments] = [[(title, _BOLD)], [], *_line(look, width), [], *_facts(look, bars)]
    return "\n".join(_drawn(segments, width, colour=colour) for segments in lines[: max(1, height - 1)])


def as_text(look: Look) -> str:
    """Return a look as plain lines, with an empty one behind them."""
    rates = f"enqueued {_rate(look.enqueued)}   published {_rate(look.published)}   stored {_rate(look.stored)}"
    facts = [("rates", rates), ("end to end", _latency(look)), ("retries", _retries(look)), *_deaths(look)]
    lines = [*as_lines(look.snapshot), *(f"{name:<15} {fact}" for name, fact in facts)]
    return "\n".join(map(_printable, lines)) + "\n"


def _stages(look: Look) -> Iterator[_Stage]:
    slot, consumer, rows = look.snapshot.slot, look.snapshot.consumer, look.snapshot.outbox
    waiting = "unknown" if rows is None else f"{rows['pending']:,} pending"
    yield _Stage("outbox", [_rate(look.enqueued), waiting])
    if slot is None:
        yield _Stage("WAL", ["unknown"])
        yield _Stage("reader", ["unknown"])
    elif not slot.exists:
        yield _Stage("WAL", ["NO SLOT"], alarm=True)
        yield _Stage("reader", ["makes one"])
    else:
        yield _Stage("WAL", [f"lag {_bytes(slot.lag_bytes)}", f"pins {_bytes(slot.retained_bytes)}"])
        reads = "catches up" if slot.catch_up_owed else "reads the slot"
        yield _Stage("reader", [reads if slot.active else "NO READER"], alarm=not slot.active)
    if consumer.lag is None:
        yield _Stage("Kafka", ["unknown"])
        yield _Stage("sink", ["unknown"])
    else:
        yield _Stage("Kafka", [_rate(look.published), f"{consumer.lag:,} to read"])
        members = f"{consumer.members} running" if consumer.members else "NO SINK"
        yield _Stage("sink", [members, consumer.state or ""], alarm=not consumer.members)
    yield _Stage("history", [_rate(look.stored), _p99(look)])


def _line(look: Look, width: int) -> Iterator[Segments]:
    """Draw the stages side by side, or below each other where the terminal is narrow."""
    stages = list(_stages(look))
    if width < _LINE_WIDTH:
        for number, stage in enumerate(stages):
            text = f"{'' if number == 0 else '↓':<2}{stage.name:<9}{'   '.join(filter(None, stage.facts))}"
            yield [(text, _RED if stage.alarm else "")]
        return
    heads = [
        f"{stage.name} {'─' * (_STAGE_WIDTH - len(stage.name) - 4)}▶ " if stage is not stages[-1] else stage.name
        for stage in stages
    ]
    yield [("".join(heads), _BOLD)]
    for row in range(max(len(stage.facts) for stage in stages)):
        yield [
            (f"{clip(fact, _STAGE_WIDTH - 1):<{_STAGE_WIDTH}}", _RED if stage.alarm else "")
            for stage in stages
            for fact in [stage.facts[row] if row < len(stage.facts) else ""]
        ]


def _facts(look: Look, bars: dict[str, str]) -> Iterator[Segments]:
    for name, rate in (("enqueued", look.enqueued), ("published", look.published), ("stored", look.stored)):
        yield _fact(name, f"{_rate(rate):>9}  {bars[name]}")
    yield []
    yield _fact("backlog", counted(look.snapshot))
    yield _fact("oldest", oldest(look.snapshot))
    yield _fact("end to end", _latency(look))
    yield _fact("retries", _retries(look))
    slot = look.snapshot.slot
    if slot is not None and slot.catch_up_owed:
        yield _fact("catch-up", f"owed: {slot.catch_up_reason}", _RED)
    for problem in look.problems:
        yield _fact("problem", problem, _RED)
    for name, fact in _deaths(look):
        yield _fact(name, fact)


def _fact(name: str, fact: str, style: str = "") -> Segments:
    return [(f"{name:<{_LABEL}}", style or _DIM), (fact, style)]


def _deaths(look: Look) -> Iterator[tuple[str, str]]:
    for death in look.deaths:
        attempts = f"{death.retry_count + 1} attempts" if death.retry_count else "1 attempt"
        yield "dead", f"{ago(death.age)} #{death.outbox_id} {death.biz_type} key {death.key}, {attempts}: {death.error}"


def _rate(rate: float | None) -> str:
    if rate is None:
        return "unknown"
    return f"{rate:,.0f}/s" if rate >= 10 or rate == 0 else f"{rate:.1f}/s"  # noqa: PLR2004 - two digits are enough


def _p99(look: Look) -> str:
    return f"p99 {duration(look.latency.p99)}" if look.latency else ""


def _latency(look: Look) -> str:
    if look.latency is None:
        return "unknown" if look.snapshot.outbox is None else f"nothing stored in the last {LATENCY_SECONDS:.0f} s"
    return f"p50 {duration(look.latency.p50)}   p99 {duration(look.latency.p99)}   enqueued to stored"


def _retries(look: Look) -> str:
    retries = look.retries
    if retries is None:
        return "unknown"
    if not retries.waiting:
        return "nothing waits for one"
    more = " or more" if retries.waiting >= WAITING_BOUND else ""
    following = "" if retries.next_in is None else f", the next in {duration(retries.next_in)}"
    return f"{retries.waiting:,}{more} wait, {retries.due:,} of them due now{following}"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else size(count)


def duration(seconds: float) -> str:
    """Write a time as people say it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < _DAY else f"{seconds / _DAY:.1f} days"


def ago(seconds: float | None) -> str:
    """Write how long ago something was."""
    return "at some time" if seconds is None else f"{duration(max(0.0, seconds))} ago"


def _printable(text: str) -> str:
    """Show what others have written without letting it steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\n", " "))


def clip(text: str, width: int) -> str:
    """Cut a text to so many columns of a terminal, and show nothing that would steer it."""
    taken: list[str] = []
    columns = 0
    for character in _printable(text):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else not unicodedata.combining(character)
        if columns > width:
            return "".join(taken[:-1]) + "…" if taken else ""
        taken.append(character)
    return "".join(taken)


def _drawn(segments: Segments, width: int, *, colour: bool) -> str:
    drawn = []
    for text, style in segments:
        shown = clip(text, width)
        width -= len(shown)
        drawn.append(f"{style}{shown}{_PLAIN}" if colour and style and shown else shown)
    return "".join(drawn).rstrip()
