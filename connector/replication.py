"""Logical replication over libpq's COPY BOTH mode; the only place that speaks it.

psycopg has no replication API, so the stream is driven through `psycopg.pq`: see "Streaming Replication Protocol" and
"Functions Associated with the COPY Command" in the PostgreSQL documentation. Nothing here blocks for longer than the
socket needs to take a status update, and nothing here knows what the bytes mean to the outbox.
"""

from __future__ import annotations

import select
import time
from typing import Any, NamedTuple, Self

import psycopg
from psycopg import pq, sql

from connector.errors import ProtocolError
from connector.lsn import format_lsn, parse_lsn
from connector.store.connections import watchful
from connector.wire.frames import POSTGRES_EPOCH, encode_standby_status_update

SENDER_TIMEOUT_SECONDS = 12
"""After so long without a word from us the server ends our session, and with it our leadership."""

FEEDBACK_SECONDS = 3
"""We send a status update at least this often, whatever else happens."""

PUBLICATION_MISSING = "42704"
"""The stream's SQLSTATE where its publication is not there, or was not yet where the stream has come to."""

_NOT_IN_PREREQUISITE_STATE = "55000"
_FAREWELL_SECONDS = 2.0
_FIRST_WITH_FAILOVER_SLOTS = 17_00_00
_POSTGRES_EPOCH_SECONDS = POSTGRES_EPOCH.timestamp()


class StreamEnded(Exception):
    """The server ended the stream, or the connection broke. `sqlstate` is None where the server said nothing."""

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        """Keep the server's words and its code."""
        super().__init__(message)
        self.sqlstate = sqlstate


class System(NamedTuple):
    """What IDENTIFY_SYSTEM answers: which cluster this is, on which timeline, how far its WAL goes, which database.

    A standby that is promoted begins a new timeline: positions of the old one mean nothing there.
    """

    identifier: str
    timeline: int
    wal_position: int
    database: str | None = None


