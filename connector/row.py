"""From an insert on the stream to an outbox row."""

from __future__ import annotations

from typing import Final

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


class RowDecoder:
    """Turns the values of an insert into a row, by the relation's description."""

    __slots__ = ("_places", "_strip")

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
