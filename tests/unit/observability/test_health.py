"""A process that cannot work says why; one that no longer moves says since when."""

from __future__ import annotations

from connector.observability.health import Health


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        """Give the time in seconds."""
        return self.now


def test_a_process_that_has_said_nothing_is_not_ready() -> None:
    """Traffic waits for the first word, but nobody restarts the process for its silence."""
    health = Health()
    assert health.readiness() == (False, {"process": "starting"})
    assert health.liveness() == (True, {})


def test_a_process_is_ready_when_all_its_parts_are() -> None:
    """One part's reason is enough to be unready, and is told."""
    health = Health()
    health.ready("database")
    health.ready("kafka", "no broker answers")
    assert health.readiness() == (False, {"database": "ready", "kafka": "no broker answers"})
    health.ready("kafka")
    assert health.readiness() == (True, {"database": "ready", "kafka": "ready"})


def test_a_part_that_beats_is_alive() -> None:
    """However long it goes on, as long as no pause is too long."""
    clock = Clock()
    health = Health(clock)
    health.watch("loop", stuck_after=30)
    for _ in range(10):
        clock.now += 30
        assert health.liveness() == (True, {"loop": "alive"})
        health.beat("loop")


def test_a_part_that_stops_beating_is_stuck_until_it_beats_again() -> None:
    """The pause is told in seconds, next to the longest normal one."""
    clock = Clock()
    health = Health(clock)
    health.watch("loop", stuck_after=30)
    health.watch("idle", stuck_after=3600)
    clock.now += 31
    told = {"loop": "has not moved for 31 s; at most 30 s are normal", "idle": "alive"}
    assert health.liveness() == (False, told)
    health.beat("loop")
    assert health.liveness()[0]


def test_a_part_that_has_ended_is_not_missed() -> None:
    """Draining stops parts one by one, and a last beat of theirs does no harm."""
    clock = Clock()
    health = Health(clock)
    health.watch("loop", stuck_after=1)
    health.unwatch("loop")
    clock.now += 60
    health.beat("loop")
    health.unwatch("loop")
    assert health.liveness() == (True, {})


def test_being_stuck_and_being_unready_are_told_apart() -> None:
    """A restart does not bring back a broker, so that an absent one never causes it."""
    clock = Clock()
    health = Health(clock)
    health.ready("kafka", "no broker answers")
    health.watch("loop", stuck_after=1)
    assert (health.readiness()[0], health.liveness()[0]) == (False, True)
    health.ready("kafka")
    clock.now += 2
    assert (health.readiness()[0], health.liveness()[0]) == (True, False)
