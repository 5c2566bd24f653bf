"""The built-in handler: a message becomes a row of chat history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from connector.errors import PayloadError

_BEYOND_BIGINT: Final = 1 << 63


class ChatHistoryHandler:
    """Stores `user_id`, `chat_id`, and where given `message_content`, `role` and `created_at`."""

    columns: Mapping[str, str] = {
        "user_id": "bigint",
        "chat_id": "text",
        "message_content": "text",
        "role": "text",
        "created_at": "timestamptz",
    }
    statement = """
    insert into {history} (user_id, chat_id, message_content, role, created_at, outbox_id)
    select a.user_id, a.chat_id, a.message_content, a.role, coalesce(a.created_at, now()), a.outbox_id
      from accepted as a
     order by a.place
    """

    def parse(self, payload: Any) -> Sequence[object]:  # noqa: ANN401 - a payload is any JSON value
        """Check the payload's shape and types; lengths and references are the database's to judge.

        Raises:
            PayloadError: a field is missing or of the wrong type.
        """
        if not isinstance(payload, dict):
            raise PayloadError(f"payload: expected an object, got {_kind(payload)}")
        user_id = payload.get("user_id")
        if type(user_id) is not int:
            raise PayloadError(f"payload.user_id: expected an integer, got {_kind(user_id)}")
        if not -_BEYOND_BIGINT <= user_id < _BEYOND_BIGINT:
            raise PayloadError("payload.user_id: does not fit a bigint")
        chat_id = _text(payload, "chat_id")
        if chat_id is None:
            raise PayloadError("payload.chat_id: expected a string, got null or nothing")
        return user_id, chat_id, _text(payload, "message_content"), _text(payload, "role"), _moment(payload)


def _text(payload: dict[str, object], field: str) -> str | None:
    value = payload.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise PayloadError(f"payload.{field}: expected a string, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PayloadError(f"payload.{field}: holds half of a surrogate pair, which is no character") from None
    return value


def _moment(payload: dict[str, object]) -> datetime | None:
    text = _text(payload, "created_at")
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise PayloadError("payload.created_at: expected a time in ISO 8601") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _kind(value: object) -> str:
    kinds = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
    }
    return kinds.get(type(value), "null or nothing")
