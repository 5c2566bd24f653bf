"""What becomes of a message at its destination: a handler for each `biz_type`.

Another package adds a handler through the entry point group `outbox_connector.handlers`, its name the `biz_type`:

    [project.entry-points."outbox_connector.handlers"]
    chat_title_changed = "acme.titles:TitleHandler"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
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
            PayloadError: the payload is of the wrong shape or types; its row is dead at once, with this text.
        """


def load_handlers() -> dict[str, Handler]:
    """Return every installed handler by its `biz_type`.

    Raises:
        ConfigurationError: one cannot be loaded, or is no handler.
    """
    handlers: dict[str, Handler] = {"chat_history_persist": ChatHistoryHandler()}
    problems = []
    for entry in entry_points(group=GROUP):
        try:
            handler = entry.load()()
        except Exception as error:  # noqa: BLE001 - another package's code may raise anything
            problems.append(f"handler {entry.name!r} ({entry.value}) cannot be loaded: {error}")
            continue
        if isinstance(handler, Handler):
            handlers[entry.name] = handler
        else:
            problems.append(f"handler {entry.name!r} ({entry.value}) lacks columns, statement or parse")
    if problems:
        raise ConfigurationError(problems)
    return handlers
