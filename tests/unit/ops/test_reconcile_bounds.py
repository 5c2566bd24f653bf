"""What `reconcile` remembers: exact, in bounded memory, and the same after it was written down and read again."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.ops.reconcile import key_order
from connector.ops.reconcile.id_set import IdSet
from connector.ops.reconcile.key_order import KeyOrder
from connector.ops.reconcile.progress import Phase, Progress
from connector.ops.reconcile.retention import TopicReach, partition_of

ids = st.integers(min_value=-(1 << 40), max_value=(1 << 63) - 1) | st.integers(min_value=0, max_value=100_000)


def id_set(numbers: set[int]) -> IdSet:
    """Return a set of these ids."""
    made = IdSet()
    for number in numbers:
        assert made.add(number)
        assert not made.add(number)
    return made


@given(st.sets(ids, max_size=200), st.sets(ids, max_size=200))
def test_an_id_set_is_a_set_in_order(some: set[int], others: set[int]) -> None:
    """It holds what was put in, counts it, yields it in order, and can be told from another."""
    made = id_set(some)
    assert list(made) == sorted(some)
    assert len(made) == len(some)
    assert all((number in made) == (number in some) for number in others)
    assert list(made.without(id_set(others))) == sorted(some - others)
    assert list(IdSet.from_json(json.loads(json.dumps(made.to_json())))) == sorted(some)


def test_order_is_exact_for_more_keys_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a few keys, passes over what was left find just the stragglers that unbounded memory finds."""
    rng = random.Random(20_261_124)
    places = list(range(1, 5_001))
    for swap in rng.sample(range(0, 4_900, 50), 40):
        places[swap], places[swap + 49] = places[swap + 49], places[swap]
    hashes = [rng.getrandbits(64) - (1 << 63) for _ in range(700)]
    messages = [(rng.choice(hashes), number, place) for number, place in enumerate(places, 1)]
    expected: set[int] = set()
    last: dict[int, int] = {}
    for key, _, place in messages:
        if place < last.get(key, 0):
            expected.add(last[key])
        last[key] = max(place, last.get(key, 0))
    assert len(expected) > 5

    monkeypatch.setattr(key_order, "MOST_KEYS", 50)
    order = KeyOrder()
    passes = 1
    while True:
        for message in messages:
            order.see(*message)
        order = KeyOrder.from_json(json.loads(json.dumps(order.to_json())))
        if not order.turn_to_what_is_left():
            break
        passes += 1
    assert passes > 10
    assert set(order.stragglers) == expected


def test_stragglers_beyond_the_bound_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many to be looked into are still told of."""
    monkeypatch.setattr(key_order, "MOST_STRAGGLERS", 2)
    order = KeyOrder()
    for key in range(5):
        order.see(key, 2 * key, 100 + key)
        order.see(key, 2 * key + 1, key)
    assert len(order.stragglers) == 2
    assert order.beyond == 3


def test_progress_is_the_same_after_it_was_written_down() -> None:
    """Everything comes back, and the progress of something else is refused."""
    progress = Progress(since=float("-inf"), first=3, through=99, after=50, phase=Phase.LOGS, checked=7, copies=1)
    progress.seen.add(17)
    progress.topics.add("t")
    progress.stretches["t", 2] = (5, 9)
    progress.places[17] = (2, 5)
    text = progress.to_json("this")
    assert Progress.from_json(text, "this").to_json("this") == text
    for other in ("{}", "[]", "no JSON"):
        with pytest.raises(ValueError, match=r".+"):
            Progress.from_json(other, "this")
    with pytest.raises(ValueError, match="another"):
        Progress.from_json(text, "that")


@pytest.mark.parametrize(
    ("key", "partition"),
    # As org.apache.kafka.common.utils.Utils.murmur2 gives them, in its own tests, made positive and taken modulo 1000.
    [
        (b"21", (-973932308 & 0x7FFFFFFF) % 1000),
        (b"foobar", (-790332482 & 0x7FFFFFFF) % 1000),
        (b"a-little-bit-long-string", (-985981536 & 0x7FFFFFFF) % 1000),
        (b"a-little-bit-longer-string", (-1486304829 & 0x7FFFFFFF) % 1000),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", (-58897971 & 0x7FFFFFFF) % 1000),
        (b"abc", (479470107 & 0x7FFFFFFF) % 1000),
    ],
)
def test_a_key_has_the_partition_of_the_java_client(key: bytes, partition: int) -> None:
    """The hash is that of Kafka's own tests."""
    assert partition_of(key, 1000) == partition


def test_a_topic_covers_what_came_after_its_partitions_first_message() -> None:
    """A message is provable by its key's own partition, with leave for clocks that differ."""
    here = partition_of(b"a", 2)
    reach = TopicReach(tuple(1000.0 if number == here else float("inf") for number in range(2)), (1000.0, 1000.0))
    assert not reach.covers("a", 1000.0)
    assert reach.covers("a", 1061.0)
    assert TopicReach((float("-inf"),) * 2).covers("a", -1e9)
    assert not TopicReach((), why_not="is gone").covers("a", 1061.0)


def test_a_partition_that_was_added_later_proves_nothing_of_before() -> None:
    """Two partitions were cut; two came at 5000, of which nothing was deleted, and that never had what was before."""
    never = float("-inf")
    reach = TopicReach((1000.0, 1000.0, never, never), (1000.0, 1000.0, 5000.0, 6000.0))
    key = next(key for key in map(str, range(100)) if partition_of(key.encode(), 4) > 1)
    assert not reach.covers(key, 500.0)
    assert reach.covers(key, 2000.0)
    # Those that were there from the beginning have everything.
    assert TopicReach((1000.0, 1000.0, never, never), (1000.0, 1000.0, 10.0, 20.0)).covers(key, 500.0)
