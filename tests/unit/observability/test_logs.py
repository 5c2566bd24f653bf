"""Logs are events with fields, one line each, from which no secret can be read."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connector.observability import logs
from connector.observability.logs import configure_logging, get_logger, redact

ODD = 'hunter2 & Söhne\'s \\ "x"\n'


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(logs, "_secrets", None)
    yield
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, logs._FromLibraries)]
    root.setLevel(level)
    structlog.reset_defaults()


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Read the events logged so far, each from its line of stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_an_event_is_one_line_of_json_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, room, level, time and fields are there for machines; stdout stays free for results."""
    configure_logging("info", "json")
    get_logger("reader").info("caught_up\n100%", rows=3)
    (event,) = events(capsys)
    assert event.pop("timestamp").endswith("Z")
    assert event == {"event": "caught_up\n100%", "room": "reader", "level": "info", "rows": 3}


def test_events_below_the_level_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """The level is the least important that is seen."""
    configure_logging("warning", "json")
    get_logger("reader").info("chatter")
    get_logger("reader").warning("trouble")
    assert [event["event"] for event in events(capsys)] == ["trouble"]


def test_a_logger_made_before_configuration_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Modules may make theirs when they are imported."""
    logger = get_logger("reader")
    configure_logging("info", "json")
    logger.info("first")
    configure_logging("error", "json")
    logger.info("second")
    assert [event["event"] for event in events(capsys)] == ["first"]


def test_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """The same event without JSON, and without a secret too."""
    configure_logging("info", "console", ["hunter2"])
    get_logger("reader").info("started", url="postgresql://u:hunter2@h")
    line = capsys.readouterr().err
    assert "started" in line
    assert "postgresql://u:***@h" in line


@pytest.mark.parametrize(
    "spelling",
    [
        ODD,
        quote(ODD),
        quote(ODD, safe=""),
        repr(ODD)[1:-1],
        ODD.replace("\\", "\\\\").replace("'", "\\'"),
    ],
)
def test_a_secret_is_hidden_in_every_spelling(spelling: str) -> None:
    """As it is, percent-encoded, quoted for libpq, and as Python shows it."""
    configure_logging("info", "json", [ODD])
    assert redact(f"<{spelling}>") == "<***>"


def test_a_secret_is_hidden_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    """In the event's name, in nested values, keys, bytes, exceptions, objects and tracebacks."""
    configure_logging("info", "json", ["hunter2"])

    class Odd:
        def __str__(self) -> str:
            return "odd hunter2"

    logger = get_logger("reader").bind(bound="hunter2")
    try:
        int("hunter2")
    except ValueError as error:
        logger.exception(
            "with hunter2",
            nested={"hunter2": [("hunter2",), {"hunter2"}]},
            raw=b"\xffhunter2",
            error=error,
            odd=Odd(),
            deep=[[[[[[[["hunter2"]]]]]]]],
        )
    text = capsys.readouterr().err
    assert "hunter2" not in text
    assert text.count("***") >= 10


def test_a_secret_that_begins_another_leaves_no_tail() -> None:
    """The longer one is hidden as a whole."""
    configure_logging("info", "json", ["hunt", "hunter2"])
    assert redact("hunter2 hunt") == "*** ***"


def test_a_short_secret_is_hidden_where_it_stands_alone() -> None:
    """Logs stay readable although a password is two letters long."""
    configure_logging("info", "json", ["pw", ""])
    assert redact("u:pw@h pwned") == "u:***@h pwned"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(secret=st.text(min_size=4))
def test_no_event_shows_a_secret_whatever_its_characters(capsys: pytest.CaptureFixture[str], secret: str) -> None:
    """Even odd bytes from the environment neither show nor break a line."""
    configure_logging("info", "json", [secret])
    get_logger("reader").info("x", value=f"\x02{secret}\x03")
    (event,) = events(capsys)
    assert event["value"] == "\x02***\x03"


def test_values_that_json_does_not_know_are_logged_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """A strange value never costs the event, and every line is strict JSON."""
    configure_logging("info", "json")
    loop: list[object] = []
    loop.append(loop)
    get_logger("reader").info("odd", nan=float("nan"), type=int, loop=loop, big=1 << 80, none=None, flag=True)
    (event,) = events(capsys)
    assert (event["nan"], event["big"], event["none"], event["flag"]) == ("nan", 1 << 80, None, True)


def test_libraries_log_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    """What psycopg's pool reports is an event too, with its secrets hidden, and only when it matters."""
    configure_logging("info", "json", ["hunter2"])
    logging.getLogger("psycopg.pool").info("chatter")
    logging.getLogger("psycopg.pool").warning("error connecting: %s", "hunter2")
    (event,) = events(capsys)
    assert (event["event"], event["room"], event["level"]) == ("error connecting: ***", "psycopg.pool", "warning")


def test_a_library_that_repeats_itself_is_heard_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers aside, a complaint is not logged again for a while; another one is, and at debug all are."""
    configure_logging("info", "json")
    for number in range(5):
        logging.getLogger("librdkafka").warning("127.0.0.1:9092: %d ms without an answer", number)
    logging.getLogger("librdkafka").warning("something else")
    assert [event["event"] for event in events(capsys)] == [
        "127.0.0.1:9092: 0 ms without an answer",
        "something else",
    ]
    configure_logging("debug", "json")
    for _ in range(2):
        logging.getLogger("librdkafka").warning("something else")
    assert len(events(capsys)) == 2


def test_a_malformed_record_of_a_library_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The standard library would print its arguments; here only the fact is logged."""
    # pytest's own handlers would fail on such a record.
    logging.getLogger().handlers.clear()
    configure_logging("info", "json", ["hunter2"])
    logging.getLogger("psycopg").warning("%d", "hunter2")
    assert [event["event"] for event in events(capsys)] == ["log_record_unreadable"]


def test_configuring_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The second configuration replaces the first."""
    configure_logging("info", "json")
    configure_logging("info", "json")
    logging.getLogger("psycopg").warning("once")
    assert len(events(capsys)) == 1


def test_a_closed_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A process outlives whoever read its logs."""
    configure_logging("info", "json")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    get_logger("reader").info("lost")
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "where", ["boom()", "import threading; t = threading.Thread(target=boom); t.start(); t.join()"]
)
def test_an_uncaught_exception_is_an_event_without_secrets(where: str) -> None:
    """The last words of a process or of a thread give nothing away."""
    code = (
        "from connector.observability.logs import configure_logging\n"
        "configure_logging('info', 'json', ['hunter2'])\n"
        "def boom():\n    raise RuntimeError('hunter' + '2')\n" + where
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    event = json.loads(done.stderr)
    assert event["event"] == "uncaught_exception"
    assert "RuntimeError: ***" in event["exception"]


def test_logging_does_not_load_rich_and_leaves_it_to_those_who_want_it() -> None:
    """Each start and each process would pay for it."""
    code = (
        "import sys, connector.observability.logs\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'rich']\n"
        "import rich.console"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
