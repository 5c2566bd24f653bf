"""How far a reconciliation has come, in memory and in a file from which an interrupted one goes on."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from connector.errors import ConfigurationError
from connector.kafka import Partition
from connector.ops.reconcile.id_set import IdSet
from connector.ops.reconcile.key_order import KeyOrder
from connector.ops.reconcile.without_id import WithoutId

_VERSION: Final = 3


class Trace(NamedTuple):
    """Where Kafka has a message that neither outbox nor history had when it was read."""

    topic: str
    partition: int
    offset: int
    key: str


class Phase(StrEnum):
    """What is being read."""

    MESSAGES = "messages"
    PLACES = "places"
    HISTORY = "history"
    CONTENTS = "contents"
    LOGS = "logs"


@dataclass(slots=True)
class Progress:
    """What was found so far. `since` is in seconds since 1970; `after` is where the last range that is done ends."""

    since: float
    first: int
    through: int
    after: int
    phase: Phase = Phase.MESSAGES
    checked: int = 0
    unproved: int = 0
    dead: int = 0
    far_off: int = 0
    """Messages that are due later than a retry or a hold would make them."""
    elsewhere: dict[str, int] = field(default_factory=dict)
    """Consumed messages of other handlers, by `biz_type`: their tables are not known."""
    suspects: IdSet = field(default_factory=IdSet)
    expected: IdSet = field(default_factory=IdSet)
    """Messages that were published, and that Kafka must have."""
    seen: IdSet = field(default_factory=IdSet)
    order: KeyOrder = field(default_factory=KeyOrder)
    topics: set[str] = field(default_factory=set)
    records: int = 0
    copies: int = 0
    stretches: dict[Partition, tuple[int, int]] = field(default_factory=dict)
    """What is still to be read of each partition."""
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Partition and offset of the first copies of the messages whose order is in doubt."""
    last_places: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Those of the last copies, of messages that were put back."""

    traces: dict[int, Trace] = field(default_factory=dict)
    more_traces: int = 0
    """How many more there are than are remembered."""
    below: list[int] = field(default_factory=list)
    """Some messages of Kafka that have no row, and lie below what `prune` has removed."""
    more_below: int = 0
    rowless: list[int] = field(default_factory=list)
    """Messages that history names, and that have no row in the outbox."""
    more_rowless: int = 0

    without_id: WithoutId = field(default_factory=WithoutId)

    def to_json(self, subject: str, asked: str = "") -> str:
        """Return it as text; `subject` tells what is being compared, `asked` by which options."""
        return json.dumps(
            {
                "version": _VERSION,
                "subject": subject,
                "asked": asked,
                "since": None if self.since == -math.inf else self.since,
                "first": self.first,
                "through": self.through,
                "after": self.after,
                "phase": self.phase,
                "checked": self.checked,
                "unproved": self.unproved,
                "elsewhere": self.elsewhere,
                "suspects": self.suspects.to_json(),
                "expected": self.expected.to_json(),
                "seen": self.seen.to_json(),
                "order": self.order.to_json(),
                "topics": sorted(self.topics),
                "records": self.records,
                "copies": self.copies,
                "stretches": [[*partition, *stretch] for partition, stretch in self.stretches.items()],
                "places": list(self.places.items()),
                "last_places": list(self.last_places.items()),
                "traces": list(self.traces.items()),
                "more_traces": self.more_traces,
                "dead": self.dead,
                "far_off": self.far_off,
                "below": self.below,
                "more_below": self.more_below,
                "rowless": self.rowless,
                "more_rowless": self.more_rowless,
                "without_id": asdict(self.without_id) | {"copies": list(self.without_id.copies.items())},
            }
        )

    @classmethod
    def from_json(cls, text: str, subject: str, asked: str = "") -> Progress:
        """Return it as it was.

        Raises:
            ValueError: the text is of something else, or was begun by other options.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            if document["version"] != _VERSION or document["subject"] != subject:
                raise ValueError("it is of another outbox, other topics, or another version")
            if document["asked"] != asked:
                raise ValueError(f"it was begun with {document['asked']}, and this run has {asked}")
            return cls(
                since=-math.inf if document["since"] is None else float(document["since"]),
                phase=Phase(document["phase"]),
                suspects=IdSet.from_json(document["suspects"]),
                expected=IdSet.from_json(document["expected"]),
                seen=IdSet.from_json(document["seen"]),
                order=KeyOrder.from_json(document["order"]),
                topics=set(document["topics"]),
                stretches={(topic, number): (at, end) for topic, number, at, end in document["stretches"]},
                places={outbox_id: (number, offset) for outbox_id, (number, offset) in document["places"]},
                last_places={outbox_id: (number, offset) for outbox_id, (number, offset) in document["last_places"]},
                traces={outbox_id: Trace(*trace) for outbox_id, trace in document["traces"]},
                without_id=WithoutId(**document["without_id"] | {"copies": dict(document["without_id"]["copies"])}),
                **{
                    name: document[name]
                    for name in (
                        "first",
                        "through",
                        "after",
                        "checked",
                        "unproved",
                        "elsewhere",
                        "records",
                        "copies",
                        "more_traces",
                        "dead",
                        "far_off",
                        "below",
                        "more_below",
                        "rowless",
                        "more_rowless",
                    )
                },
            )
        except (KeyError, TypeError, zlib.error) as error:
            raise ValueError(f"it cannot be read: {error!r}") from None


def load(path: Path, subject: str, asked: str) -> Progress | None:
    """Return what a file holds, or None if there is none.

    Raises:
        ConfigurationError: the file is not one of ours, of another subject, or was begun by other options.
    """
    try:
        return Progress.from_json(path.read_text("utf-8"), subject, asked)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigurationError([f"--state {path}: {error}; remove the file, or name another"]) from None


def save(path: Path, progress: Progress, subject: str, asked: str) -> None:
    """Write progress to a file, wholly or not at all.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(progress.to_json(subject, asked), "utf-8")
        beside.replace(path)
    except OSError as error:
        raise ConfigurationError([f"--state {path}: cannot be written: {error.strerror}"]) from None
