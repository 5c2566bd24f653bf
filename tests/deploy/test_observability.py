"""The alert rules and the dashboard name what is there, and the rules fire when they should."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from connector.observability.metrics import Metrics, ReaderMetrics, SinkMetrics
from tests.deploy.dashboard import filled_in, metrics_in, model, panels
from tests.deploy.prometheus import OBSERVABILITY, program

RULES = OBSERVABILITY / "rules.yaml"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
GRID_WIDTH = 24
QUESTIONS = ["Is it working?", "How far behind?", "What is stuck?", "Why?"]


def alerts() -> list[dict[str, Any]]:
    """Return every alert of the rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def names_on_the_pages() -> set[str]:
    """Return every name of a sample that reader and sink may show."""
    names = set()
    for metrics in (ReaderMetrics(), SinkMetrics()):
        for family in _families(metrics):
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            names |= {family.name + suffix for suffix in suffixes}
    return names


def _families(metrics: Metrics) -> list[Any]:
    return list(metrics._registry.collect())


def promtool(*arguments: str, directory: Path = OBSERVABILITY) -> subprocess.CompletedProcess[str]:
    """Run promtool."""
    return subprocess.run(
        [program("promtool"), *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# --- rules -----------------------------------------------------------------------------------------------------------


def test_every_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on() -> None:
    """Severity, summary, description, and a runbook section that exists."""
    sections = anchors(OPERATIONS)
    for alert in alerts():
        assert alert["labels"]["severity"] in {"warning", "critical"}, alert["alert"]
        assert alert["annotations"]["summary"].endswith("."), alert["alert"]
        assert alert["annotations"]["description"].endswith("."), alert["alert"]
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert (page, anchor) == ("docs/operations.md", alert["alert"].lower())
        assert anchor in sections, f"docs/operations.md has no section {alert['alert']}"


def test_every_runbook_section_has_its_alert() -> None:
    """No section tells of an alert that cannot fire."""
    named = set(re.findall(r"^#+ (Outbox\w+)$", OPERATIONS.read_text(), re.MULTILINE))
    assert named == {alert["alert"] for alert in alerts()}


def test_rules_and_dashboard_name_only_metrics_that_a_process_shows() -> None:
    """A misspelt name would be an alert that never fires."""
    known = names_on_the_pages()
    for alert in alerts():
        assert metrics_in(alert["expr"]) <= known, alert["alert"]
    for panel in panels():
        for expression, _ in panel.queries:
            assert metrics_in(expression) <= known, panel.title


def test_promtool_accepts_rules_and_configuration() -> None:
    """Prometheus would load both."""
    for arguments in (("check", "rules", "rules.yaml"), ("check", "config", "prometheus.yml")):
        checked = promtool(*arguments)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    """The rule tests pass."""
    tested = promtool("test", "rules", "rules.test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_rule_tests_would_notice_any_alert_that_never_fires(tmp_path: Path) -> None:
    """With no alert left that fires, the tests of each of them fail."""
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = "vector(0) > 1"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "rules.test.yaml").write_text((OBSERVABILITY / "rules.test.yaml").read_text())
    tested = promtool("test", "rules", "rules.test.yaml", directory=tmp_path)
    failures = tested.stdout + tested.stderr
    assert tested.returncode != 0
    assert {alert["alert"] for alert in alerts() if alert["alert"] not in failures} == set()


# --- dashboard -------------------------------------------------------------------------------------------------------


def test_the_dashboard_asks_its_questions_from_top_to_bottom() -> None:
    """Is it working, how far behind, what is stuck, why."""
    rows = [panel for panel in model()["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in sorted(rows, key=lambda row: row["gridPos"]["y"])] == QUESTIONS


def test_every_panel_is_one_of_a_kind_and_says_what_it_shows() -> None:
    """Unique ids; each panel has a title, a description, a unit, and targets of the dashboard's own data source."""
    dashboard = model()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "pipeline": "query"}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert references, panel["title"]
        assert len(references) == len(set(references)), panel["title"]
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        for expression, _ in ((target["expr"], target["refId"]) for target in panel["targets"]):
            assert filled_in(expression, "5m").count("(") == expression.count(")"), panel["title"]


def test_panels_fill_the_grid_without_lying_on_each_other() -> None:
    """Every panel is inside of the grid's 24 columns, and no two share a cell."""
    cells: dict[tuple[int, int], str] = {}
    for panel in model()["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= GRID_WIDTH, panel["title"]
        assert grid["w"] > 0 < grid["h"], panel["title"]
        for cell in itertools.product(range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])):
            assert cell not in cells, f"{panel['title']} lies on {cells.get(cell)}"
            cells[cell] = panel["title"]
    depth = max(y for _, y in cells) + 1
    assert len(cells) == depth * GRID_WIDTH, "there is a hole in the grid"


def test_grafana_finds_the_dashboard_and_prometheus_where_it_is_told_to() -> None:
    """Both provisioning files are of version 1 of their format and name what they provide."""
    provisioning = OBSERVABILITY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    providers = yaml.safe_load((provisioning / "dashboards" / "outbox-connector.yaml").read_text())
    assert sources["apiVersion"] == providers["apiVersion"] == 1
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    assert [provider["type"] for provider in providers["providers"]] == ["file"]
