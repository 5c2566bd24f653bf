"""Breaks the code on purpose, one tempting line at a time, and runs the test that must notice.

`python -m tests.broken_on_purpose` runs all of them, in a copy of the checkout; words as arguments choose those whose
description holds one of them. `--table` prints the table of ARCHITECTURE.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[1]


class Breach(NamedTuple):
    """One way to break an invariant: what is done to a file, and the test that then fails."""

    invariant: int
    what: str
    file: str
    good: str
    bad: str
    test: str


BREACHES = (
    Breach(
        1,
        "a lot is settled without Kafka's answers",
        "connector/ledger.py",
        "self.closed and self.awaited == 0 and self.written and self.marked",
        "self.closed",
        "test_no_position_is_confirmed_that_lies_behind_a_row_without_a_fate",
    ),
    Breach(
        1,
        "a lot is settled before its failures are written",
        "connector/ledger.py",
        "self.closed and self.awaited == 0 and self.written and self.marked",
        "self.closed and self.awaited == 0 and self.marked",
        "test_no_position_is_confirmed_that_lies_behind_a_row_without_a_fate",
    ),
    Breach(
        1,
        "a keepalive's position is confirmed with rows undelivered",
        "connector/ledger.py",
        "        if not self._lots:\n            self._flushable = max(self._flushable, wal_end)",
        "        self._flushable = max(self._flushable, wal_end)",
        "test_no_position_is_confirmed_that_lies_behind_a_row_without_a_fate",
    ),
    Breach(
        1,
        "what was received is confirmed",
        "connector/reader.py",
        "confirmable = min(self._bookkeeper.recorded_lsn, lsn)",
        "confirmable = stream.received_lsn",
        "test_the_slot_is_never_confirmed_further_than_its_record",
    ),
    Breach(
        1,
        "a position is confirmed before it is recorded",
        "connector/reader.py",
        "confirmable = min(self._bookkeeper.recorded_lsn, lsn)",
        "confirmable = lsn",
        "test_the_slot_is_never_confirmed_further_than_its_record",
    ),
    Breach(
        1,
        "what is thrown away with a producer is not read again",
        "connector/reader.py",
        "        self._bookkeeper.abandon()\n        self._stream.forget()\n",
        "        self._bookkeeper.abandon()\n",
        "test_what_is_thrown_away_with_a_producer_is_read_again",
    ),
    Breach(
        2,
        "an offset is stored before its batch is settled",
        "connector/sink.py",
        "        posted: set[int] = set()\n",
        "        posted: set[int] = set()\n        self._subscription.store(ends_of(messages))\n",
        "test_no_offset_is_committed_before_the_transaction_that_settles_its_message",
    ),
    Breach(
        2,
        "librdkafka stores offsets by itself",
        "connector/kafka/clients.py",
        '"enable.auto.offset.store": False',
        '"enable.auto.offset.store": True',
        "test_no_offset_is_committed_before_the_transaction_that_settles_its_message",
    ),
    Breach(
        3,
        "a row of an unknown relation is passed over",
        "connector/stream.py",
        """            raise ProtocolError(
                f"an insert into relation {message.relation_oid}, which the stream never described"
            ) from None""",
        "            return",
        "test_a_stream_that_makes_no_sense_stops_the_reader_and_loses_nothing",
    ),
    Breach(
        3,
        "a message that cannot be decoded is passed over",
        "connector/stream.py",
        "        message = decode(frame.payload)\n",
        "        try:\n            message = decode(frame.payload)\n"
        "        except ProtocolError:\n            return\n",
        "test_a_stream_that_makes_no_sense_stops_the_reader_and_loses_nothing",
    ),
    Breach(
        3,
        "the reader begins again after what it did not understand",
        "connector/reader.py",
        "            except (StreamEnded, psycopg.Error, SetupRequired) as error:\n                self._interrupted",
        "            except Exception as error:\n                self._interrupted",
        "test_a_stream_that_makes_no_sense_stops_the_reader_and_loses_nothing",
    ),
    Breach(
        4,
        "a slot that is ahead of its record is trusted",
        "connector/catch_up.py",
        "slot.confirmed_lsn > progress.confirmed_lsn:",
        "False:",
        "test_whatever_was_done_to_the_slot_while_no_reader_ran_no_row_is_lost",
    ),
    Breach(
        4,
        "a catch-up is written off before it is done",
        "connector/reader.py",
        "            sent = Ledger()\n            rows_sent = 0\n",
        "            sent = Ledger()\n            rows_sent = 0\n            books.catch_up_done()\n",
        "test_a_crash_in_the_catch_up_leaves_it_owed",
    ),
    Breach(
        4,
        "what a new slot has not seen is not written down",
        "connector/catch_up.py",
        "    books.owe_catch_up(system.identifier, lsn, through, judgement.owed)\n",
        "    books.catch_up_done()\n",
        "test_whatever_was_done_to_the_slot_while_no_reader_ran_no_row_is_lost",
    ),
    Breach(
        4,
        "what is owed is written down after the slot is made",
        "connector/catch_up.py",
        "    books.owe_catch_up(system.identifier, 0, None, judgement.owed)\n",
        "",
        "test_a_crash_or_an_error_at_any_point_loses_doubles_and_reorders_nothing",
    ),
    Breach(
        5,
        "the rows in flight have no bound",
        "connector/publishing.py",
        "self.in_flight < MOST_IN_FLIGHT and ",
        "",
        "test_an_outage_does_not_grow_the_ledger",
    ),
    Breach(
        5,
        "their bytes have no bound",
        "connector/publishing.py",
        " and self._bytes_in_flight < MOST_BYTES_IN_FLIGHT",
        "",
        "test_large_rows_fill_the_pipe_by_their_bytes_and_the_server_is_answered_all_the_while",
    ),
    Breach(
        5,
        "rows of the table are fetched however large they are",
        "connector/store/bookkeeping.py",
        "if len(rows) == batch or taken >= _BYTES_AT_ONCE:",
        "if len(rows) == batch:",
        "test_large_rows_of_the_table_are_read_as_kafka_takes_them",
    ),
    Breach(
        5,
        "the rows that wait for their marks have no bound",
        "connector/reader.py",
        " and self._bookkeeper.unmarked < MOST_UNMARKED",
        "",
        "test_marks_that_cannot_be_written_do_not_grow_either",
    ),
    Breach(
        5,
        "a catch-up reads on while the pipe is full",
        "connector/reader.py",
        "                    while not self._has_room():\n                        self._tend",
        "                    while False:\n                        self._tend",
        "test_a_catch_up_without_kafka_takes_no_more_than_may_be_in_flight",
    ),
    Breach(
        5,
        "the sink takes whatever librdkafka fetches ahead",
        "connector/kafka/clients.py",
        '    "queued.max.messages.kbytes": 8 * 1024,\n    "queued.min.messages": 2_000,\n'
        '    "fetch.max.bytes": 1024 * 1024,\n'
        '    "fetch.message.max.bytes": 64 * 1024,',
        "",
        "test_a_sink_that_the_database_keeps_waiting_takes_little_from_kafka",
    ),
    Breach(
        6,
        "nobody looks at the budget",
        "connector/reader.py",
        "        if slot is None or slot.confirmed_lsn is None or pinned <= allowed:\n            return False",
        "        return False",
        "test_the_slot_stays_within_its_budget_while_kafka_is_away",
    ),
    Breach(
        7,
        "every reader leads",
        "connector/replication.py",
        "        return bool(record and record[0])\n\n    def cancel",
        "        return True\n\n    def cancel",
        "test_a_second_reader_stands_by_and_takes_over_after_a_crash",
    ),
    Breach(
        7,
        "a stale walsender is waited for",
        "connector/reader.py",
        "                    books.end_walsender(slot.active_pid)\n                self._rest",
        "                self._rest",
        "test_a_stale_walsender_is_ended_not_waited_for",
    ),
    Breach(
        7,
        "the server waits a minute for a leader that says nothing",
        "connector/replication.py",
        "SENDER_TIMEOUT_SECONDS = 12",
        "SENDER_TIMEOUT_SECONDS = 60",
        "test_a_leader_that_hangs_is_replaced",
    ),
    Breach(
        8,
        "nothing is held back",
        "sql/queries/sink.sql",
        "     where %(strict)s\n       and (select exists",
        "     where false and %(strict)s\n       and (select exists",
        "test_a_message_behind_one_in_retry_is_held_and_pays_nothing_for_it",
    ),
    Breach(
        8,
        "a plain batch is stored past what is being retried",
        "sql/queries/sink.sql",
        "case when not %(strict)s then true",
        "case when not %(strict)s or true then true",
        "test_a_message_behind_one_in_retry_is_held_and_pays_nothing_for_it",
    ),
    Breach(
        8,
        "a mark clears the due time",
        "sql/queries/reader.sql",
        "       published_at = clock_timestamp(),\n",
        "       published_at = clock_timestamp(), next_retry_at = null,\n",
        "test_a_retried_row_keeps_its_due_time_when_it_is_published_again",
    ),
    Breach(
        8,
        "a refusal leaves the pipe open",
        "connector/publishing.py",
        " and not self._refused",
        "",
        "test_what_follows_a_refused_message_is_not_published_before_the_refusal_is_on_its_row",
    ),
    Breach(
        8,
        "a producer goes on while the other one's messages are on their way",
        "connector/publishing.py",
        "        if ready and not self.in_flight:\n",
        "        if ready:\n",
        "test_a_producer_goes_on_only_when_all_of_the_other_ones_messages_have_arrived",
    ),
    Breach(
        8,
        "due rows go by their ids",
        "sql/queries/reader.sql",
        " order by o.next_retry_at, o.id\n limit %(limit)s;",
        " order by o.id\n limit %(limit)s;",
        "test_due_rows_are_published_in_the_order_of_their_due_times",
    ),
    Breach(
        8,
        "a row with a due time of its own overtakes what was enqueued before it",
        "sql/queries/reader.sql",
        "and (o.updated_at <> o.created_at",
        "and (true or o.updated_at <> o.created_at",
        "test_a_row_with_a_due_time_of_its_own_overtakes_nothing_that_was_enqueued_before_it",
    ),
    Breach(
        8,
        "a due row is picked again while it is on its way",
        "connector/bookkeeper.py",
        "        if self._serving and not self._due_in_flight:\n",
        "        if self._serving:\n",
        "test_a_due_row_that_is_on_its_way_is_not_picked_again",
    ),
    Breach(
        9,
        "status updates are sent only while caught up",
        "connector/reader.py",
        "if now >= next_feedback or confirmable > confirmed or stream.reply_requested:",
        "if caught_up and (now >= next_feedback or confirmable > confirmed or stream.reply_requested):",
        "test_large_rows_fill_the_pipe_by_their_bytes_and_the_server_is_answered_all_the_while",
    ),
    Breach(
        9,
        "every keepalive is answered, also where none asks",
        "connector/stream.py",
        "self.reply_requested = self.reply_requested or frame.reply_requested",
        "self.reply_requested = True",
        "test_nothing_undelivered_is_ever_confirmed",
    ),
    Breach(
        9,
        "a failed delivery is always its message's fault",
        "connector/kafka/deliveries.py",
        "return Fate.TOPIC_REFUSED if error.code() in _REFUSED else Fate.NOT_ITS_FAULT",
        "return Fate.TOPIC_REFUSED",
        "test_a_brokers_own_trouble_is_no_fault_of_a_message",
    ),
    Breach(
        9,
        "marks are lost with the connection",
        "connector/bookkeeper.py",
        "                self._disconnect()\n                self._rest(wait)",
        "                self._disconnect()\n                self._marks.clear()\n                self._rest(wait)",
        "test_bookkeeping_that_loses_its_connection_loses_no_mark",
    ),
)


def file_of(test: str) -> Path:
    """Return the file of a test, relative to the checkout."""
    (path,) = (p for p in (CHECKOUT / "tests").rglob("test_*.py") if f"\ndef {test}(" in p.read_text("utf-8"))
    return path.relative_to(CHECKOUT)


def table() -> str:
    """Return the breaches as ARCHITECTURE.md shows them."""
    lines = ["| | broken on purpose | test that fails |", "| --- | --- | --- |"]
    lines += [f"| {breach.invariant} | {breach.what} | `{breach.test}` |" for breach in BREACHES]
    return "\n".join(lines) + "\n"


def is_noticed(breach: Breach, checkout: Path) -> bool:
    """Break a checkout, run the test, mend it; tell whether the test failed."""
    path = checkout / breach.file
    text = path.read_text("utf-8")
    path.write_text(text.replace(breach.good, breach.bad), "utf-8")
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", file_of(breach.test), "-k", breach.test],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            check=False,
        )
    finally:
        path.write_text(text, "utf-8")
    return run.returncode == 1


def main(words: list[str]) -> int:
    """Run the breaches that are chosen; return how many nobody noticed."""
    if words == ["--table"]:
        print(table(), end="")  # noqa: T201 - a command line
        return 0
    unnoticed = 0
    with tempfile.TemporaryDirectory() as directory:
        checkout = Path(shutil.copytree(CHECKOUT, Path(directory) / "checkout", ignore=shutil.ignore_patterns(".*")))
        for breach in BREACHES:
            if words and not any(word in breach.what for word in words):
                continue
            noticed = is_noticed(breach, checkout)
            unnoticed += not noticed
            print(f"{'noticed' if noticed else 'NOT NOTICED'}: {breach.invariant} {breach.what}", flush=True)  # noqa: T201
    return unnoticed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
