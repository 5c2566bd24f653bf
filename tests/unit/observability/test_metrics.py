"""Each process shows the metrics that are true of it, by the promised names, at the price of a scrape."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from connector.observability.metrics import Histogram, Metrics, ReaderMetrics, SinkMetrics

PREFIX = "outbox_connector_"


def samples(metrics: Metrics) -> dict[str, float]:
    """Read the page as Prometheus does: value by name, and labels where there are any."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix(PREFIX)
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


def names(metrics: Metrics) -> set[str]:
    """Give the names of all families on the page."""
    page = metrics.render().decode()
    return {line.split()[2].removeprefix(PREFIX) for line in page.splitlines() if line.startswith("# TYPE")}


def set_everything(metrics: Metrics) -> None:
    """Give each gauge a value, and each counter with labels a first count."""
    metrics.outbox_rows.labels("pending").set(1)
    metrics.oldest_unconsumed_age_seconds.set(1)
    metrics.dead.labels("unknown biz_type").inc()
    if isinstance(metrics, ReaderMetrics):
        metrics.wal_budget_bytes.set(1)
        metrics.show_slot(1, 1, "reserved")
    if isinstance(metrics, SinkMetrics):
        metrics.held_messages.set(1)
        metrics.skipped.labels("terminal").inc()


def test_the_reader_shows_what_it_does() -> None:
    """Names are those that dashboards and alerts rely on."""
    metrics = ReaderMetrics()
    set_everything(metrics)
    assert names(metrics) == {
        "published_total",
        "publish_failures_total",
        "commit_to_ack_seconds",
        "replication_lag_bytes",
        "slot_retained_wal_bytes",
        "slot_wal_status",
        "wal_budget_bytes",
        "in_flight_messages",
        "leader",
        "retries_scheduled_total",
        "dead_total",
        "outbox_rows",
        "oldest_unconsumed_age_seconds",
        "build_info",
    }


def test_the_sink_shows_what_it_does() -> None:
    """Names are those that dashboards and alerts rely on."""
    metrics = SinkMetrics()
    set_everything(metrics)
    assert names(metrics) == {
        "consumed_total",
        "skipped_total",
        "dead_letters_total",
        "end_to_end_seconds",
        "sink_batch_rows",
        "held_messages",
        "retries_scheduled_total",
        "dead_total",
        "outbox_rows",
        "oldest_unconsumed_age_seconds",
        "build_info",
    }


def test_every_line_carries_the_prefix_and_no_time_of_creation() -> None:
    """Nothing on the page belongs to anybody else, and nothing doubles it."""
    metrics = SinkMetrics()
    set_everything(metrics)
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    assert all(line.startswith(PREFIX) for line in lines)
    assert not any("_created" in line for line in lines)


def test_counters_count_and_labels_tell_reasons() -> None:
    """What was counted is on the page."""
    metrics = SinkMetrics()
    metrics.consumed.inc(1000)
    metrics.skipped.labels("terminal").inc(2)
    found = samples(metrics)
    assert found["consumed_total"] == 1000
    assert found["skipped_total{reason=terminal}"] == 2


def test_two_processes_in_one_do_not_mix() -> None:
    """The demo runs both, and each has a page of its own."""
    one, other = ReaderMetrics(), ReaderMetrics()
    one.published.inc()
    assert samples(other)["published_total"] == 0


def test_a_gauge_that_nobody_has_measured_is_not_shown() -> None:
    """No lag is claimed before it is known; and NaN takes a value back."""
    metrics = ReaderMetrics()
    assert "replication_lag_bytes" not in names(metrics)
    metrics.replication_lag_bytes.set(0)
    assert samples(metrics)["replication_lag_bytes"] == 0
    metrics.replication_lag_bytes.set(float("nan"))
    assert "replication_lag_bytes" not in names(metrics)


def test_every_reason_is_on_the_page_before_it_first_happens() -> None:
    """Of a counter that begins at 1, Prometheus sees no increase."""
    reader, sink = samples(ReaderMetrics()), samples(SinkMetrics())
    assert reader["dead_total{reason=topic_refused}"] == reader["dead_total{reason=message_too_large}"] == 0
    assert sink["dead_total{reason=payload}"] == sink["skipped_total{reason=missing}"] == 0


def test_one_of_the_slots_states_is_1() -> None:
    """What the server says of the slot's WAL is a set of gauges; the sizes of a slot that is gone are not shown."""
    metrics = ReaderMetrics()
    assert not any(name.startswith("slot_") for name in names(metrics))
    metrics.show_slot(5, 7, "extended")
    shown = samples(metrics)
    assert (shown["replication_lag_bytes"], shown["slot_retained_wal_bytes"]) == (5, 7)
    states = {name: value for name, value in shown.items() if name.startswith("slot_wal_status")}
    assert [name for name, value in states.items() if value == 1] == ["slot_wal_status{status=extended}"]
    assert len(states) == 5
    metrics.show_slot(None, None, "missing")
    shown = samples(metrics)
    assert shown["slot_wal_status{status=missing}"] == 1
    assert shown["slot_wal_status{status=extended}"] == 0
    assert "slot_retained_wal_bytes" not in shown


