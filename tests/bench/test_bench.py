"""The bench itself: its arithmetic, and that it still measures this connector."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from connector.sink import BATCH_ROWS
from tests.bench.arena import Rows, arena
from tests.bench.bars import BARS, Bar, Measured, largest, median, ratio, spread
from tests.bench.bench import Sizes
from tests.bench.charts import charts, number
from tests.bench.contenders import OUR_READER, OUR_SINK
from tests.bench.measure import Sample, cpu_per_row
from tests.bench.parts import crash, growth, reading, storing
from tests.bench.report import into_page, report
from tests.bench.results import Figure, Results
from tests.bench.steady import latencies, summary
from tests.services import Kafka, Postgres

PART = "a part"


def measured(**values: list[float]) -> Results:
    """Return results in which each contender has these values of `rows/s`, one a run."""
    results = Results()
    for contender, of_runs in values.items():
        for value in of_runs:
            results.add(PART, contender, {"rows/s": value})
    return results


def test_one_wild_run_does_not_move_the_median() -> None:
    """A figure is the median of its runs, and what could not be measured is no zero."""
    results = measured(ours=[100.0, 5.0, 110.0, float("nan")])
    assert results.median(Figure(PART, "ours", "rows/s")) == 100.0
    assert results.median(Figure(PART, "theirs", "rows/s")) is None
    assert results.runs(PART) == 3


@pytest.mark.parametrize(
    ("at_least", "bar", "passed"), [(True, 3.0, True), (True, 3.1, False), (False, 3.0, True), (False, 2.9, False)]
)
def test_a_bar_is_passed_where_it_is_reached(*, at_least: bool, bar: float, passed: bool) -> None:
    """A ratio of medians is compared with the least or the most that it may be; the bar itself is enough."""
    of_rates = ratio(median(PART, "ours", "rows/s"), median(PART, "theirs", "rows/s"))
    verdict = Bar("rate", of_rates, bar, at_least=at_least).verdict(measured(ours=[90.0], theirs=[30.0]))
    assert (verdict.measured, verdict.passed) == (3.0, passed)


@pytest.mark.parametrize(
    "missing",
    [
        ratio(median(PART, "ours", "rows/s"), median(PART, "nobody", "rows/s")),
        ratio(median(PART, "nobody", "rows/s"), median(PART, "ours", "rows/s")),
        largest(PART, "nobody", "rows/s"),
        spread(PART, "rows/s", ["ours", "nobody"]),
    ],
)
def test_what_was_not_measured_passes_no_bar(missing: Measured) -> None:
    """A peer that is missing leaves a bar open, neither passed nor failed."""
    verdict = Bar("rate", missing, 1.0, at_least=False).verdict(measured(ours=[90.0]))
    assert verdict.passed is None
    assert verdict.word == "not measured"


def test_the_spread_is_between_the_dearest_and_the_cheapest() -> None:
    """Growth is judged by the two contenders that lie furthest apart, each by its median."""
    everything = measured(a=[10.0], b=[11.0, 12.0, 99.0], c=[10.5])
    assert spread(PART, "rows/s", ["c", "b", "a"])(everything) == pytest.approx(1.2)


def test_what_must_never_be_is_judged_by_its_worst_run() -> None:
    """One lost row in one run of three is a lost row."""
    assert largest(PART, "ours", "rows/s")(measured(ours=[0.0, 1.0, 0.0])) == 1.0


def test_what_a_process_uses_to_start_is_not_counted_against_its_rows() -> None:
    """CPU a row begins with the first sample that shows a row."""
    samples = [Sample(at=1.0, done=200, cpu=5.0), Sample(at=2.0, done=1_000, cpu=5.7)]
    assert cpu_per_row(samples, 5.8, 1_000) == pytest.approx(1_000)


def test_latencies_are_told_in_milliseconds() -> None:
    """Half are as quick as the median, and one in a hundred is slower than the 99th percentile."""
    found = summary([n * 1_000_000 for n in range(1, 1_002)], 1.0)
    assert (found.p50, found.p99, found.worst) == (501.0, 991.0, 1_001.0)


def test_parts_that_are_measured_one_by_one_add_up(tmp_path: Path) -> None:
    """Results are kept in a file; a part that is measured again takes the place of what it was."""
    results = measured(ours=[1.0])
    results.left_out["theirs"] = "needs java and mvn"
    results.save(tmp_path / "results.json")
    kept = Results.load(tmp_path / "results.json")
    assert kept.values(Figure(PART, "ours", "rows/s")) == [1.0]
    assert "- left out: theirs: needs java and mvn" in list(report(kept))
    kept.forget(PART)
    assert kept.parts == []


def test_every_bar_has_its_verdict_in_the_report() -> None:
    """The table of bars shows each of them, measured or not."""
    lines = "\n".join(report(Results()))
    assert all(bar.what in lines for bar in BARS)
    assert lines.count("not measured") == len(BARS)


def test_the_page_gets_what_was_measured_in_the_place_of_what_was_before() -> None:
    """What is around the two marks stays, and the page may be written again."""
    page = "before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n"
    once = into_page(page, measured(ours=[90.0]), {"bench-reading": "A backlog"})
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert "![A backlog](bench-reading.svg)" in once
    assert into_page(once, measured(ours=[90.0]), {"bench-reading": "A backlog"}) == once


def test_charts_show_what_was_measured() -> None:
    """A chart has a bar for each contender, and one of which nothing was measured is not drawn."""
    results = Results()
    for rate in (90_000.0, 110_000.0, 100_000.0):
        results.add(reading.PART, OUR_READER.name, {"rows/s": rate})
    drawn = charts(results)
    assert list(drawn) == ["bench-reading"]
    words = [element.text for element in ET.fromstring(drawn["bench-reading"]).iter() if element.text]  # noqa: S314 - our own
    assert {OUR_READER.name, "100,000"} <= set(words)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.125, "0.12"), (1.0, "1.00"), (44.4, "44.4"), (160_000.4, "160,000")]
)
def test_figures_have_three_digits_that_count(value: float, text: str) -> None:
    """Nothing is told more exactly than it was measured."""
    assert number(value) == text


@pytest.mark.slow
def test_the_bench_measures_this_connector(postgres: Postgres, durable_kafka: Kafka) -> None:
    """Reader and sink go through a tiny backlog, and every figure that the bars need is there."""
    # A sink's rate begins with the second of its batches.
    rows = Rows(2 * BATCH_ROWS + 1_000, a_transaction=100)
    with arena(postgres, durable_kafka, already=Rows(500)) as place:
        place.load(rows)
        of_reader = reading.figures_of(OUR_READER, place, rows)
        of_sink = storing.figures_of(OUR_SINK, place, rows)
    assert of_reader["rows/s"] > 0
    assert 0 < of_reader["start to first row, s"] < 60
    assert of_sink["rows/s"] > 0
    assert 10 < of_reader["peak MB"] < 500
    assert 10 < of_sink["peak MB"] < 500


@pytest.mark.slow
def test_the_bench_sees_each_row_of_a_steady_load(postgres: Postgres, durable_kafka: Kafka) -> None:
    """Rows are timed from their commit to a Kafka consumer, and into history."""
    with arena(postgres, durable_kafka) as place:
        processes = [OUR_READER.start(place), OUR_SINK.start(place)]
        try:
            found = latencies(place, 50, warm_up=1.0, seconds=2.0, in_history=True)
        finally:
            for process in processes:
                process.stop()
    assert found.p50 <= found.p99 <= found.worst
    with arena(postgres, durable_kafka) as place:
        process = OUR_READER.start(place)
        try:
            found = latencies(place, 50, warm_up=1.0, seconds=2.0, in_history=False)
        finally:
            process.stop()
    assert found.p50 <= found.p99 <= found.worst


@pytest.mark.slow
def test_the_bench_counts_what_a_kill_leaves_behind(postgres: Postgres, durable_kafka: Kafka) -> None:
    """A reader that is killed half-way and started again leaves nothing out."""
    with arena(postgres, durable_kafka) as place:
        place.load(Rows(2_000))
        found = crash.figures_of(OUR_READER._replace(most_rows=2_000), place, 2_000)
    assert found["missing on Kafka"] == 0


def test_growth_follows_from_the_size_of_the_backlog() -> None:
    """At the size that everything is compared on, the outbox holds ten million rows and the long backlog is three."""
    cases = growth.cases(Sizes())
    assert cases["a large outbox"].already == 10_000_000
    assert cases["a long backlog"].count == 3_000_000
    assert {label for labels in growth.DIMENSIONS.values() for label in labels} == {*cases, "3 sinks"}
    assert {rows.a_transaction for rows in cases.values()} == {1, 10, 100, 1_000, 10_000}
