"""A real Prometheus that watches processes of a test, and the questions to ask it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from connector.demo.embedded import free_port, spawn
from tests.services import eventually, eventually_none

OBSERVABILITY = Path(__file__).parents[2] / "deploy" / "observability"

EVERY = 0.5
"""Seconds between two scrapes, and between two evaluations of the rules."""

WINDOW = 6
"""Seconds that stand for every range of minutes, so that an alert need not be waited for that long."""


def program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`; skip the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(
            f"{name} is not installed (Debian: prometheus; or go build github.com/prometheus/prometheus/cmd/{name})"
        )
    return path


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: its labels, and its values by time, in seconds since 1970."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def is_told(self) -> bool:
        """Whether any of its values is a number."""
        return any(math.isfinite(value) for _, value in self.points)


class Prometheus:
    """Asks a running Prometheus."""

    def __init__(self, port: int) -> None:
        self._port = port

    def _ask(self, question: str, **arguments: object) -> Any:
        query = urlencode({name: value for name, value in arguments.items() if value is not None})
        with urlopen(f"http://127.0.0.1:{self._port}{question}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    @property
    def is_ready(self) -> bool:
        """Whether it answers."""
        with urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)

    def now(self, expression: str) -> list[Series]:
        """Return what an expression gives now; an error if it is none."""
        data = self._ask("/api/v1/query", query=expression)
        if data["resultType"] == "scalar":
            return [Series({}, [_point(data["result"])])]
        return [Series(series["metric"], [_point(series["value"])]) for series in data["result"]]

    def value(self, expression: str) -> float:
        """Return the one value of an expression; NaN where there is none."""
        series = self.now(expression)
        assert len(series) <= 1, f"{expression} has several values"
        return series[0].points[0][1] if series else math.nan

    def over(self, expression: str, start: float, end: float, step: float = EVERY) -> list[Series]:
        """Return what an expression gave between two times."""
        data = self._ask("/api/v1/query_range", query=expression, start=start, end=end, step=step)
        return [Series(series["metric"], [*map(_point, series["values"])]) for series in data["result"]]

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {series.labels["alertname"] for series in self.now('ALERTS{alertstate="firing"}')}

    def await_firing(self, *alerts: str, within: float = 45.0) -> None:
        """Wait until each of these alerts has fired since now; some end by themselves before others begin."""
        began = time.time()

        def missing() -> set[str]:
            fired = self.over('ALERTS{alertstate="firing"}', began, time.time())
            return set(alerts) - {series.labels["alertname"] for series in fired}

        eventually_none(missing, within=within, what=f"the firing of {', '.join(alerts)}")

    def await_over(self, *alerts: str, within: float = 45.0) -> None:
        """Wait until none of these alerts fires."""

        def still_firing() -> set[str]:
            return self.firing() & set(alerts)

        eventually_none(still_firing, within=within, what=f"the end of {', '.join(alerts)}")


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def hurried(rules: str) -> str:
    """Return rules for a test's hour of seconds: no alert waits, every range is `WINDOW`, and so is a proof's hour."""
    rules = re.sub(r"\[\d+m\]", f"[{WINDOW}s]", re.sub(r"\bfor: \d+m", "for: 0s", rules))
    return re.sub(r"(expr: time\(\) .* > )3600", rf"\g<1>{WINDOW}", rules)


@contextmanager
def watching(directory: Path, ports: Mapping[str, int]) -> Iterator[Prometheus]:
    """Run Prometheus on our own configuration and rules; `ports` are where the jobs' processes listen."""
    configuration = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    configuration["global"] = {
        "scrape_interval": f"{EVERY * 1000:.0f}ms",
        "evaluation_interval": f"{EVERY * 1000:.0f}ms",
    }
    for job in configuration["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    (directory / "rules.yaml").write_text(hurried((OBSERVABILITY / "rules.yaml").read_text()))
    port = free_port()
    with (directory / "log").open("wb") as log:
        process = spawn(
            [
                program("prometheus"),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=log.fileno(),
            env={},
            cwd=directory,
        )
    try:
        prometheus = Prometheus(port)
        eventually(lambda: prometheus.is_ready, within=30, what="Prometheus's answer", ignoring=(OSError,))
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