def test_gauges_are_refreshed_by_each_scrape() -> None:
    """A value is as old as the page that shows it."""
    metrics = ReaderMetrics()
    lags = iter([10, 20])
    metrics.on_scrape(lambda: metrics.replication_lag_bytes.set(next(lags)), metrics.replication_lag_bytes)
    assert [samples(metrics)["replication_lag_bytes"] for _ in range(2)] == [10, 20]


def test_a_refresh_that_fails_hides_its_own_gauges_only() -> None:
    """An old value never passes for today's, the other metrics stay, and the trouble passes when it passes."""
    metrics = ReaderMetrics()
    broken = False

    def refresh() -> None:
        if broken:
            raise OSError("database is away")
        metrics.outbox_rows.labels("pending").set(7)

    metrics.on_scrape(refresh, metrics.outbox_rows)
    metrics.on_scrape(lambda: metrics.replication_lag_bytes.set(1), metrics.replication_lag_bytes)
    assert samples(metrics)["outbox_rows{status=pending}"] == 7
    broken = True
    assert not any(name.startswith("outbox_rows") for name in samples(metrics))
    assert samples(metrics)["replication_lag_bytes"] == 1
    broken = False
    assert samples(metrics)["outbox_rows{status=pending}"] == 7


def test_a_failing_refresh_is_logged_once_until_it_recovers(capsys: pytest.CaptureFixture[str]) -> None:
    """Scrapes come every few seconds; an outage is one event."""
    metrics = ReaderMetrics()
    fails = iter([True, True, False, True])

    def refresh() -> None:
        if next(fails):
            raise OSError("away")

    metrics.on_scrape(refresh)
    logged = []
    for _ in range(4):
        metrics.render()
        captured = capsys.readouterr()
        logged.append((captured.out + captured.err).count("metrics_left_out"))
    assert logged == [1, 0, 0, 1]


def test_a_histogram_counts_many_equal_observations_at_once() -> None:
    """A batch that was acknowledged together is observed together."""
    metrics = ReaderMetrics()
    metrics.commit_to_ack.observe(0.004, 500)
    metrics.commit_to_ack.observe(1000)
    found = samples(metrics)
    assert found["commit_to_ack_seconds_bucket{le=0.0025}"] == 0
    assert found["commit_to_ack_seconds_bucket{le=0.005}"] == 500
    assert found["commit_to_ack_seconds_bucket{le=300.0}"] == 500
    assert found["commit_to_ack_seconds_bucket{le=+Inf}"] == 501
    assert found["commit_to_ack_seconds_count"] == 501
    assert found["commit_to_ack_seconds_sum"] == pytest.approx(1002)


@given(st.lists(st.tuples(st.floats(-10, 1e6), st.integers(0, 1000))))
def test_buckets_hold_what_is_not_above_their_bound(observations: list[tuple[float, int]]) -> None:
    """Buckets are cumulative, with inclusive bounds; a time below zero is a difference of clocks and counts as zero."""
    bounds = [0.0, 0.5, 1.0, 1000.0]
    histogram = Histogram("h", "h", bounds)
    for value, count in observations:
        histogram.observe(value, count)
    (family,) = histogram.collect()
    shown = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "h_bucket"}
    for bound in bounds:
        assert shown[str(bound)] == sum(count for value, count in observations if max(value, 0) <= bound)
    assert shown["+Inf"] == sum(count for _, count in observations)
    total = next(sample.value for sample in family.samples if sample.name == "h_sum")
    assert total == pytest.approx(sum(max(value, 0) * count for value, count in observations))


@given(st.lists(st.floats(-10, 1e6)))
def test_values_observed_together_count_as_one_by_one(values: list[float]) -> None:
    """A whole batch is observed at once."""
    together, singly = Histogram("h", "h", [0.0, 0.5, 1000.0]), Histogram("h", "h", [0.0, 0.5, 1000.0])
    together.observe_each(values)
    for value in values:
        singly.observe(value)
    assert [family.samples for family in together.collect()] == [family.samples for family in singly.collect()]


def test_a_histogram_loses_nothing_between_threads() -> None:
    """Observations from several threads all count."""
    histogram = Histogram("h", "h", [1])

    def observe() -> None:
        for _ in range(10_000):
            histogram.observe(0.5)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (family,) = histogram.collect()
    assert next(sample.value for sample in family.samples if sample.name == "h_count") == 40_000
