"""Envelopes, headers, rows and hints made of anything: each is read, or refused by the error that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from connector.envelope import Envelope, _document, decode_envelope, decode_headers, encode_envelope
from connector.errors import EnvelopeError, PayloadError, ProtocolError
from connector.handlers.chat_history import ChatHistoryHandler
from connector.outbox import Fence, OutboxRow, trim_error
from connector.retries import due_in_seconds
from connector.row import RowDecoder
from connector.store.schema import PUBLISHED_COLUMNS
from connector.wire.pgoutput import Column, Relation

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
NAMES = ["outbox_id", "biz_type", "attempt", "payload"]
LIKE_ENVELOPES = st.dictionaries(st.sampled_from(NAMES) | st.text(), ANY_JSON | st.integers(-(1 << 64), 1 << 64))
IDS = st.integers(1, (1 << 63) - 1)

OIDS = {
    "id": 20,
    "biz_type": 1043,
    "topic": 1043,
    "message_key": 1043,
    "payload": 3802,
    "headers": 3802,
    "retry_count": 23,
    "next_retry_at": 1184,
    "updated_at": 1184,
    "status": 1043,
}
RELATION = Relation(1, "s", "t", "d", tuple(Column(name, OIDS[name], -1, is_key=False) for name in PUBLISHED_COLUMNS))


@given(IDS, TEXT, st.integers(0, (1 << 31) - 1), JSON)
def test_every_envelope_survives_a_round_trip_with_its_payload_byte_for_byte(
    outbox_id: int, biz_type: str, attempt: int, payload: Any
) -> None:
    """What the reader encodes the sink decodes, and the payload's bytes are in the value as they were."""
    text = json.dumps(payload, ensure_ascii=False).encode()
    value = encode_envelope(OutboxRow(Fence(outbox_id, attempt, 0, None), biz_type, "t", b"k", text, None))
    assert value.endswith(b',"payload":' + text + b"}")
    assert decode_envelope(value) == Envelope(outbox_id, biz_type, attempt, payload)


@given(st.binary(max_size=200) | LIKE_ENVELOPES.map(lambda document: json.dumps(document).encode("utf-8", "replace")))
@example(b'{"outbox_id":1,"biz_type":"\\ud800"}')
@example(b'{"outbox_id":1,"biz_type":"a","attempt":NaN}')
@example(b'\xef\xbb\xbf{"outbox_id":1,"biz_type":"a"}')
@example(b'{"outbox_id":1e0,"biz_type":"a"}')
def test_any_value_is_an_envelope_or_an_envelope_error(value: bytes) -> None:
    """No value makes the decoder fail in another way, and what it accepts names a row that can exist."""
    try:
        envelope = decode_envelope(value)
    except EnvelopeError:
        return
    assert 0 < envelope.outbox_id < 1 << 63
    assert 0 <= envelope.attempt < 1 << 31


@given(st.binary(max_size=60) | JSON.map(lambda document: json.dumps(document).encode()))
@example(b"1}")
@example(b"1} ")
@example(b"1}}")
@example(b'1,"a":NaN,"a":-0}')
@example(b'1,"a":"\xed\xa0\x80"}')
@example(b'1,"a":"\\ud800"}')
@example(b'1,"a":' + b"9" * 5000 + b"}")
@example(b'1,"a":' + b"[" * 20_000)
def test_a_value_that_is_decoded_the_quick_way_is_what_json_makes_of_it(rest: bytes) -> None:
    """Same document, same words where there is none."""

    def tell(decode: Callable[[bytes], Any]) -> str:
        try:
            return repr(decode(b'{"outbox_id":' + rest))
        except (ValueError, RecursionError) as error:
            return repr(error)

    assert tell(_document) == tell(json.loads)


@given(IDS, TEXT, st.integers(0, 20), JSON, st.data())
def test_a_value_with_a_byte_changed_is_an_envelope_or_an_envelope_error(
    outbox_id: int, biz_type: str, attempt: int, payload: Any, data: st.DataObject
) -> None:
    """Damage next to valid values raises EnvelopeError or nothing."""
    text = json.dumps(payload).encode()
    value = bytearray(encode_envelope(OutboxRow(Fence(outbox_id, attempt, 0, None), biz_type, "t", b"k", text, None)))
    value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_envelope(bytes(value))
    except EnvelopeError:
        return


@given(JSON.map(lambda document: json.dumps(document, ensure_ascii=False).encode()) | st.binary(max_size=100))
def test_any_headers_become_names_and_bytes(headers: bytes) -> None:
    """Odd headers never stop a message."""
    for name, value in decode_headers(headers):
        name.encode()
        assert isinstance(value, bytes)


@given(st.dictionaries(TEXT, TEXT))
def test_headers_of_text_arrive_as_they_are(headers: dict[str, str]) -> None:
    """An object of strings is what the contract asks for."""
    decoded = decode_headers(json.dumps(headers).encode())
    assert decoded == [(name, value.encode()) for name, value in headers.items()]


@given(st.lists(st.none() | st.binary(max_size=20) | st.binary(max_size=10).map(lambda b: b"\x01" + b), max_size=12))
def test_the_values_of_any_insert_are_a_row_or_a_protocol_error(values: list[bytes | None]) -> None:
    """Too few, null or malformed values are refused; nothing else escapes."""
    try:
        row = RowDecoder(RELATION)(tuple(values))
    except ProtocolError:
        return
    assert len(values) >= len(PUBLISHED_COLUMNS)
    row.topic.encode()


@given(ANY_JSON | st.dictionaries(st.sampled_from(["user_id", "chat_id", "message_content", "created_at"]), ANY_JSON))
def test_any_payload_is_parsed_or_refused(payload: Any) -> None:
    """The built-in handler raises PayloadError or returns what PostgreSQL's types can hold."""
    handler = ChatHistoryHandler()
    try:
        values = handler.parse(payload)
    except PayloadError:
        return
    assert len(values) == len(handler.columns)


@given(st.text())
def test_any_error_can_be_stored(text: str) -> None:
    """At most 2,000 characters, none of them NUL or half of one."""
    trimmed = trim_error(text)
    assert len(trimmed) <= 2_000
    assert "\0" not in trimmed
    trimmed.encode()


@given(st.binary(max_size=30))
def test_any_hint_is_a_time_to_look(content: bytes) -> None:
    """Any role may send one; none of them delays a look beyond what it says, or raises."""
    assert 0 <= due_in_seconds(content) < 1e9
