"""Whether the reader owes a catch-up from the table, as `doctor` and `status` tell it."""

from __future__ import annotations

from connector.catch_up import judge
from connector.store.inspection import Slot, Untold


def catch_up_owed(slot: Slot) -> str | Untold | None:
    """Return why the reader will first publish pending rows from the table; None if it will only stream."""
    if isinstance(slot.progress, Untold):
        return slot.progress
    return judge(slot.state, slot.progress, slot.system_identifier).owed
