"""What a person sees of the demo: a live panel on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from connector.demo.watch import Snapshot
from connector.ops.rates import Rate

_WIDEST: Final = 100
_LINE_EVERY: Final = 1.0
_SPARKLINE: Final = 28
_LABEL: Final = 10


class View(Protocol):
    """Shows snapshots, one after the other."""

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Show a snapshot; `last` says that no other follows."""


class Panels:
    """A panel that stays where it is and changes."""

    def __init__(self, live: Live, route: str) -> None:
        """Draw on `live`; `route` is what the messages pass."""
        self._live = live
        self._route = route
        self._published, self._stored = Rate(kept=_SPARKLINE), Rate(kept=_SPARKLINE)

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Redraw the panel."""
        rates = (
            self._published.add(snapshot.elapsed, snapshot.published),
            self._stored.add(snapshot.elapsed, snapshot.consumed),
        )
        self._live.update(self._panel(snapshot, rates, last=last), refresh=True)

    def _panel(self, now: Snapshot, rates: tuple[float, float], *, last: bool) -> Panel:
        flow = Table.grid(padding=(0, 2, 0, 0))
        flow.add_column(width=_LABEL, style="bold")
        flow.add_column(justify="right", width=9)
        flow.add_column(justify="right", width=12)
        flow.add_column(width=_SPARKLINE, no_wrap=True)
        bar = ProgressBar(now.total, now.enqueued, width=_SPARKLINE, complete_style="cyan", finished_style="cyan")
        flow.add_row("enqueued", f"{now.enqueued:,}", Text(f"of {now.total:,}", "dim"), bar)
        flow.add_row(
            "published", f"{now.published:,}", f"{rates[0]:,.0f}/s", Text(self._published.sparkline(), "yellow")
        )
        flow.add_row("stored", f"{now.consumed:,}", f"{rates[1]:,.0f}/s", Text(self._stored.sparkline(), "green"))

        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(width=_LABEL, style="bold", no_wrap=True)
        facts.add_column(overflow="fold")
        facts.add_row(
            "backlog",
            _counts(
                [
                    (now.pending, "pending", "cyan"),
                    (now.in_kafka, "published", "yellow"),
                    (now.waiting, "waiting for a retry", "magenta"),
                    (len(now.dead), "dead", "red"),
                ]
            ),
        )
        facts.add_row("lag", f"{_size(now.lag_bytes)} of WAL · oldest unsettled message {_duration(now.oldest_age)}")
        facts.add_row(
            "end to end",
            Text.assemble(
                f"p50 {_duration(now.p50)} · p99 {_duration(now.p99)}", ("  enqueued → stored, undisturbed", "dim")
            ),
        )
        facts.add_row("retries", f"{now.retries:,} scheduled · {now.held:,} held back in order, {now.held_now:,} now")
        for dead in now.dead[:2]:
            facts.add_row(Text("dead", "bold red"), Text(str(dead)))

        title = Text.assemble(("outbox-connector demo", "bold"), (f" · {now.elapsed:.0f} s", "dim"))
        parts: list[RenderableType] = [
            Text(self._route, "dim", no_wrap=True, overflow="ellipsis"),
            Text(),
            flow,
            Text(),
            facts,
        ]
        if now.happenings and not last:
            parts.append(Text())
            for happening in now.happenings:
                line = Text.assemble((f"{happening.at:5.1f} s  ", "dim"), happening.text)
                line.no_wrap, line.overflow = True, "ellipsis"
                parts.append(line)
        # Room for the ^C that the terminal echoes: one that wraps would throw the redrawing off by a line.
        width = min(self._live.console.width - 3, _WIDEST)
        return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", padding=(0, 2), width=width)


class Lines:
    """A line a second, for a log."""

    def __init__(self) -> None:
        self._published, self._stored = Rate(), Rate()
        self._next = 0.0

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Print a line if it is time for one."""
        rates = (
            self._published.add(snapshot.elapsed, snapshot.published),
            self._stored.add(snapshot.elapsed, snapshot.consumed),
        )
        if snapshot.elapsed < self._next and not last:
            return
        self._next = snapshot.elapsed + _LINE_EVERY
        now = snapshot
        sys.stdout.write(
            f"{now.elapsed:5.1f} s  enqueued {now.enqueued}/{now.total}  published {now.published} ({rates[0]:.0f}/s)"
            f"  stored {now.consumed} ({rates[1]:.0f}/s)  pending {now.pending}  in Kafka {now.in_kafka}"
            f"  waiting {now.waiting}  retries {now.retries}  held {now.held}  dead {len(now.dead)}"
            f"  lag {_size(now.lag_bytes)}  p50 {_duration(now.p50)}  p99 {_duration(now.p99)}\n"
        )
        if last:
            sys.stdout.writelines(f"dead: {dead}\n" for dead in now.dead)
        sys.stdout.flush()


@contextmanager
def open_view(route: str) -> Iterator[View]:
    """Give the view that suits standard output; the last picture stays."""
    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        yield Lines()
        return
    with Live(console=console, auto_refresh=False) as live:
        yield Panels(live, route)


def _counts(counts: list[tuple[int, str, str]]) -> Text:
    text = Text()
    for number, name, style in counts:
        text.append(" · " if text else "")
        text.append(f"{number:,} {name}", style if number else "dim")
    return text


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"  # noqa: PLR2004 - three digits
    return f"{seconds:.1f} s"


def _size(size: int) -> str:
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1024:  # noqa: PLR2004 - as PostgreSQL counts
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GB"
