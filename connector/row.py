"""From an insert on the stream to an outbox row."""

from __future__ import annotations

import struct
from typing import Any, Final

from connector.errors import ProtocolError, SetupRequired
from connector.outbox import Fence, OutboxRow
from connector.wire.pgoutput import Relation

# Type oids of PostgreSQL's pg_type.
_INTEGERS: Final = {20, 23, 21}
_TEXTS: Final = {25, 1043}
_JSONB: Final = 3802
_JSON: Final = 114
_TIMESTAMPTZ: Final = 1184
_JSONB_VERSION: Final = b"\x01"

_EXPECTED: Final[dict[str, set[int]]] = {
    "id": _INTEGERS,
    "biz_type": _TEXTS,
    "topic": _TEXTS,
    "message_key": _TEXTS,
    "payload": {_JSONB, _JSON},
    "headers": {_JSONB, _JSON},
    "retry_count": _INTEGERS,
    "next_retry_at": {_TIMESTAMPTZ},
    "updated_at": {_TIMESTAMPTZ},
}


# In the order in which our own table has them.
_USUAL: Final = [*list(_EXPECTED)[:6], "status", *list(_EXPECTED)[6:]]
_BINARY: Final = ord("b")
_NULL: Final = ord("n")
_XLOG_DATA: Final = ord("w")
_INSERT_AT: Final = 25
"""Where the insert begins in its frame: after its kind, two positions and a time."""

_ID_AT: Final = _INSERT_AT + 13
_FIELDS_AT: Final = _ID_AT + 8
_ID: Final = struct.Struct(">q")
_FIELD: Final = struct.Struct(">BI")
# The status, retry_count and updated_at, each behind its kind and length, and before the last a due time that is null.
_END: Final = struct.Struct(">17si6sq")
_PENDING_AND_RETRY_COUNT: Final = b"b\x00\x00\x00\x07pendingb\x00\x00\x00\x04"
_NO_DUE_TIME_AND_UPDATED_AT: Final = b"nb\x00\x00\x00\x08"
_MOST_TEXTS: Final = 1_000
_INT8: Final = 20
_INT4: Final = 23


