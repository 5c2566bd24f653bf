"""Finds the SQL files, and turns their named blocks into statements on the configured tables."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from psycopg import sql

from connector.outbox import Table

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_DOLLAR_QUOTE = re.compile(r"\$[a-z_]\w*\$")
_LONGEST_IDENTIFIER = 63


def sql_directory() -> Path:
    """Return the folder of the SQL files: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent.parent / "sql"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "sql"


@cache
def _blocks(file: str) -> dict[str, str]:
    parts = _NAME.split((sql_directory() / file).read_text("utf-8"))
    return dict(zip(parts[1::2], (part.strip().removesuffix(";") for part in parts[2::2]), strict=True))


def index_name(table: Table, suffix: str) -> str:
    """Return the name of an index of a table: unique per table, and within PostgreSQL's 63 bytes."""
    name = table.name.encode()
    room = _LONGEST_IDENTIFIER - len(suffix) - 1
    if len(name) > room:
        # What is cut off still tells tables with a long beginning in common apart.
        digest = hashlib.sha256(name).hexdigest()[:8]
        return f"{name[: room - len(digest) - 1].decode(errors='ignore')}_{digest}_{suffix}"
    return f"{table.name}_{suffix}"


def _identifier(*names: str) -> sql.Composable:
    """Quote a name so that no per cent sign is left in it: psycopg would take that for a placeholder."""
    if not any("%" in name for name in names):
        return sql.Identifier(*names)
    escaped = (name.replace("\\", "\\\\").replace('"', '""').replace("%", "\\0025") for name in names)
    return sql.SQL(".".join(f'U&"{name}"' for name in escaped))  # quoted above


def _literal(text: str) -> sql.Composable:
    """Quote a text in the same manner."""
    if "%" not in text:
        return sql.Literal(text)
    escaped = text.replace("\\", "\\\\").replace("'", "''").replace("%", "\\045")
    return sql.SQL(f"E'{escaped}'")  # quoted above


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one outbox, and everything that is named after them."""

    outbox: Table
    history: Table

    @property
    def enqueue(self) -> str:
        """Return the name of the function by which applications enqueue, as SQL takes it: one for each schema."""
        return str(Table(self.outbox.schema, "outbox_enqueue"))

    def identifiers(self) -> dict[str, sql.Composable]:
        """Return each placeholder of the SQL files with its quoted identifier."""
        schema = self.outbox.schema
        names: dict[str, sql.Composable] = {
            "outbox": _identifier(schema, self.outbox.name),
            "outbox_name": _literal(str(self.outbox)),
            "outbox_as_written": _literal(_identifier(schema, self.outbox.name).as_string()),
            "history": _identifier(self.history.schema, self.history.name),
            "history_name": _literal(str(self.history)),
            "enqueue": _identifier(schema, "outbox_enqueue"),
            "enqueue_signature": _literal(f"{self.enqueue}(text, text, text, jsonb, integer, jsonb)"),
            "slot_progress": _identifier(schema, "outbox_connector_slots"),
            "sink_offsets": _identifier(schema, "outbox_connector_offsets"),
            "migrations": _identifier(schema, "outbox_connector_migrations"),
            "redrives": _identifier(schema, "outbox_connector_redrives"),
            "pruned": _identifier(schema, "outbox_connector_pruned"),
            "proofs": _identifier(schema, "outbox_connector_proofs"),
            "letters_under_way": _identifier(schema, "outbox_connector_letters"),
            "outbox_schema": _identifier(schema),
            "history_schema": _identifier(self.history.schema),
            "history_outbox_id_key": _identifier(index_name(self.history, "outbox_id_key")),
        }
        for suffix in ("pending_idx", "published_idx", "due_idx", "unsettled_idx", "dead_idx"):
            names[f"outbox_{suffix}"] = _identifier(index_name(self.outbox, suffix))
        return names

    def compose(self, text: str, **more: sql.Composable) -> sql.Composed:
        """Fill in the placeholders of a text; no name in it can end a dollar-quoted part."""
        names = {**self.identifiers(), **more}
        for tag in set(_DOLLAR_QUOTE.findall(text)):
            free = tag
            while any(free in name.as_string() for name in names.values()):
                free = f"{free[:-1]}_$"
            text = text.replace(tag, free)
        return sql.SQL(text).format(**names)

    def script(self, file: str) -> sql.Composed:
        """Return a whole file under `sql`, its placeholders filled in."""
        return self.compose((sql_directory() / file).read_text("utf-8"))

    def indexes(self) -> dict[Table, dict[str, str]]:
        """Return for each table its indexes: by name, the block of `sql/indexes.sql` that makes it."""
        of: dict[Table, dict[str, str]] = {self.outbox: {}, self.history: {}}
        for block in _blocks("indexes.sql"):
            kind, _, suffix = block.partition("_")
            table = self.outbox if kind == "outbox" else self.history
            of[table][index_name(table, suffix)] = block
        return of

    def index(self, block: str, *, concurrently: bool) -> sql.Composed:
        """Return the statement that makes an index where it is missing."""
        return self.compose(_blocks("indexes.sql")[block], concurrently=sql.SQL("concurrently" if concurrently else ""))

    def query(self, file: str, name: str, **more: sql.Composable) -> sql.Composed:
        """Return the named block of a file under `sql/queries`, its placeholders filled in."""
        return self.compose(_blocks(f"queries/{file}.sql")[name], **more) if more else _query(self, file, name)


@cache
def _query(tables: Tables, file: str, name: str) -> sql.Composed:
    return tables.compose(_blocks(f"queries/{file}.sql")[name])
