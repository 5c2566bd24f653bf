"""The Prometheus metrics of the reader and of the sink; each process shows only those that are true of it."""

from __future__ import annotations

import math
import platform
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from connector.observability.logs import get_logger

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_NAMESPACE = "outbox_connector"
_ACK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_END_TO_END_BUCKETS = (*_ACK_BUCKETS, 900.0, 3600.0, 14400.0, 86400.0)
# Shown at 0 before they first happen: of a counter that begins at 1, Prometheus sees no increase.
_DEAD_BY_READER = ("message_too_large", "topic_refused")
_DEAD_BY_SINK = ("payload", "unknown_biz_type", "handler_failed", "refused_by_database")
_SKIPPED = ("consumed", "dead", "duplicate", "stale", "already_stored", "missing")
# PostgreSQL's own words (pg_replication_slots.wal_status), and what stands for no slot at all.
_WAL_STATUSES = ("reserved", "extended", "unreserved", "lost", "missing")
_BATCH_BUCKETS = (1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0)

_log = get_logger("metrics")


class Histogram(Collector):
    """A histogram that takes many equal observations at the price of one; safe to use from any thread.

    `buckets` are inclusive upper bounds, rising; the one for everything larger is added.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(map(float, buckets))
        self._labels = [*map(str, self._bounds), "+Inf"]
        self._counts = [0] * len(self._labels)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value` (seconds, where it is a time) `count` times; below zero, as clocks differ, counts as zero."""
        value = max(value, 0.0)
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += count
            self._sum += value * count

    def observe_each(self, values: Iterable[float]) -> None:
        """Count each value once, as `observe` would."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
                if value > 0.0:
                    self._sum += value

    def collect(self) -> Iterator[Metric]:
        """Give the cumulative counts that Prometheus expects."""
        with self._lock:
            counts = tuple(self._counts)
            total = self._sum
        buckets = []
        below = 0
        for label, count in zip(self._labels, counts, strict=True):
            below += count
            buckets.append((label, float(below)))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)


class Metrics:
    """What reader and sink both tell. A gauge that is NaN, as those for scraping are at first, is not shown."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._refreshers: list[tuple[Callable[[], None], frozenset[str]]] = []
        self._failing: set[Callable[[], None]] = set()
        self._rendering = threading.Lock()

        self.retries_scheduled = self._counter("retries_scheduled", "Retries scheduled after a failure.")
        self.dead = self._counter("dead", "Messages given up, by reason.", ["reason"])
        self.outbox_rows = self._gauge("outbox_rows", "Rows of the outbox by status, in part estimated.", ["status"])
        self.oldest_unconsumed_age_seconds = self._scraped(
            "oldest_unconsumed_age_seconds", "Age of the oldest message that is neither stored nor dead."
        )
        self.build_info = self._gauge("build_info", "Always 1; the labels tell what runs.", ["version", "python"])
        self.build_info.labels(_version(), platform.python_version()).set(1)

    def on_scrape(self, refresh: Callable[[], None], *gauges: Gauge) -> None:
        """Call `refresh` before each rendering, to set `gauges`.

        While it raises, its gauges are left out and the first failure is logged. It must have a time limit of its own:
        renderings wait for each other.
        """
        names = frozenset(family.name for gauge in gauges for family in gauge.describe())
        self._refreshers.append((refresh, names))

    def render(self) -> bytes:
        """Give all metrics in Prometheus' text format."""
        with self._rendering:
            hidden = {name for refresh, names in self._refreshers if not self._succeeds(refresh) for name in names}
            return generate_latest(_Shown(self._registry, hidden))

    def _succeeds(self, refresh: Callable[[], None]) -> bool:
        try:
            refresh()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other metrics must still be seen
            if refresh not in self._failing:
                self._failing.add(refresh)
                _log.warning("metrics_left_out", error=error)
            return False
        self._failing.discard(refresh)
        return True

    def _counter(self, name: str, documentation: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, documentation, labels, namespace=_NAMESPACE, registry=self._registry)

    def _gauge(self, name: str, documentation: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, documentation, labels, namespace=_NAMESPACE, registry=self._registry)

    def _scraped(self, name: str, documentation: str) -> Gauge:
        gauge = self._gauge(name, documentation)
        gauge.set(math.nan)
        return gauge

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"{_NAMESPACE}_{name}", documentation, buckets)
        self._registry.register(histogram)
        return histogram


