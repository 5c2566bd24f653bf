"""What is measured from outside: CPU and memory of processes, and a topic's log."""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
from confluent_kafka import Consumer, Message, TopicPartition

from tests.bench.arena import PARTITIONS, Arena, Running, messages_in

LOOK_SECONDS: Final = 0.1
"""How often progress is looked at: seldom enough to take nothing from who is measured."""
GIVE_UP_SECONDS: Final = 120.0
"""How long nothing may move before a measurement has failed."""

_NUMBER: Final = re.compile(rb'"user_id": ?(\d+)')
_READ_SECONDS: Final = 20.0


class Stuck(Exception):
    """Nothing moves any more, and the work is not done."""


class Meter:
    """CPU and memory of processes together, with their children."""

    def __init__(self, processes: Sequence[Running]) -> None:
        self._processes = processes

    def cpu(self) -> float:
        """Return the seconds of CPU that they have used since they began."""
        return sum(_cpu(process) for process in self._everyone())

    def peak_mb(self) -> float:
        """Return the most resident memory (VmHWM) of the largest of them, in MiB."""
        return max(_peak_kb(process.pid) for process in self._everyone()) / 1024

    def _everyone(self) -> list[psutil.Process]:
        parents = [psutil.Process(process.pid) for process in self._processes]
        return [one for parent in parents for one in (parent, *parent.children(recursive=True))]


def _cpu(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _peak_kb(pid: int) -> int:
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        if peak := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(peak[1])
    return 0


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at a moment, in seconds of the monotonic clock."""

    at: float
    done: int
    cpu: float


def watch(meter: Meter, progress: Callable[[], int], count: int) -> list[Sample]:
    """Look on until `progress` has reached `count`; return the samples from the first that shows any.

    Raises:
        Stuck: nothing has moved for two minutes.
    """
    samples: list[Sample] = []
    last, moved_at = 0, time.monotonic()
    while last < count:
        done = progress()
        now = time.monotonic()
        if done > last:
            last, moved_at = done, now
        elif now > moved_at + GIVE_UP_SECONDS:
            raise Stuck(f"{last:,} of {count:,}, and nothing has moved for {GIVE_UP_SECONDS:.0f} s")
        if done:
            samples.append(Sample(now, done, meter.cpu()))
        if last < count:
            time.sleep(LOOK_SECONDS)
    return samples


def cpu_per_row(samples: Sequence[Sample], total: float, count: int) -> float:
    """Return microseconds a row from the first sample to a `total` of CPU seconds, so without the start."""
    first = samples[0]
    rows = count - first.done
    return (total - first.cpu) / rows * 1e6 if rows > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class Log:
    """A topic's messages: when the broker got them, seconds since 1970, sorted; what is wrong with their number."""

    times: array[float]
    missing: int
    doubled: int

    @property
    def rate(self) -> float:
        """Messages a second from the first to the last."""
        return _rate(len(self.times), self.times[-1] - self.times[0])

    @property
    def warm_rate(self) -> float:
        """Messages a second in the second half."""
        half = len(self.times) // 2
        return _rate(len(self.times) - half, self.times[-1] - self.times[half])


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else float("nan")


def read_log(place: Arena, count: int) -> Log:
    """Read the whole topic; its messages are those of the rows 1 to `count`."""
    copies = bytearray(count + 1)
    times = array("d")
    total = messages_in(place.kafka.admin(), place.topic)
    consumer = Consumer(consumer_options(place))
    try:
        consumer.assign([TopicPartition(place.topic, n, 0) for n in range(PARTITIONS)])
        until = time.monotonic() + _READ_SECONDS
        while len(times) < total and time.monotonic() < until:
            for message in consumer.consume(5_000, 1.0):
                until = time.monotonic() + _READ_SECONDS
                number = number_of(message)
                if number is not None and number <= count:
                    copies[number] = min(255, copies[number] + 1)
                    times.append(message.timestamp()[1] / 1e3)
                else:
                    total -= 1
    finally:
        consumer.close()
    missing = copies[1:].count(0)
    return Log(array("d", sorted(times)), missing, len(times) - (count - missing))


def consumer_options(place: Arena) -> dict[str, str | int | bool]:
    """Return what a consumer outside any group needs."""
    return {
        "bootstrap.servers": place.kafka.bootstrap_servers,
        "group.id": f"{place.topic}-bench",
        "enable.auto.commit": False,
        "auto.offset.reset": "earliest",
        "log_level": 0,
    }


def number_of(message: Message) -> int | None:
    """Return the number of the row that a message stands for; None if it is none of ours."""
    if message.error() is not None:
        return None
    found = _NUMBER.search(message.value() or b"")
    return int(found[1]) if found else None
