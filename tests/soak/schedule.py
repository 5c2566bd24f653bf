"""The faults of a run, drawn from its seed before it begins."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class Kind(StrEnum):
    """What is done to the pipeline."""

    KILL_READER = "SIGKILL reader"
    KILL_SINK = "SIGKILL sink"
    FREEZE_READER = "SIGSTOP reader"
    FREEZE_SINK = "SIGSTOP sink"
    CUT_DATABASE = "cut database"
    CUT_KAFKA = "cut Kafka"
    SILENCE_DATABASE = "black hole database"
    SILENCE_KAFKA = "black hole Kafka"
    UNPLUG_DATABASE = "unplug database"
    UNPLUG_KAFKA = "unplug Kafka"
    SLOW_DATABASE = "delay database"
    SLOW_KAFKA = "delay Kafka"
    KILL_BROKER = "SIGKILL broker"
    CRASH_DATABASE = "database crash"
    DROP_SLOT = "slot dropped"
    SECOND_SINK = "second sink"
    SECOND_READER = "second reader"


class Habit(NamedTuple):
    """How often a fault comes in a minute, and how long it lasts, in seconds: from, to."""

    a_minute: float
    shortest: float
    longest: float


HABITS: Final = {
    # For a process that was killed: how long until somebody starts it again.
    Kind.KILL_READER: Habit(3.0, 0.1, 2.0),
    Kind.KILL_SINK: Habit(3.0, 0.1, 2.0),
    # Beyond the consumer's session and the walsender's timeout, so that what wakes up is a zombie.
    Kind.FREEZE_READER: Habit(0.3, 2.0, 20.0),
    Kind.FREEZE_SINK: Habit(0.3, 2.0, 15.0),
    Kind.CUT_DATABASE: Habit(0.7, 0.0, 4.0),
    Kind.CUT_KAFKA: Habit(0.7, 0.0, 4.0),
    Kind.SILENCE_DATABASE: Habit(0.2, 2.0, 20.0),
    Kind.SILENCE_KAFKA: Habit(0.2, 2.0, 20.0),
    Kind.UNPLUG_DATABASE: Habit(0.15, 2.0, 30.0),
    Kind.UNPLUG_KAFKA: Habit(0.15, 2.0, 30.0),
    Kind.SLOW_DATABASE: Habit(0.2, 3.0, 12.0),
    Kind.SLOW_KAFKA: Habit(0.2, 3.0, 12.0),
    Kind.KILL_BROKER: Habit(0.3, 0.0, 6.0),
    Kind.CRASH_DATABASE: Habit(0.3, 0.0, 4.0),
    Kind.DROP_SLOT: Habit(0.3, 0.0, 0.0),
    Kind.SECOND_SINK: Habit(0.4, 4.0, 25.0),
    Kind.SECOND_READER: Habit(0.4, 4.0, 25.0),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: when it begins and how long it lasts, in seconds of the run."""

    at: float
    kind: Kind
    seconds: float


def draw(seed: int, minutes: float) -> list[Fault]:
    """Return the faults of a run in the order of time; every kind comes once at least."""
    faults = []
    for kind, habit in HABITS.items():
        # Each kind has numbers of its own, so that a new kind leaves the others where they were.
        rng = random.Random(f"{seed} {kind}")
        faults += [
            Fault(rng.uniform(2, minutes * 60), kind, rng.uniform(habit.shortest, habit.longest))
            for _ in range(max(1, round(habit.a_minute * minutes)))
        ]
    return sorted(faults, key=lambda fault: fault.at)