class ReplicationConnection:
    """A walsender session: a few commands, then the stream."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        """Wrap an open connection that was made with `replication=database`."""
        self._connection = connection
        self._pgconn = connection.pgconn
        self._socket = [connection.pgconn.socket]
        self._skipped: str | None = None
        connection.add_notice_handler(self._noticed)

    @classmethod
    def open(cls, url: str, connect_seconds: int = 10) -> Self:
        """Connect to a walsender; each address is given `connect_seconds` to answer.

        Raises:
            psycopg.OperationalError: the server cannot be reached or refuses (no REPLICATION, no free sender).
        """
        connection = psycopg.connect(
            url,
            autocommit=True,
            prepare_threshold=None,
            replication="database",
            application_name="outbox-connector reader",
            connect_timeout=connect_seconds,
            client_encoding="UTF8",
            **watchful(url),
        )
        try:
            connection.execute(f"set wal_sender_timeout = '{SENDER_TIMEOUT_SECONDS}s'")
            connection.execute(
                "set statement_timeout = 0; set idle_session_timeout = '60s'; set client_min_messages = warning"
            )
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    @property
    def backend_pid(self) -> int:
        """The process id of our walsender."""
        return self._pgconn.backend_pid

    def fileno(self) -> int:
        """Return the socket to wait on when `read` has nothing."""
        return self._socket[0]

    def identify(self) -> System:
        """Ask which cluster this is (IDENTIFY_SYSTEM)."""
        record = self._connection.execute("IDENTIFY_SYSTEM").fetchone()
        assert record is not None
        return System(record[0], record[1], parse_lsn(record[2]), record[3])

    def in_recovery(self) -> bool:
        """Tell whether this server is a standby."""
        record = self._connection.execute("select pg_is_in_recovery()").fetchone()
        return bool(record and record[0])

    def try_lock(self, slot: str) -> bool:
        """Try to become the slot's one reader; the lock lasts as long as this session."""
        statement = sql.SQL("select pg_try_advisory_lock(hashtext('outbox_connector'), hashtext({}))").format(slot)
        record = self._connection.execute(statement.as_string(self._connection)).fetchone()
        return bool(record and record[0])

    def cancel(self) -> None:
        """Ask the server to give up the command that runs; fit for another thread than the one that waits for it."""
        self._connection.cancel_safe(timeout=5.0)

    def ping(self) -> None:
        """Keep an idle session alive, and learn whether it is.

        Raises:
            psycopg.OperationalError: it is gone, and its lock with it.
        """
        self._connection.execute("select 1")

    def create_slot(self, slot: str) -> tuple[int, str]:
        """Make a pgoutput slot; return its consistent point, and the name of a snapshot of what lies before it.

        The snapshot can be imported until the next command on this connection. From PostgreSQL 17 on the slot is made
        to survive a failover.
        """
        failover = ", FAILOVER true" if self._connection.info.server_version >= _FIRST_WITH_FAILOVER_SLOTS else ""
        statement = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'export'" + failover + ")").format(
            sql.Identifier(slot)
        )
        record = self._connection.execute(statement.as_string(self._connection)).fetchone()
        assert record is not None
        return parse_lsn(record[1]), record[2]

    def start(self, slot: str, publication: str, lsn: int) -> None:
        """Start streaming from `lsn`, or from where the slot is confirmed if that is further.

        Raises:
            StreamEnded: the server refuses; `sqlstate` tells why.
        """
        statement = sql.SQL(
            "START_REPLICATION SLOT {slot} LOGICAL {lsn} (proto_version '1', publication_names {publication},"
            " binary 'true', messages 'true')"
        ).format(
            slot=sql.Identifier(slot),
            lsn=sql.SQL(format_lsn(lsn)),  # hexadecimal digits and a slash, never a user's text
            publication=sql.Literal(sql.Identifier(publication).as_string(self._connection)),
        )
        result = self._pgconn.exec_(statement.as_bytes(self._connection))
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise _ended(result)
        self._skipped = None
        self._pgconn.nonblocking = 1

    def receive(self) -> bytes | None:
        """Return the next frame as it came, or None if none has arrived.

        Raises:
            StreamEnded: the server ended the stream or the connection broke.
        """
        try:
            size, data = self._pgconn.get_copy_data(1)
            if size == 0:
                self._pgconn.consume_input()
                size, data = self._pgconn.get_copy_data(1)
        except psycopg.Error as error:
            raise StreamEnded(f"the replication connection broke: {error}") from error
        if self._skipped is not None:
            # From here on it is as where the server ends the stream by itself.
            self.stop(_FAREWELL_SECONDS)
            raise StreamEnded(self._skipped, PUBLICATION_MISSING)
        if size > 0:
            return bytes(data)
        if size == 0:
            return None
        # Only the result says why the server closed the stream (a termination, a timeout, a shutdown).
        result = self._pgconn.get_result()
        self._leave_stream(result)
        if result is None:
            raise StreamEnded("the server closed the stream without a reason")
        raise _ended(result)

    def _noticed(self, notice: psycopg.errors.Diagnostic) -> None:
        """From PostgreSQL 18 on the server only warns, and goes past every row that the publication would have sent."""
        if notice.sqlstate == _NOT_IN_PREREQUISITE_STATE:
            self._skipped = notice.message_primary

    def _leave_stream(self, result: pq.abc.PGresult | None) -> None:
        """Take what is left of a stream that the server ended, so that the session takes commands again."""
        self._pgconn.nonblocking = 0
        try:
            if result is not None and result.status == pq.ExecStatus.COPY_IN:
                # The server is done sending and waits for us to be.
                self._pgconn.put_copy_end()
            while self._pgconn.get_result() is not None:
                pass
        except psycopg.Error:
            return  # the connection is broken; the next command will say so

    def wait(self, others: list[int], seconds: float) -> None:
        """Wait until the stream or one of the other descriptors is readable, or the time is over."""
        select.select([*self._socket, *others], [], [], seconds)

    def confirm(self, written: int, flushed: int, *, ask: bool = False) -> None:
        """Send a standby status update: everything before `flushed` may be forgotten by the server.

        With `ask` the server answers at once, with a keepalive that tells how far its WAL goes.

        Raises:
            StreamEnded: the connection broke.
        """
        now = round((time.time() - _POSTGRES_EPOCH_SECONDS) * 1_000_000)
        message = encode_standby_status_update(max(written, flushed), flushed, flushed, now, reply_requested=ask)
        deadline = time.monotonic() + SENDER_TIMEOUT_SECONDS
        try:
            while self._pgconn.put_copy_data(message) == 0:
                self._drain(deadline)
            while self._pgconn.flush() == 1:
                self._drain(deadline)
        except psycopg.Error as error:
            raise StreamEnded(f"the replication connection broke: {error}") from error

    def _drain(self, deadline: float) -> None:
        """Make room to write. The server may itself wait for us to read, so take what it has sent."""
        if time.monotonic() > deadline:
            raise StreamEnded(f"the server took no status update for {SENDER_TIMEOUT_SECONDS} s")
        readable, _, _ = select.select(self._socket, self._socket, [], 1.0)
        if readable:
            self._pgconn.consume_input()

    def stop(self, within: float) -> bool:
        """End the stream politely, so that the server has taken the last update before the connection closes.

        What the server still sends is thrown away. Returns whether the session takes commands again: not where the
        server did not answer within so many seconds, or the connection broke.
        """
        deadline = time.monotonic() + within
        try:
            self._pgconn.put_copy_end()
            while self._pgconn.flush() == 1:
                self._drain(deadline)
            while True:
                size, _ = self._pgconn.get_copy_data(1)
                if size < 0:
                    break
                if size == 0:
                    if time.monotonic() > deadline:
                        return False
                    select.select(self._socket, [], [], 0.1)
                    self._pgconn.consume_input()
            self._pgconn.nonblocking = 0
            while self._pgconn.get_result() is not None:
                pass
        except (psycopg.Error, StreamEnded, ProtocolError):
            return False
        return True

    def close(self) -> None:
        """Close the connection; safe to call again."""
        self._connection.close()


def _ended(result: pq.abc.PGresult) -> StreamEnded:
    sqlstate = result.error_field(pq.DiagnosticField.SQLSTATE)
    message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message
    return StreamEnded(
        message.decode("utf-8", "replace").strip() or "the server ended the stream",
        None if sqlstate is None else sqlstate.decode(),
    )
