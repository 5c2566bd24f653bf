"""Walks outbox and history side by side, then Kafka's logs, and looks again at whatever seemed wrong.

Outbox and history are read in ranges of ids, each in one snapshot, so that a message on its way is seen before or after
its transaction, never between. Kafka is read after that, so whatever the outbox called published lies before the ends
of its logs. What is left in doubt is looked at once more at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

import psycopg
from psycopg import errors

from connector.envelope import decode_envelope, outbox_id_of
from connector.errors import ServiceUnavailable, SetupRequired
from connector.kafka import Admin, Kafka, KafkaException, LogScan, Partition, Record
from connector.ops.awaited import before
from connector.ops.database import open_database
from connector.ops.reconcile.copies import write_copies
from connector.ops.reconcile.damage import CLOCK_SKEW_SECONDS, Damage, Flaw, Parsers, Sign, days_ahead, flaws
from connector.ops.reconcile.id_set import IdSet
from connector.ops.reconcile.notes import notes
from connector.ops.reconcile.progress import Phase, Progress, Trace, load, save
from connector.ops.reconcile.report import Report, Sample
from connector.ops.reconcile.retention import Retention
from connector.outbox import Status
from connector.store.bookkeeping import Connection
from connector.store.comparison import Comparison, Message, Straggler
from connector.store.connections import again_on_conflict, describe
from connector.store.proofs import record_proof
from connector.store.queries import Tables

_SAVE_SECONDS: Final = 10.0
_TELL_SECONDS: Final = 1.0
_AT_ONCE: Final = 1_000
_MOST_TRACES: Final = 10_000
_MOST_ROWLESS: Final = 100_000
_MOST_NAMED_IN_NOTE: Final = 5
_BEFORE_ALL_IDS: Final = -(1 << 63)
_COMMIT_SECONDS: Final = 10.0
_IN_KAFKA: Final = frozenset({Status.PUBLISHED, Status.CONSUMED})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReconcileOptions:
    """What `reconcile` is told by the settings and its arguments; times in seconds, `rate` in rows a second."""

    database_url: str
    kafka: Kafka
    tables: Tables
    topics: tuple[str, ...]
    group_id: str
    parsers: Parsers
    strict: bool
    since: float | None
    stuck_after: float
    rate: float | None
    most_samples: int
    state: Path | None
    copies: Path | None
    start_deadline_seconds: float
    proved_by: str


class Reconciliation:
    """One comparison of everything; it writes nothing but its own state file, and its verdict in the end."""

    def __init__(self, options: ReconcileOptions, tell: Callable[[str], None]) -> None:
        """Prepare; `tell` hears about once a second how far it is."""
        self._options = options
        self._tell = tell
        self._told = time.monotonic()
        self._saved = -math.inf
        self._subject = f"{options.tables.outbox} {options.tables.history} {','.join(options.topics)}"
        asked = () if options.since is None else (f"--since {options.since:.15g}s",)
        self._asked = " ".join((*asked, f"--stuck-after {options.stuck_after:.15g}s"))
        self._progress: Progress
        self._comparison: Comparison
        self._retention: Retention
        self._redriven: set[int] = set()
        self._pruned_through = 0

    def run(self) -> Report:
        """Compare, and return what was found.

        Raises:
            ServiceUnavailable: PostgreSQL or Kafka does not answer.
            SetupRequired: a table is missing, or the role may not read it.
            ConfigurationError: the state file is of something else.
        """
        began = time.monotonic()
        options = self._options
        deadline = began + options.start_deadline_seconds
        admin = options.kafka.admin()
        try:
            before(deadline, "Kafka", admin.topics)
            with open_database(
                options.database_url, "outbox-connector reconcile", deadline - time.monotonic()
            ) as connection:
                self._comparison = Comparison(connection, options.tables)
                report = self._compare(admin)
                report.seconds = time.monotonic() - began
                self._record(connection, report)
        except (errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedColumn) as error:
            raise SetupRequired(f"{describe(error)}: run `outbox-connector setup`") from error
        except errors.InsufficientPrivilege as error:
            raise SetupRequired(
                f"PostgreSQL: {describe(error)}: run it as a member of the role outbox_auditor, or as the tables' owner"
                " (docs/operations.md)"
            ) from error
        except psycopg.Error as error:
            raise ServiceUnavailable(f"PostgreSQL: {describe(error)}{self._how_to_go_on()}") from error
        except KafkaException as error:
            raise ServiceUnavailable(f"Kafka: {error.args[0].str()}{self._how_to_go_on()}") from error
        if options.state is not None:
            options.state.unlink(missing_ok=True)
        return report

    def _record(self, connection: Connection, report: Report) -> None:
        """Keep the verdict for whoever looks later, where that can be."""
        verdict = report.verdict(self._options.since)
        try:
            record_proof(connection, self._options.tables, "reconcile", self._options.proved_by, verdict)
        except (errors.InsufficientPrivilege, errors.UndefinedTable, errors.ReadOnlySqlTransaction) as error:
            report.notes.append(f"the console will not show this: it could not be recorded ({describe(error)})")

    def _how_to_go_on(self) -> str:
        return "" if self._options.state is None else f"; run it again to go on from {self._options.state}"

    def _compare(self, admin: Admin) -> Report:
        options = self._options
        scan = LogScan(options.kafka, options.group_id)
        try:
            partitioner = options.kafka.producer_options.get(
                "partitioner", options.kafka.options.get("partitioner", "")
            )
            self._retention = Retention(admin, scan, java_partitioner=partitioner in {"", "murmur2", "murmur2_random"})
            for topic in options.topics:
                self._retention.of(topic)
            self._progress = self._begin()
            try:
                self._walk()
                stragglers = self._stragglers()
                self._read_logs(admin, scan, stragglers)
            finally:
                self._save()
            report = self._judge(stragglers)
            if options.copies is not None:
                named = {sample.outbox_id for samples in report.samples.values() for sample in samples}
                found = write_copies(options.copies, scan, self._retention.ranges, named)
                report.notes.append(f"Kafka has {found:,} of the {len(named):,} messages named: see {options.copies}")
            return report
        finally:
            scan.close()

    # --- the place ---------------------------------------------------------------------------------------------------

    def _begin(self) -> Progress:
        """Return where to go on, or a beginning."""
        options = self._options
        if options.state is not None and (kept := load(options.state, self._subject, self._asked)) is not None:
            for topic in kept.topics:
                self._retention.of(topic)
            return kept
        span = self._comparison.span()
        if span is None:
            return Progress(since=-math.inf, first=1, through=0, after=0)
        first, last, now = span
        since = -math.inf
        if options.since is not None:
            since = now - options.since
            first = self._comparison.first_since(first, last, since)
        return Progress(since=since, first=first, through=last, after=first - 1)

    def _save(self) -> None:
        if self._options.state is not None:
            save(self._options.state, self._progress, self._subject, self._asked)
            self._saved = time.monotonic()

    def _step(self, rows: int, what: str) -> None:
        """After each bounded piece of work: tell, save, and keep to the rate."""
        now = time.monotonic()
        if now > self._told + _TELL_SECONDS:
            self._told = now
            self._tell(what)
        if now > self._saved + _SAVE_SECONDS:
            self._save()
        if self._options.rate is not None:
            time.sleep(rows / self._options.rate)

    # --- outbox and history ------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        progress = self._progress
        if progress.phase is Phase.MESSAGES:
            for end in self._ranges():
                rows = again_on_conflict(self._compare_range, end)
                progress.after = end
                progress.checked += rows
                self._step(rows, f"{progress.checked:,} messages compared, up to #{end} of #{progress.through}")
            self._turn_to_places()
        while progress.phase is Phase.PLACES:
            for end in self._ranges():
                again_on_conflict(self._order_range, end)
                progress.after = end
                self._step(0, f"order of keys compared, up to #{end} of #{progress.through}")
            self._turn_to_places()
        if progress.phase is Phase.HISTORY:
            self._walk_history()
            progress.phase = Phase.CONTENTS
        if progress.phase is Phase.CONTENTS:
            self._compare_contents()
            progress.phase = Phase.LOGS

    def _turn_to_places(self) -> None:
        progress = self._progress
        progress.after = progress.first - 1
        if progress.order.turn_to_what_is_left():
            progress.phase = Phase.PLACES
            return
        progress.phase = Phase.HISTORY
        if progress.since == -math.inf:
            progress.after = _BEFORE_ALL_IDS

    def _ranges(self) -> Iterator[int]:
        progress = self._progress
        while (end := self._comparison.end_of_range(progress.after, progress.through)) is not None:
            yield end

    def _compare_range(self, end: int) -> int:
        progress, options = self._progress, self._options
        elsewhere: dict[str, int] = {}
        rows = unproved = dead = far_off = 0
        least = progress.without_id.least
        for message in self._comparison.messages(progress.after, end, progress.since):
            rows += 1
            outbox_id = message.outbox_id
            if message.stored:
                progress.order.see(message.key_hash, outbox_id, message.stored[0].place)
                for row in message.stored:
                    if row.created is not None and (least is None or row.created < least):
                        least = row.created
            elif message.status == Status.CONSUMED and message.biz_type not in options.parsers:
                elsewhere[message.biz_type] = elsewhere.get(message.biz_type, 0) + 1
            if any(True for _ in flaws(message, options.parsers, options.stuck_after)):
                progress.suspects.add(outbox_id)
            if message.status in _IN_KAFKA:
                if self._retention.of(message.topic).covers(message.key, message.created, skew=0):
                    progress.expected.add(outbox_id)
                    progress.topics.add(message.topic)
                else:
                    unproved += 1
            dead += message.status == Status.DEAD
            far_off += days_ahead(message) > 0
        for biz_type, count in elsewhere.items():
            progress.elsewhere[biz_type] = progress.elsewhere.get(biz_type, 0) + count
        progress.unproved += unproved
        progress.dead += dead
        progress.far_off += far_off
        progress.without_id.least = least
        return rows

    def _order_range(self, end: int) -> None:
        progress = self._progress
        mask, bits = progress.order.share
        for key, outbox_id, place in self._comparison.places(progress.after, end, progress.since, mask, bits):
            progress.order.see(key, outbox_id, place)

    def _walk_history(self) -> None:
        """Find what history has of messages that are not in the outbox."""
        progress, comparison = self._progress, self._comparison
        if not comparison.knows_what_was_pruned:
            return
        while (end := comparison.end_of_history_range(progress.after, progress.through)) is not None:
            rowless = again_on_conflict(comparison.without_a_message, progress.after, end)
            room = _MOST_ROWLESS - len(progress.rowless)
            progress.rowless += rowless[:room]
            progress.more_rowless += len(rowless[room:])
            progress.after = end
            self._step(len(rowless), f"history compared, up to #{end}")

    def _compare_contents(self) -> None:
        progress = self._progress

        def ranges() -> Iterator[tuple[int, int]]:
            after = progress.first - 1
            while (end := self._comparison.end_of_range(after, progress.through)) is not None:
                yield after, end
                after = end

        progress.without_id.compare(
            self._comparison,
            ranges,
            lambda rows: self._step(rows, "rows of history without outbox_id compared"),
            all_messages=progress.since == -math.inf,
        )

    def _stragglers(self) -> list[Straggler]:
        """Return the messages that history has behind a later one, and that nothing in the database explains."""
        found: list[Straggler] = []
        self._redriven = set()
        for some in _batches(self._progress.order.stragglers.items()):
            stragglers = self._comparison.stragglers(dict(some))
            # Nobody promises an order of what was retried, where it is not asked for.
            found += [straggler for straggler in stragglers if self._options.strict or not straggler.retry_count]
            self._redriven |= self._comparison.redriven([straggler.outbox_id for straggler in stragglers])
        return found

    # --- Kafka -------------------------------------------------------------------------------------------------------

    def _read_logs(self, admin: Admin, scan: LogScan, stragglers: Iterable[Straggler]) -> None:
        progress = self._progress
        watched = {outbox_id for straggler in stragglers for outbox_id in straggler[:2]}
        if not progress.stretches:
            progress.stretches = self._stretches(admin)
        known_from = progress.first if progress.since > -math.inf else 1
        self._pruned_through = self._comparison.pruned_through()
        for records in scan.read(progress.stretches):
            unknown: dict[int, Record] = {}
            for record in records:
                outbox_id = outbox_id_of(record.value)
                if outbox_id is None:
                    continue
                if outbox_id in self._redriven:
                    progress.last_places[outbox_id] = (record.partition[1], record.offset)
                if not progress.seen.add(outbox_id):
                    progress.copies += 1
                    continue
                if outbox_id in watched:
                    progress.places[outbox_id] = (record.partition[1], record.offset)
                if outbox_id >= known_from and outbox_id not in progress.expected:
                    unknown[outbox_id] = record
            self._trace(unknown)
            for record in records:
                progress.stretches[record.partition] = (record.offset + 1, progress.stretches[record.partition][1])
            progress.records += len(records)
            self._step(len(records), f"{progress.records:,} messages read from Kafka")

    def _stretches(self, admin: Admin) -> dict[Partition, tuple[int, int]]:
        """Return what is to be read of each partition."""
        progress = self._progress
        # Where they end now: whatever the outbox has called published lies before that.
        self._retention.look_again()
        ranges = {
            place: stretch
            for place, stretch in self._retention.ranges.items()
            if place[0] in progress.topics or place[0] in self._options.topics
        }
        starts = {place: first for place, (first, _) in ranges.items()}
        if progress.since > -math.inf:
            starts = admin.offsets_at(ranges, progress.since - CLOCK_SKEW_SECONDS)
        return {place: (starts[place], end) for place, (_, end) in ranges.items()}

    def _trace(self, unknown: Mapping[int, Record]) -> None:
        """Remember which of these messages are in Kafka alone."""
        progress = self._progress
        if not unknown:
            return
        for outbox_id in self._comparison.without_a_trace(list(unknown)):
            record = unknown[outbox_id]
            is_too_old = record.at is not None and record.at < progress.since
            # The tables of other handlers are not known.
            if is_too_old or decode_envelope(record.value).biz_type not in self._options.parsers:
                continue
            if outbox_id <= self._pruned_through:
                self._note_below(outbox_id)
                continue
            if len(progress.traces) == _MOST_TRACES:
                progress.more_traces += 1
                continue
            topic, partition = record.partition
            key = (record.key or b"").decode("utf-8", "replace")
            progress.traces[outbox_id] = Trace(topic, partition, record.offset, key)

    def _note_below(self, outbox_id: int) -> None:
        """Note a message of Kafka that has no row, where `prune` has been: what it was, nobody can tell any more."""
        progress = self._progress
        if len(progress.below) < _MOST_NAMED_IN_NOTE:
            progress.below.append(outbox_id)
        else:
            progress.more_below += 1

    # --- the verdict -------------------------------------------------------------------------------------------------

    def _judge(self, stragglers: Iterable[Straggler]) -> Report:
        progress = self._progress
        self._retention.look_again()
        report = Report(checked=progress.checked, records=progress.records)
        unproved = progress.unproved
        absent = IdSet()
        for outbox_id in progress.expected.without(progress.seen):
            absent.add(outbox_id)
            progress.suspects.add(outbox_id)
        for outbox_id in progress.without_id.copies:
            progress.suspects.add(outbox_id)
        for ids in _batches(progress.suspects):
            for message in again_on_conflict(self._messages_of, ids):
                found = list(flaws(message, self._options.parsers, self._options.stuck_after))
                if message.outbox_id in absent and message.status in _IN_KAFKA:
                    if self._retention.of(message.topic).covers(message.key, message.created):
                        found.append(Flaw(Damage.MISSING, Sign.NOT_IN_KAFKA, f"{message.status}, and not in Kafka"))
                    else:
                        unproved += 1
                if (place := progress.without_id.copies.get(message.outbox_id)) is not None:
                    text = f"row {place} of history is the same once more, without outbox_id"
                    found.append(Flaw(Damage.DUPLICATED, Sign.WITHOUT_ID, text))
                self._add(report, message, found)
        report.counts[Damage.DUPLICATED] += progress.without_id.more_copies
        self._judge_rowless(report)
        self._judge_traces(report)
        order_unproved, overlapping = self._judge_order(report, stragglers)
        report.notes += notes(progress, unproved, order_unproved, overlapping)
        report.notes += self._retention.unprovable()
        if not self._comparison.history_is_indexed:
            report.notes.append(
                "history has no index on outbox_id: run `outbox-connector setup`, or this takes very long"
            )
        return report

    def _messages_of(self, ids: Sequence[int]) -> list[Message]:
        return list(self._comparison.messages_of(ids))

    def _judge_rowless(self, report: Report) -> None:
        """Judge the messages that history has, and the outbox has not."""
        progress = self._progress
        for ids in _batches(progress.rowless):
            for outbox_id, chat in self._comparison.still_without_a_message(ids):
                in_kafka = outbox_id in progress.seen
                where = "in history and in Kafka" if in_kafka else "in history alone"
                sign = Sign.NOT_IN_OUTBOX if in_kafka else Sign.ONLY_IN_HISTORY
                sample = Sample(outbox_id, "", chat, "gone", f"{where}, and not in the outbox", (sign,))
                report.add(Damage.MISSING, sample, self._options.most_samples)
        report.counts[Damage.MISSING] += progress.more_rowless

    def _judge_traces(self, report: Report) -> None:
        """Judge the messages that Kafka alone has, once every transaction that might hide a row of theirs has ended."""
        progress, comparison = self._progress, self._comparison
        if not progress.traces:
            return
        if comparison.is_standby():
            report.notes.append(f"{len(progress.traces):,} messages of Kafka are not on this standby: ask the primary")
            return
        writers = comparison.writers()
        deadline = time.monotonic() + _COMMIT_SECONDS
        while writers and time.monotonic() < deadline:
            time.sleep(0.1)
            writers &= comparison.writers()
        left = [outbox_id for ids in _batches(progress.traces) for outbox_id in comparison.without_a_trace(ids)]
        if left and writers:
            report.notes.append(f"{len(left):,} messages of Kafka may have rows that are not committed yet: ask again")
            return
        pruned_through = comparison.pruned_through()
        for outbox_id in left:
            if outbox_id <= pruned_through:
                self._note_below(outbox_id)
                continue
            trace = progress.traces[outbox_id]
            text = f"at offset {trace.offset} of partition {trace.partition}, and neither in the outbox nor in history"
            sample = Sample(outbox_id, trace.topic, trace.key, "gone", text, (Sign.ONLY_IN_KAFKA,))
            report.add(Damage.MISSING, sample, self._options.most_samples)
        report.counts[Damage.MISSING] += progress.more_traces

    def _add(self, report: Report, message: Message, found: Iterable[Flaw]) -> None:
        """Count a message once for each kind of damage."""
        flaws_of: dict[Damage, list[Flaw]] = {}
        for flaw in found:
            flaws_of.setdefault(flaw.damage, []).append(flaw)
        for damage, some in flaws_of.items():
            text, signs = "; ".join(flaw.text for flaw in some), tuple(flaw.sign for flaw in some)
            sample = Sample(message.outbox_id, message.topic, message.key, message.status, text, signs)
            report.add(damage, sample, self._options.most_samples)

    def _judge_order(self, report: Report, stragglers: Iterable[Straggler]) -> tuple[int, int]:
        """Judge each straggler by Kafka: a message that it has behind the other one as well was committed later."""
        progress = self._progress
        unproved = overlapping = 0
        for straggler in stragglers:
            own, other = (progress.places.get(outbox_id) for outbox_id in straggler[:2])
            if straggler.outbox_id in self._redriven:
                # It may stand behind all that Kafka has before the copy that was made when it was put back.
                own = progress.last_places.get(straggler.outbox_id)
                if own is None or other is None or own[0] != other[0] or own > other:
                    continue
                if not self._retention.of(straggler.topic).covers(straggler.key, straggler.created):
                    continue
            elif own is None or other is None or own[0] != other[0]:
                if not self._retention.of(straggler.topic).covers(straggler.key, straggler.created):
                    unproved += 1
                    continue
            elif own > other:
                overlapping += 1
                continue
            text = f"in history behind #{straggler.overtaken_by}, which was enqueued later"
            sample = Sample(straggler.outbox_id, straggler.topic, straggler.key, Status.CONSUMED, text, (Sign.ORDER,))
            report.add(Damage.REORDERED, sample, self._options.most_samples)
        report.counts[Damage.REORDERED] += progress.order.beyond
        return unproved, overlapping


def _batches(things: Iterable[T]) -> Iterator[list[T]]:
    left = iter(things)
    while some := list(islice(left, _AT_ONCE)):
        yield some
