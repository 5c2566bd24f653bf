"""`status --watch` draws any pipeline into any terminal, whatever others have written into their rows."""

from __future__ import annotations

import re

import pytest

from connector.kafka import Kafka
from connector.ops.flow import Flow, Look
from connector.ops.rates import Rate
from connector.ops.status import ConsumerStatus, SlotStatus, Snapshot, StatusOptions
from connector.ops.terminal import as_picture, as_text, clip
from connector.outbox import Table
from connector.store.gauges import Death, Latency, Retries
from connector.store.queries import Tables

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\nnew line \N{RIGHT-TO-LEFT OVERRIDE}漢字"
COUNTS = {"pending": 3, "published": 1, "consumed": 40, "dead": 1}


def a_slot(*, active: bool = True, exists: bool = True, owed: bool = False) -> SlotStatus:
    """Return a slot that is a little behind."""
    return SlotStatus("slot", exists, active, 7, "reserved", 2048, 4096, None, owed, "it was dropped" if owed else None)


def a_look(
    slot: SlotStatus | None = None, members: int | None = 2, *, error: str = "refused", problems: tuple[str, ...] = ()
) -> Look:
    """Return a look at a pipeline that runs."""
    lag = None if members is None else 5
    consumer = ConsumerStatus("group", None if lag is None else "stable", members, lag, [])
    return Look(
        at=0.0,
        snapshot=Snapshot(
            COUNTS,
            outbox_estimated=(),
            oldest_unconsumed_age_seconds=1.5,
            slot=slot or a_slot(),
            consumer=consumer,
            problems=problems,
        ),
        enqueued=120.0,
        published=3.25,
        stored=0.0,
        retries=Retries(4, 1, 2.5),
        latency=Latency(10, 0.012, 1.25),
        deaths=(Death(4711, "biz", "key", 2, error, 61.0),),
    )


@pytest.fixture
def flow() -> Flow:
    """A flow that has not looked yet."""
    tables = Tables(Table("public", "outbox"), Table("public", "history"))
    return Flow(StatusOptions("", Kafka("127.0.0.1:1", {}), tables, "slot", ("topic",), "group"))


def picture(look: Look, flow: Flow, monkeypatch: pytest.MonkeyPatch, columns: int = 110, rows: int = 40) -> list[str]:
    """Return the lines of a picture without colours."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(rows))
    return re.sub(r"\x1b\[\d+m", "", as_picture(look, flow, 2)).split("\n")


def test_a_wide_terminal_shows_the_pipeline_as_one_line(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages stand side by side in the order in which a message passes them, with what each has to do below."""
    lines = picture(a_look(), flow, monkeypatch)
    (stages,) = [line for line in lines if "▶" in line]
    assert re.findall(r"\w+", stages) == ["outbox", "WAL", "reader", "Kafka", "sink", "history"]
    below = lines[lines.index(stages) + 1]
    assert re.split(r"\s{2,}", below) == ["120/s", "lag 2 kB", "reads the slot", "3.2/s", "2 running", "0/s"]
    whole = "\n".join(lines)
    for fact in (
        "pending 3   published 1   consumed 40   dead 1",
        "4 wait, 1 of them due now, the next in 2.5 s",
        "p50 12 ms   p99 1.2 s",
        "1 min ago #4711 biz key key, 3 attempts: refused",
    ):
        assert fact in whole


@pytest.mark.parametrize(("columns", "rows"), [(40, 24), (80, 12), (20, 3), (300, 100)])
def test_no_line_is_wider_and_no_picture_higher_than_the_terminal(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, columns: int, rows: int
) -> None:
    """Whatever the size, the picture fits, so that drawing over it leaves nothing behind."""
    lines = picture(a_look(error="漢" * 500, problems=("x" * 400,)), flow, monkeypatch, columns, rows)
    assert len(lines) < rows
    assert all(len(line) + line.count("漢") <= columns for line in lines)


def test_what_others_wrote_cannot_steer_the_terminal(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences, line ends and bidirectional marks in an error are shown as replacement characters."""
    look = a_look(error=HOSTILE)
    drawn = "\n".join(picture(look, flow, monkeypatch, 200))
    for text in (drawn, as_text(look)):
        assert not set("\x1b\x07\r\N{RIGHT-TO-LEFT OVERRIDE}") & set(text)
        assert "owned" in text
        assert "new line" in text


@pytest.mark.parametrize(
    ("look", "alarm"),
    [
        (a_look(a_slot(active=False)), "NO READER"),
        (a_look(a_slot(exists=False)), "NO SLOT"),
        (a_look(members=0), "NO SINK"),
        (a_look(a_slot(owed=True)), "owed: it was dropped"),
        (a_look(problems=("Kafka: away",)), "Kafka: away"),
    ],
)
def test_what_needs_somebody_is_red(flow: Flow, monkeypatch: pytest.MonkeyPatch, look: Look, alarm: str) -> None:
    """A stage where nobody works, an owed catch-up and a problem are coloured, unless NO_COLOR asks for none."""
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert re.search(rf"\x1b\[31m[^\x1b]*{alarm}", as_picture(look, flow, 2))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in as_picture(look, flow, 2)
    assert alarm in as_picture(look, flow, 2)


def test_wide_characters_are_cut_whole() -> None:
    """A character of two columns that does not fit gives way to the ellipsis."""
    assert clip("漢字漢字", 8) == "漢字漢字"
    assert clip("漢字漢字", 7) == "漢字…"
    assert clip("abc", 2) == "a…"
    assert clip("abc", 0) == ""


def test_a_rate_is_told_over_its_time_and_forgets_a_gap() -> None:
    """The rate is that of the last seconds; after a gap it starts anew instead of showing a peak."""
    rate = Rate(over=10)
    assert rate.add(0, 100) == 0
    assert rate.add(5, 150) == 10
    assert rate.add(10, 150) == 5
    assert rate.add(15, 150) == 0
    rate.forget()
    assert rate.add(100, 10_000) == 0
    assert rate.add(101, 10_007) == 7
    assert rate.add(102, 5) == 0
