"""The dashboard as a value: its panels, their places and their queries."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.deploy.prometheus import OBSERVABILITY


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel, or the title of a row of them.

    `place` is x, y, width and height in the grid; `queries` are its expressions with their legends;
    `words` stand for values.
    """

    title: str
    kind: str
    unit: str
    place: tuple[int, int, int, int]
    queries: tuple[tuple[str, str], ...]
    words: Mapping[str, str]


def model() -> dict[str, Any]:
    """Return the dashboard's JSON."""
    return json.loads((OBSERVABILITY / "dashboard.json").read_text())  # type: ignore[no-any-return]


def panels() -> list[Panel]:
    """Return the panels and the titles of rows, from top to bottom."""
    found = []
    for panel in model()["panels"]:
        grid = panel["gridPos"]
        defaults = panel.get("fieldConfig", {}).get("defaults", {})
        mappings = [mapping["options"] for mapping in defaults.get("mappings", [])]
        found.append(
            Panel(
                title=panel["title"],
                kind=panel["type"],
                unit=defaults.get("unit", ""),
                place=(grid["x"], grid["y"], grid["w"], grid["h"]),
                queries=tuple((target["expr"], target["legendFormat"]) for target in panel.get("targets", [])),
                words={value: shown["text"] for options in mappings for value, shown in options.items()},
            )
        )
    return found


def filled_in(expression: str, window: str) -> str:
    """Return an expression as Grafana would send it, for all pipelines and with this range for rates."""
    filled = expression.replace("$__rate_interval", window).replace("$pipeline", ".*")
    assert "$" not in filled, f"a variable that this does not know: {expression}"
    return filled


def metrics_in(expression: str) -> set[str]:
    """Return the names of our metrics in an expression."""
    return set(re.findall(r"\boutbox_connector_\w+", expression))
