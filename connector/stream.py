"""What the frames of the replication stream mean: rows to publish, positions to confirm, hints to look at the table."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from connector.errors import ProtocolError
from connector.failpoints import Point, armed, reach
from connector.kafka import AlreadySent
from connector.ledger import Ledger
from connector.outbox import WAKE_PREFIX, OutboxRow, Table
from connector.publishing import Publishing, Shipment
from connector.replication import ReplicationConnection
from connector.retries import due_in_seconds
from connector.row import RowDecoder
from connector.wire.boundaries import Beginning, begin_at_once, commit_at_once
from connector.wire.frames import PrimaryKeepalive, XLogData, decode_frame
from connector.wire.pgoutput import Insert, LogicalMessage, Relation, decode

_FRAMES_PER_TURN: Final = 5_000
_BEHIND_SECONDS: Final = 1.0
_CAUGHT_UP_SECONDS: Final = 0.1
_LONG_ANSWER_SECONDS: Final = 1.0
# When nothing of ours is written, the position is confirmed in steps: each costs a write, which is WAL again.
_IDLE_STEP_BYTES: Final = 256 * 1024


class Stream:
    """Reads frames, hands their rows on, and keeps the ledger of what they are waiting for."""

    def __init__(self, outbox: Table, publishing: Publishing, hint: Callable[[float], None]) -> None:
        """Prepare; `hint` is told of rows that fall due, in seconds from now."""
        self._outbox = outbox
        self._publishing = publishing
        self._hint = hint
        self._outbox_oid: int | None = None
        self._decoders: dict[int, RowDecoder | None] = {}
        self._row_at_once: Callable[[bytes], OutboxRow | None] = _none_at_once
        self._commit_lag = 0.0
        self._began_at: int | None = None
        self._sent: AlreadySent | None = None
        self.behind = False
        """Whether what is read now was committed a while ago: a backlog."""
        self.flowing = False
        """Whether a read that took all there was took something of a backlog: more of it will be there in a moment."""
        self.in_transaction = False
        self.reply_requested = False
        """Whether the server wants a status update at once; the reader sends it and clears this."""
        self._server_lsn = 0
        self.wal_moved_at = time.monotonic()
        """When the server was last heard to have written anything, on the monotonic clock."""
        self.ledger = Ledger()
        self.received_lsn = 0
        """Everything before this was read: where to go on after the connection broke."""

    def forget(self) -> None:
        """Forget what was read: it will be read again, or is looked for in the table."""
        self.ledger = Ledger()
        self.received_lsn = 0

    def recall(self, sent: AlreadySent | None) -> None:
        """Send no row again that is in Kafka already, until a transaction comes that is younger than this stream.

        Only rows of the stream: what the table gives is to be sent once more though there be a copy of it.
        """
        if self._sent is not None:
            self._sent.close()
        self._sent = sent

    def begin(self, outbox_oid: int | None) -> None:
        """Expect a new stream: it describes its relations anew, and starts between transactions.

        By its oid the outbox is known also where it had another name for a while: a relation has the name of its time.
        """
        self._outbox_oid = outbox_oid
        self._began_at = None
        self._decoders = {}
        self._row_at_once = _none_at_once
        self.in_transaction = False
        self.reply_requested = False

    @property
    def published_since(self) -> float:
        """When the oldest row that is not settled was sent, or now where all are: in seconds since 1970."""
        oldest = next(iter(self.ledger), None)
        return time.time() - (0.0 if oldest is None else time.monotonic() - oldest.opened_at)

    @property
    def idle(self) -> bool:
        """Whether everything that was read is settled."""
        return self.ledger.empty and not self.in_transaction

    def read(self, replication: ReplicationConnection, *, to_commit: bool = False) -> bool:
        """Take what has arrived, up to a turn's worth; tell whether nothing more is waiting.

        With `to_commit` it goes no further than the end of the transaction at hand.

        Raises:
            StreamEnded: the server ended the stream, or the connection broke.
            ProtocolError: the server sent what makes no sense.
            SetupRequired: the publication does not send what the reader needs.
        """
        shipment = Shipment(self._publishing, due=False)
        # What follows in its transaction has waited as long as what went before.
        shipment.lot.waits.append((self._commit_lag, 0))
        try:
            for taken in range(_FRAMES_PER_TURN):
                data = replication.receive()
                if data is None:
                    self.flowing = self.behind and taken > 0
                    return True
                row = self._row_at_once(data)
                if row is not None:
                    self._publish(row, shipment)
                elif (beginning := begin_at_once(data)) is not None:
                    self._begins(beginning, shipment)
                elif (end_lsn := commit_at_once(data)) is not None:
                    self._ends(end_lsn)
                    if to_commit:
                        break
                else:
                    frame = decode_frame(data)
                    if isinstance(frame, PrimaryKeepalive):
                        self._keepalive(frame)
                        continue
                    self._message(frame, shipment)
                if shipment.full:
                    break
        finally:
            shipment.close()
        return False

    def _keepalive(self, frame: PrimaryKeepalive) -> None:
        self.reply_requested = self.reply_requested or frame.reply_requested
        self._note_wal(frame.wal_end)
        flushable = self.ledger.settle()
        # With nothing undelivered, all that the server has sent is settled, also what it had nothing to send of.
        if self.idle and frame.wal_end - flushable >= _IDLE_STEP_BYTES:
            self.ledger.nothing_until(frame.wal_end)
            self.received_lsn = max(self.received_lsn, frame.wal_end)

    def _note_wal(self, lsn: int) -> None:
        if lsn > self._server_lsn:
            self._server_lsn, self.wal_moved_at = lsn, time.monotonic()

    def _message(self, frame: XLogData, shipment: Shipment) -> None:
        message = decode(frame.payload)
        if isinstance(message, Insert):
            self._insert(message, shipment, frame.send_time)
        elif isinstance(message, LogicalMessage):
            if message.prefix == WAKE_PREFIX:
                self._hint(due_in_seconds(message.content))
        elif isinstance(message, Relation):
            ours = message.oid == self._outbox_oid or Table(message.schema, message.name) == self._outbox
            decoder = self._decoders[message.oid] = RowDecoder(message) if ours else None
            self._row_at_once = _none_at_once if decoder is None else decoder.at_once

    def _begins(self, beginning: Beginning, shipment: Shipment) -> None:
        commit_time, send_time = beginning
        self.in_transaction = True
        if self._began_at is None:
            self._began_at = send_time
        if self._sent is not None and commit_time > self._began_at:
            # Nobody can have sent what was committed after we had begun.
            self.recall(None)
        self._commit_lag = max(0.0, (send_time - commit_time) / 1_000_000)
        self.behind = self._commit_lag > (_CAUGHT_UP_SECONDS if self.behind else _BEHIND_SECONDS)
        shipment.lot.waits.append((self._commit_lag, len(shipment.lot.fences)))

    def _ends(self, end_lsn: int) -> None:
        self.in_transaction = False
        self.received_lsn = end_lsn
        self._note_wal(end_lsn)
        self.ledger.committed(end_lsn)

    def _insert(self, message: Insert, shipment: Shipment, send_time: int) -> None:
        try:
            decoder = self._decoders[message.relation_oid]
        except KeyError:
            raise ProtocolError(
                f"an insert into relation {message.relation_oid}, which the stream never described"
            ) from None
        if decoder is None:
            return
        row = decoder(message.values)
        if row.fence.next_retry_at is not None:
            # Enqueued for later: the table holds it until then.
            self._hint((row.fence.next_retry_at - send_time) / 1_000_000)
            return
        self._publish(row, shipment)

    def _publish(self, row: OutboxRow, shipment: Shipment) -> None:
        if armed:
            reach(Point.ROW_READ)
        if not shipment.lot.fences:
            self.ledger.append(shipment.lot)
        if self._sent is not None and self._was_sent(self._sent, row, shipment):
            shipment.pass_over(row)
        else:
            shipment.add(row)

    def _was_sent(self, sent: AlreadySent, row: OutboxRow, shipment: Shipment) -> bool:
        began = time.monotonic()
        found = sent.has(row)
        shipment.asked = shipment.asked or time.monotonic() - began > _LONG_ANSWER_SECONDS
        return found


def _none_at_once(_frame: bytes) -> OutboxRow | None:
    """Leave every frame to the careful decoders: no relation is described yet."""
    return None
