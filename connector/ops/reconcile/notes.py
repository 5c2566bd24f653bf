"""What a reconciliation says that is no damage, or that it cannot prove."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from connector.ops.reconcile.progress import Progress
from connector.ops.reconcile.without_id import WithoutId


def notes(progress: Progress, unproved: int, order_unproved: int, overlapping: int) -> Iterator[str]:
    """Yield them; the numbers are of messages that Kafka tells nothing of, or not the order, or explains the order."""
    if progress.dead:
        yield (
            f"{progress.dead:,} messages are dead, and so not in history:"
            " `outbox-connector redrive --all` shows why, and with --yes puts them back"
        )
    if progress.far_off:
        yield f"{progress.far_off:,} messages are pending, and due in more than two days: they wait until then"
    if progress.below:
        named = ", ".join(f"#{outbox_id}" for outbox_id in progress.below) + (", …" if progress.more_below else "")
        yield (
            f"{len(progress.below) + progress.more_below:,} messages of Kafka ({named}) are in neither table, where"
            " `prune` has been: they were removed dead, or deleted from history since, or are lost"
        )
    yield from _of_history(progress.without_id)
    if unproved:
        yield f"{unproved:,} messages are older than what Kafka keeps: that it had them cannot be proved any more"
    if progress.copies:
        yield f"Kafka holds {progress.copies:,} messages once more, which is no damage: the sink stores each once"
    for biz_type, count in sorted(progress.elsewhere.items()):
        yield f"{count:,} messages of {biz_type} are stored by a handler of yours: checked in outbox and Kafka only"
    if order_unproved:
        yield f"{order_unproved:,} messages are behind a later one, in an order that Kafka cannot tell any more"
    if overlapping:
        yield f"{overlapping:,} messages were committed after a later one of their key, and are stored like that"
    if progress.order.beyond:
        yield f"{progress.order.beyond:,} of the reordered messages were only counted: there are too many"


def _of_history(found: WithoutId) -> Iterator[str]:
    if found.left_out:
        yield "many rows of history have no outbox_id: whether they are copies is looked at without --since only"
    if found.rows:
        made = "" if found.newest is None else f"; the newest was made at {_as_text(found.newest)}"
        yield f"{found.rows:,} rows of history have no outbox_id, like those from before the connector{made}"
    if found.alike:
        alike = ", ".join(f"row {place} that of #{outbox_id}" for place, outbox_id in found.alike)
        more = f", and {found.more_alike:,} more" if found.more_alike else ""
        yield f"some of them have the content of a message, at another time: {alike}{more}"


def _as_text(moment: int) -> str:
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=moment)).isoformat(" ", "seconds")
    except OverflowError:
        return "a time that no calendar here knows"
