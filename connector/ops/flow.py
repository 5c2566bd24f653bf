"""The pipeline in motion: what a look tells beside `status` once there was one before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import psycopg

from connector.observability.logs import redact
from connector.ops.consumer_lag import PartitionLag
from connector.ops.rates import Rate
from connector.ops.status import Snapshot, Status, StatusOptions, told
from connector.store.gauges import EXACT_BELOW_BYTES, Death, Latency, Retries

RATE_SECONDS: Final = 10.0
"""Rates are told over this time: the sink commits its offsets once a second, so a shorter one would jump."""

LATENCY_SECONDS: Final = 30.0
"""Latencies are those of messages stored within this time."""

_DEATHS: Final = 5


@dataclass(frozen=True, slots=True)
class Look:
    """The pipeline at one moment, `at` in seconds since 1970. What could not be asked is None.

    Rates are rows and messages a second: `enqueued` by the ids given out, `published` by the ends of the topics'
    partitions, `stored` by the offsets that the sink has committed behind its transactions.
    """

    at: float
    snapshot: Snapshot
    enqueued: float | None = None
    published: float | None = None
    stored: float | None = None
    retries: Retries | None = None
    latency: Latency | None = None
    deaths: Sequence[Death] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be asked, and why."""
        return self.snapshot.problems


class Flow:
    """Looks again and again, at a cost that grows neither with the table nor with time."""

    def __init__(self, options: StatusOptions) -> None:
        """Prepare; nothing is connected before the first look.

        Raises:
            ConfigurationError: librdkafka refuses an option.
        """
        self._status = Status(options)
        self.enqueued, self.published, self.stored = (Rate(RATE_SECONDS) for _ in range(3))

    def close(self) -> None:
        """Close the connection."""
        self._status.close()

    def look(self) -> Look:
        """Take a look; a service that is away is a problem in it, not an error."""
        # Like /metrics: of a large table consumed rows are estimated, for this comes every few seconds.
        snapshot = self._status.look(EXACT_BELOW_BYTES)
        now = time.monotonic()
        gauges = self._status.gauges
        latest_id = retries = latency = None
        deaths: Sequence[Death] = ()
        problems = snapshot.problems
        if snapshot.outbox is not None:
            try:
                latest_id = gauges.latest_id()
                retries = gauges.retries()
                latency = gauges.latency(LATENCY_SECONDS)
                if snapshot.outbox["dead"]:
                    deaths = gauges.deaths(_DEATHS)
            except psycopg.Error as error:
                problems = (*problems, redact(told(error)))
        partitions = None if snapshot.consumer.lag is None else snapshot.consumer.partitions
        return Look(
            at=time.time(),
            snapshot=_with_problems(snapshot, problems),
            enqueued=_rate(self.enqueued, now, latest_id),
            published=_rate(self.published, now, _sum(partitions, _end)),
            stored=_rate(self.stored, now, _sum(partitions, _read)),
            retries=retries,
            latency=latency,
            deaths=deaths,
        )


def _rate(rate: Rate, now: float, count: int | None) -> float | None:
    """Note a count; one that is not known makes the rate start anew."""
    if count is None:
        rate.forget()
        return None
    a_second = rate.add(now, count)
    return a_second if rate.known else None


def _sum(partitions: Sequence[PartitionLag] | None, offset: Callable[[PartitionLag], int]) -> int | None:
    return None if partitions is None else sum(map(offset, partitions))


def _end(partition: PartitionLag) -> int:
    return partition.end


def _read(partition: PartitionLag) -> int:
    return max(partition.first, partition.committed or 0)


def _with_problems(snapshot: Snapshot, problems: tuple[str, ...]) -> Snapshot:
    return snapshot if problems == snapshot.problems else replace(snapshot, problems=problems)
