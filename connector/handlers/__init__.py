"""What becomes of a message at its destination: a handler for each `biz_type`.

Another package adds a handler through the entry point group `outbox_connector.handlers`, its name the `biz_type`:

    [project.entry-points."outbox_connector.handlers"]
    chat_title_changed = "acme.titles:TitleHandler"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from string import Formatter
from typing import Any, Protocol, runtime_checkable

from connector.errors import ConfigurationError
from connector.handlers.chat_history import ChatHistoryHandler

GROUP = "outbox_connector.handlers"


@runtime_checkable
class Handler(Protocol):
    """Checks a payload, and stores a batch of them with one SQL statement.

    The statement runs in the transaction that marks the rows consumed, so a message is stored exactly once. It sees a
    relation `accepted` with the columns `outbox_id`, those named in `columns`, and `place`, the order to keep; it must
    store a row of `accepted` or fail. A `{` or `%` of its own is doubled; `{history}` and `{outbox}` stand for the
    tables.
    """

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns that `parse` gives values for, each with its PostgreSQL type."""

    @property
    def statement(self) -> str:
        """The SQL that stores `accepted`: an insert, update, delete or merge, without a semicolon."""

    def parse(self, payload: Any) -> Sequence[object]:  # noqa: ANN401 - a payload is any JSON value
        """Return the values of `columns` for a decoded payload.

        Raises:
            PayloadError: the payload is of the wrong shape or types; its row is dead at once, with this text. Any other
                error is an ordinary failure: a retry with backoff, then dead.
        """


def load_handlers() -> dict[str, Handler]:
    """Return every installed handler by its `biz_type`.

    Raises:
        ConfigurationError: one cannot be loaded, is no handler, or is one of two for a `biz_type`.
    """
    handlers: dict[str, Handler] = {"chat_history_persist": ChatHistoryHandler()}
    problems = []
    for entry in entry_points(group=GROUP):
        try:
            handler = entry.load()()
            flaw = _flaw(handler)
        except Exception as error:  # noqa: BLE001 - another package's code may raise anything
            problems.append(f"handler {entry.name!r} ({entry.value}) cannot be loaded: {error}")
            continue
        known = handlers.setdefault(entry.name, handler)
        if type(known) is not type(handler):
            problems.append(f"biz_type {entry.name!r} has two handlers, {type(known).__qualname__} and {entry.value}")
        elif flaw:
            problems.append(f"handler {entry.name!r} ({entry.value}) {flaw}")
    if problems:
        raise ConfigurationError(problems)
    return handlers


def _flaw(handler: object) -> str | None:
    """Say what keeps a handler from being used, as far as that can be told before its first message."""
    if not isinstance(handler, Handler):
        return "lacks columns, statement or parse"
    try:
        placeholders = {name for _, name, _, _ in Formatter().parse(handler.statement) if name is not None}
    except ValueError:
        return "has a brace in its statement that is not doubled"
    if unknown := placeholders - {"history", "outbox"}:
        return f"has {{{min(unknown)}}} in its statement; only {{history}} and {{outbox}} stand for something"
    if "%" in handler.statement.replace("%%", ""):
        return "has a % in its statement that is not doubled"
    return None
