"""Logs as events with fields, one line each on stderr, with no secret in any of them."""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, MutableMapping
from types import TracebackType
from typing import Any, cast
from urllib.parse import quote, quote_plus

from connector.observability.lean_structlog import structlog

_HIDDEN = "***"
# A shorter secret is hidden only where it stands alone: its letters occur in every other word.
_SHORT_SECRET = 4
_DEEPEST = 6
_REPEAT_SECONDS = 60.0

_secrets: re.Pattern[str] | None = None


def get_logger(room: str) -> structlog.typing.FilteringBoundLogger:
    """Give the logger of one part of the connector; `room` becomes a field of each of its events."""
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger(room=room))


def configure_logging(level: str, fmt: str, secrets: Iterable[str] = ()) -> None:
    """Send this process's logs, those of its libraries and its uncaught exceptions to stderr.

    `level` is debug, info, warning, error or critical; `fmt` is json or console. `secrets` are hidden from then on
    wherever they would appear, also percent-encoded or quoted. Libraries log from warning up, each complaint once a
    minute, or at debug all.
    """
    global _secrets  # noqa: PLW0603 - logging is one thing in a process, and so is what it must hide
    _secrets = _pattern(secrets)
    threshold = logging.getLevelNamesMapping()[level.upper()]
    render: structlog.typing.Processor
    if fmt == "json":
        render = structlog.processors.JSONRenderer()
    else:
        render = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.processors.format_exc_info,
            _plain_and_redacted,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: _Stderr(),
        cache_logger_on_first_use=False,
    )
    _take_over_from_libraries(threshold)


def redact(text: str) -> str:
    """Give `text` with every secret named to `configure_logging` hidden."""
    return text if _secrets is None else _secrets.sub(_HIDDEN, text)


def _pattern(secrets: Iterable[str]) -> re.Pattern[str] | None:
    spellings = set()
    for secret in filter(None, secrets):
        dsn = re.sub(r"([\\'])", r"\\\1", secret)
        spellings |= {secret, dsn, repr(secret)[1:-1], repr(dsn)[1:-1]}
        # The environment's odd bytes come as surrogates.
        spellings |= {encode(secret, safe="", errors="surrogateescape") for encode in (quote, quote_plus)}
    if not spellings:
        return None
    # The longest first, or a secret that starts with another one would leave its tail behind.
    return re.compile(
        "|".join(
            rf"(?<!\w){re.escape(spelling)}(?!\w)" if len(spelling) < _SHORT_SECRET else re.escape(spelling)
            for spelling in sorted(spellings, key=len, reverse=True)
        )
    )


def _plain_and_redacted(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {redact(str(name)): _plain(value) for name, value in event.items()}


def _plain(value: object, depth: int = 0) -> object:
    """Reduce a value to what JSON can say, with secrets hidden in all of its text."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {redact(str(name)): _plain(item, depth + 1) for name, item in value.items()}
    if depth < _DEEPEST and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return redact(bytes(value).decode(errors="backslashreplace"))
    if isinstance(value, BaseException):
        return redact(f"{type(value).__name__}: {value}")
    return redact(str(value))


class _Stderr:
    """Writes whole lines to today's stderr; a closed or broken one never stops the process."""

    _lock = threading.Lock()

    def msg(self, line: str) -> None:
        with self._lock:
            try:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
            except (OSError, ValueError):
                pass

    debug = info = warning = warn = error = critical = exception = fatal = log = msg


class _FromLibraries(logging.Handler):
    """Turns records of the standard library's logging into events."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)
        except Exception:  # noqa: BLE001 - logging's own rule: a bad record is no reason to stop
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        # The base class would print the record's arguments as they are, secrets and all.
        get_logger(record.name).warning("log_record_unreadable")


class _OnceAMinute(logging.Filter):
    """Lets one complaint of a kind through a minute: librdkafka has several a second for a broker that is away."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether this kind of record, its numbers aside, was not let through within the last minute."""
        now = time.monotonic()
        try:
            kind = (record.name, re.sub(r"\d+", "", record.getMessage()))
        except (TypeError, ValueError):
            return True  # not for us to tell that it cannot be read
        if now < self._said.get(kind, -math.inf) + _REPEAT_SECONDS:
            return False
        self._said = {known: at for known, at in self._said.items() if now < at + _REPEAT_SECONDS}
        self._said[kind] = now
        return True


def _take_over_from_libraries(threshold: int) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _FromLibraries):
            root.removeHandler(handler)
    handler = _FromLibraries()
    if threshold > logging.DEBUG:
        handler.addFilter(_OnceAMinute())
    root.addHandler(handler)
    root.setLevel(threshold if threshold <= logging.DEBUG else max(threshold, logging.WARNING))
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get_logger("process").critical("uncaught_exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not issubclass(failure.exc_type, SystemExit):
        thread = failure.thread.name if failure.thread else None
        details = (failure.exc_type, failure.exc_value, failure.exc_traceback)
        get_logger("process").critical("uncaught_exception", thread=thread, exc_info=details)
