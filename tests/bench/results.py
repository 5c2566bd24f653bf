"""What was measured, run by run, and its medians."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """One figure of one contender in one part of the bench."""

    part: str
    contender: str
    name: str


class Results:
    """Each figure's values, one a run, and who was left out and why."""

    def __init__(self) -> None:
        self._values: dict[Figure, list[float]] = {}
        self.left_out: dict[str, str] = {}
        self.conditions: dict[str, str] = {}

    def add(self, part: str, contender: str, figures: Mapping[str, float]) -> None:
        """Take the figures of one run; one that is no number is left out."""
        for name, value in figures.items():
            if math.isfinite(value):
                self._values.setdefault(Figure(part, contender, name), []).append(value)

    def forget(self, part: str) -> None:
        """Forget what was measured of a part, which is measured anew."""
        self._values = {figure: values for figure, values in self._values.items() if figure.part != part}

    def values(self, figure: Figure) -> list[float]:
        """Return a figure's values, in the order of the runs."""
        return self._values.get(figure, [])

    def median(self, figure: Figure) -> float | None:
        """Return a figure's median, or None where it was not measured."""
        values = self.values(figure)
        return statistics.median(values) if values else None

    def contenders(self, part: str) -> list[str]:
        """Return who took part, in the order in which they did."""
        return list(dict.fromkeys(figure.contender for figure in self._values if figure.part == part))

    def names(self, part: str) -> list[str]:
        """Return the figures of a part."""
        return list(dict.fromkeys(figure.name for figure in self._values if figure.part == part))

    @property
    def parts(self) -> list[str]:
        """Which parts were measured."""
        return list(dict.fromkeys(figure.part for figure in self._values))

    def runs(self, part: str) -> int:
        """Return how many runs of a part there were at least."""
        return min((len(values) for figure, values in self._values.items() if figure.part == part), default=0)

    def save(self, path: Path) -> None:
        """Write everything to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [[*figure, values] for figure, values in self._values.items()]
        document = {"conditions": self.conditions, "left out": self.left_out, "values": values}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what was saved; nothing where there is no file."""
        results = cls()
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            results.conditions = document["conditions"]
            results.left_out = document["left out"]
            results._values = {Figure(*figure): values for *figure, values in document["values"]}
        return results
