"""How a batch is split where handlers of several kinds have messages in it."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from connector.store.settlement import Item, waves

ITEMS = st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.sampled_from(["x", "y"])), max_size=20).map(
    lambda pairs: [Item(number, 0, biz_type, key, ()) for number, (key, biz_type) in enumerate(pairs, 1)]
)


@given(ITEMS)
def test_messages_of_one_key_stay_in_order_whichever_handlers_they_are_for(items: list[Item]) -> None:
    """Each group is of one kind, nothing is left out, and a key's messages come in the order of the batch."""
    groups = list(waves(items))
    assert all(len({item.biz_type for item in group}) == 1 for group in groups)
    by_key = defaultdict(list)
    for group in groups:
        for item in group:
            by_key[item.key].append(item.outbox_id)
    assert sorted(outbox_id for ids in by_key.values() for outbox_id in ids) == [item.outbox_id for item in items]
    assert all(ids == sorted(ids) for ids in by_key.values())
