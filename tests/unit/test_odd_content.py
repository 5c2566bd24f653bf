"""Content that is valid JSON for PostgreSQL and beyond what Python's parser reads stops nobody."""

from __future__ import annotations

import pytest

from connector.envelope import Unreadable, decode_envelope, decode_headers, encode_envelope
from connector.errors import EnvelopeError, PayloadError
from connector.handlers.chat_history import ChatHistoryHandler
from connector.outbox import Fence, OutboxRow

LONG_NUMBER = b"1" + b"0" * 5_000
DEEP = b"[" * 3_000 + b"]" * 3_000


def row(payload: bytes, retry_count: int = 0) -> OutboxRow:
    """Return a row with a payload."""
    return OutboxRow(Fence(7, retry_count, 0, None), 'a "type"', "topic", b"key", payload, None)


def test_a_header_with_a_very_long_number_is_carried_as_its_text() -> None:
    """Python refuses to convert it; nobody has to."""
    assert decode_headers(b'{"n": ' + LONG_NUMBER + b"}") == [("n", LONG_NUMBER)]


def test_headers_nested_too_deep_are_carried_as_they_are() -> None:
    """They stop no message, and are not lost."""
    headers = b'{"d": ' + DEEP + b"}"
    assert decode_headers(headers) == [("headers", headers)]


@pytest.mark.parametrize("content", [LONG_NUMBER, DEEP], ids=["long number", "deep"])
def test_an_unreadable_payload_still_names_its_row(content: bytes) -> None:
    """So the row can be given up with the reason, instead of waiting for ever."""
    envelope = decode_envelope(encode_envelope(row(b'{"d": ' + content + b"}", retry_count=2)))
    assert (envelope.outbox_id, envelope.biz_type, envelope.attempt) == (7, 'a "type"', 2)
    assert isinstance(envelope.payload, Unreadable)


def test_a_broken_value_that_begins_like_ours_is_no_envelope() -> None:
    """Only what Python cannot read is excused, not what is no JSON."""
    with pytest.raises(EnvelopeError):
        decode_envelope(b'{"outbox_id":7,"biz_type":"t","attempt":0,"payload":{garbage}}')


def test_a_row_with_a_negative_retry_count_makes_an_envelope() -> None:
    """Whatever a row holds, its own message can be read."""
    assert decode_envelope(encode_envelope(row(b"{}", retry_count=-3))).attempt == 0


def test_a_user_id_may_be_any_bigint_and_nothing_beyond() -> None:
    """Both ends of PostgreSQL's bigint are taken; one further is a payload that nothing can store."""
    handler = ChatHistoryHandler()
    for user_id in (-(1 << 63), (1 << 63) - 1):
        assert handler.parse({"user_id": user_id, "chat_id": "c"})[0] == user_id
    for user_id in (-(1 << 63) - 1, 1 << 63):
        with pytest.raises(PayloadError, match="bigint"):
            handler.parse({"user_id": user_id, "chat_id": "c"})