class ReaderMetrics(Metrics):
    """What the reader tells, on top of what both do."""

    def __init__(self) -> None:
        super().__init__()
        self.published = self._counter("published", "Messages acknowledged by Kafka.")
        self.publish_failures = self._counter("publish_failures", "Messages that Kafka refused.")
        self.commit_to_ack = self._histogram(
            "commit_to_ack_seconds", "From the commit in PostgreSQL to the acknowledgement by Kafka.", _ACK_BUCKETS
        )
        self.replication_lag_bytes = self._scraped(
            "replication_lag_bytes", "WAL written by the server and not confirmed by the reader."
        )
        self.slot_retained_wal_bytes = self._scraped("slot_retained_wal_bytes", "WAL that the slot pins.")
        self.slot_wal_status = self._gauge(
            "slot_wal_status", "1 for what the server says of the slot's WAL, 0 for what it does not say.", ["status"]
        )
        self.wal_budget_bytes = self._scraped("wal_budget_bytes", "The most WAL that the slot may pin.")
        self.in_flight_messages = self._gauge("in_flight_messages", "Messages sent and not yet acknowledged.")
        self.leader = self._gauge("leader", "1 in the process that reads the slot, 0 in those that wait.")
        for reason in _DEAD_BY_READER:
            self.dead.labels(reason)
        self.show_slot(None, None, None)

    def show_slot(self, lag: float | None, retained: float | None, wal_status: str | None) -> None:
        """Set the gauges of the slot, in bytes; what is None is not shown, and no `wal_status` hides them all."""
        self.replication_lag_bytes.set(math.nan if lag is None else lag)
        self.slot_retained_wal_bytes.set(math.nan if retained is None else retained)
        for status in _WAL_STATUSES:
            self.slot_wal_status.labels(status).set(math.nan if wal_status is None else status == wal_status)


class SinkMetrics(Metrics):
    """What the sink tells, on top of what both do."""

    def __init__(self) -> None:
        super().__init__()
        self.consumed = self._counter("consumed", "Messages stored.")
        self.skipped = self._counter("skipped", "Messages that needed no storing, by reason.", ["reason"])
        self.dead_letters = self._counter("dead_letters", "Values copied to the dead-letter topic.")
        self.end_to_end = self._histogram(
            "end_to_end_seconds", "From the row's creation to the history stored.", _END_TO_END_BUCKETS
        )
        self.sink_batch_rows = self._histogram(
            "sink_batch_rows", "Messages in one database transaction.", _BATCH_BUCKETS
        )
        self.held_messages = self._scraped("held_messages", "Messages held back by an earlier one of their key.")
        # Shown once there is something to tell.
        self.unproved = self._scraped("unproved", "Settled messages that history lacks, has twice, or has otherwise.")
        self.last_proof_timestamp = self._scraped(
            "last_proof_timestamp", "When what was settled was last compared with history, in seconds since 1970."
        )
        for reason in _DEAD_BY_SINK:
            self.dead.labels(reason)
        for reason in _SKIPPED:
            self.skipped.labels(reason)


class _Shown(CollectorRegistry):
    """The part of a registry that is worth showing now."""

    def __init__(self, registry: CollectorRegistry, hidden: set[str]) -> None:
        super().__init__()
        self._all = registry
        self._hidden = hidden

    def collect(self) -> Iterator[Metric]:
        for family in self._all.collect():
            if family.name in self._hidden:
                continue
            if family.type == "gauge":
                family.samples = [sample for sample in family.samples if not math.isnan(sample.value)]
                if not family.samples:
                    continue
            elif family.type == "counter":
                # Times of creation would double the page, and Prometheus does not use them in this format.
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _version() -> str:
    try:
        return version("outbox-connector")
    except PackageNotFoundError:
        return "unknown"