class RowDecoder:
    """Turns the values of an insert into a row, by the relation's description."""

    __slots__ = ("_opening", "_places", "_strip", "_texts")

    def __init__(self, relation: Relation) -> None:
        """Find the columns.

        Raises:
            SetupRequired: a column is missing, or is of another type than the outbox has.
        """
        places = {column.name: place for place, column in enumerate(relation.columns)}
        table = f"{relation.schema}.{relation.name}"
        missing = sorted(_EXPECTED.keys() - places.keys())
        if missing:
            raise SetupRequired(
                f"the publication sends no {', '.join(missing)} of {table}: run `outbox-connector setup`"
            )
        for name, types in _EXPECTED.items():
            found = relation.columns[places[name]].type_oid
            if found not in types:
                raise SetupRequired(
                    f"column {name} of {table} is of type {found}, which is none of {sorted(types)}:"
                    " give it back its type"
                )
        self._places = tuple(places[name] for name in _EXPECTED)
        self._strip = tuple(
            _JSONB_VERSION if relation.columns[places[name]].type_oid == _JSONB else b""
            for name in ("payload", "headers")
        )
        self._texts: dict[bytes, tuple[str, str]] = {}
        integers = [relation.columns[places[name]].type_oid for name in ("id", "retry_count")]
        usual = [column.name for column in relation.columns] == _USUAL and integers == [_INT8, _INT4]
        self._opening = b"I%bN\x00\x0ab\x00\x00\x00\x08" % relation.oid.to_bytes(4, "big") if usual else None

    def at_once(self, frame: bytes) -> OutboxRow | None:
        """Return the row of a frame that holds an insert as nearly every one is, or None: the careful decoders know.

        The same as those make of it, in a sixth of the time. A length is read unsigned, so a wrong one leads past the
        end, where the next read or the comparison with the end finds it.
        """
        if self._opening is None or not frame.startswith(self._opening, _INSERT_AT) or frame[0] != _XLOG_DATA:
            return None
        try:
            (outbox_id,) = _id_at(frame, _ID_AT)
            _, size = _field_at(frame, _FIELDS_AT)
            _, more = _field_at(frame, _FIELDS_AT + 5 + size)
            position = _FIELDS_AT + 10 + size + more
            texts = self._texts.get(frame[_FIELDS_AT:position]) or self._new_texts(frame[_FIELDS_AT:position], size)
            key_kind, size = _field_at(frame, position)
            start = position + 5
            position = start + size
            key = frame[start:position]
            payload_kind, size = _field_at(frame, position)
            start = position + 5
            position = start + size
            payload = frame[start:position]
            headers = None
            if frame[position] == _BINARY:
                _, size = _field_at(frame, position)
                start = position + 5
                position = start + size
                headers = frame[start:position]
            elif frame[position] == _NULL:
                position += 1
            else:
                return None
            pending, retry_count, between, updated_at = _end_at(frame, position)
        except (IndexError, struct.error):
            return None
        payload_prefix, headers_prefix = self._strip
        if (
            texts is None
            or key_kind != _BINARY
            or payload_kind != _BINARY
            or pending != _PENDING_AND_RETRY_COUNT
            or between != _NO_DUE_TIME_AND_UPDATED_AT
            or position + _END.size != len(frame)
            or not payload.startswith(payload_prefix)
        ):
            return None
        if headers is not None:
            if not headers.startswith(headers_prefix):
                return None
            headers = headers[len(headers_prefix) :]
        biz_type, topic = texts
        # Past the constructors of the two: they take as long as all of the rest.
        fence = _new_tuple(Fence, (outbox_id, retry_count, updated_at, None))
        fields = (fence, biz_type, topic, key, payload[len(payload_prefix) :], headers)
        row: OutboxRow = _new_tuple(OutboxRow, fields)
        return row

    def _new_texts(self, fields: bytes, size: int) -> tuple[str, str] | None:
        """Decode biz_type and topic, and remember them: there are few."""
        if fields[0] != _BINARY or fields[size + 5] != _BINARY:
            return None
        try:
            texts = fields[5 : size + 5].decode(), fields[size + 10 :].decode()
        except UnicodeDecodeError:
            return None
        if len(self._texts) >= _MOST_TEXTS:
            self._texts.clear()
        self._texts[fields] = texts
        return texts

    def __call__(self, values: tuple[bytes | None, ...]) -> OutboxRow:
        """Return the row.

        Raises:
            ProtocolError: a value is missing, or is not what its type says.
        """
        try:
            outbox_id, biz_type, topic, key, payload, headers, retries, due, updated = [values[p] for p in self._places]
        except IndexError:
            raise ProtocolError(f"an insert with {len(values)} values, fewer than its relation has columns") from None
        if outbox_id is None or biz_type is None or topic is None or key is None or payload is None:
            raise ProtocolError("an outbox row whose id, biz_type, topic, message_key or payload is null")
        if retries is None or updated is None:
            raise ProtocolError("an outbox row whose retry_count or updated_at is null")
        payload_prefix, headers_prefix = self._strip
        try:
            return OutboxRow(
                Fence(
                    int.from_bytes(outbox_id, "big", signed=True),
                    int.from_bytes(retries, "big", signed=True),
                    int.from_bytes(updated, "big", signed=True),
                    None if due is None else int.from_bytes(due, "big", signed=True),
                ),
                biz_type.decode(),
                topic.decode(),
                key,
                _without(payload_prefix, payload),
                None if headers is None else _without(headers_prefix, headers),
            )
        except UnicodeDecodeError as error:
            raise ProtocolError(f"an outbox row whose text is not UTF-8: {error}") from None


def _without(prefix: bytes, value: bytes) -> bytes:
    if not value.startswith(prefix):
        raise ProtocolError(f"a jsonb value of format version {value[:1]!r}, expected {prefix!r}")
    return value[len(prefix) :]


_id_at = _ID.unpack_from
_field_at = _FIELD.unpack_from
_end_at = _END.unpack_from
_new_tuple: Any = tuple.__new__
