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


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one outbox, and everything that is named after them."""

    outbox: Table
    history: Table

    def identifiers(self) -> dict[str, sql.Composable]:
        """Return each placeholder of the SQL files with its quoted identifier."""
        schema = self.outbox.schema
        names: dict[str, sql.Composable] = {
            "outbox": sql.Identifier(schema, self.outbox.name),
            "outbox_name": sql.Literal(str(self.outbox)),
            "history": sql.Identifier(self.history.schema, self.history.name),
            "history_name": sql.Literal(str(self.history)),
            "enqueue": sql.Identifier(schema, "outbox_enqueue"),
            "slot_progress": sql.Identifier(schema, "outbox_connector_slots"),
            "sink_offsets": sql.Identifier(schema, "outbox_connector_offsets"),
            "migrations": sql.Identifier(schema, "outbox_connector_migrations"),
            "redrives": sql.Identifier(schema, "outbox_connector_redrives"),
            "outbox_schema": sql.Identifier(schema),
            "history_schema": sql.Identifier(self.history.schema),
            "history_outbox_id_key": sql.Identifier(index_name(self.history, "outbox_id_key")),
        }
        for suffix in ("pending_idx", "published_idx", "due_idx", "unsettled_idx", "dead_idx"):
            names[f"outbox_{suffix}"] = sql.Identifier(index_name(self.outbox, suffix))
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
