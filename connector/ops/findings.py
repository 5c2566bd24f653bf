"""What a check of `doctor` finds: a level, what is so, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple


class Level(StrEnum):
    """How bad it is. Only a failure makes `doctor` fail; a skipped check could not be made."""

    OK = "ok"
    WARNING = "warning"
    FAIL = "fail"
    SKIPPED = "skipped"


class Verdict(NamedTuple):
    """The outcome of one check; `remedy` is empty where nothing is to be done."""

    level: Level
    text: str
    remedy: str = ""


class Finding(NamedTuple):
    """A verdict with the name of its check."""

    check: str
    level: Level
    text: str
    remedy: str = ""


def ok(text: str) -> Verdict:
    """Say that something is as it should be."""
    return Verdict(Level.OK, text)


def warning(text: str, remedy: str) -> Verdict:
    """Say that something works and yet should be looked at."""
    return Verdict(Level.WARNING, text, remedy)


def fail(text: str, remedy: str) -> Verdict:
    """Say that something does not work, or loses messages."""
    return Verdict(Level.FAIL, text, remedy)


def skipped(text: str) -> Verdict:
    """Say that something could not be checked."""
    return Verdict(Level.SKIPPED, text)


def serving(who: str, for_reader: str, for_sink: str) -> Verdict:
    """Tell which process an account may serve; each remedy says what it lacks for one, and is empty if nothing.

    One account for each process is the safest way to run, and the doctor runs as one of them: only one that may serve
    neither is a failure.
    """
    if not for_reader and not for_sink:
        return ok(f"{who} may serve reader and sink")
    if for_reader and for_sink:
        return fail(f"{who} may serve neither reader nor sink", f"{for_reader}; {for_sink}")
    served, other = ("sink", "reader") if for_reader else ("reader", "sink")
    return warning(f"{who} may serve the {served} only; fine if the {other} uses another", for_reader or for_sink)


def failed(findings: Iterable[Finding]) -> bool:
    """Tell whether any check failed."""
    return any(finding.level is Level.FAIL for finding in findings)


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """Return a line per finding, with its remedy, and a line of counts."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        level = "FAIL" if finding.level is Level.FAIL else str(finding.level)
        remedy = f" → {finding.remedy}" if finding.remedy else ""
        lines.append(f"{level:<7}  {finding.check:<{width}}  {finding.text}{remedy}")
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    words = [f"{counts[Level.OK]} ok", f"{counts[Level.WARNING]} to look at", f"{counts[Level.FAIL]} failed"]
    if counts[Level.SKIPPED]:
        words.append(f"{counts[Level.SKIPPED]} skipped")
    return [*lines, "", ", ".join(words)]


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as one JSON object."""
    return json.dumps(
        {"ok": not failed(findings), "checks": [finding._asdict() for finding in findings]},
        ensure_ascii=False,
        indent=2,
    )


def size(count: int) -> str:
    """Write a number of bytes as PostgreSQL does, in units of 1024."""
    if count < 0:
        return f"-{size(-count)}"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1024 and len(units) > 1:  # noqa: PLR2004 - the factor between two units
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value == int(value) or units[0] == "B" else f"{value:.1f} {units[0]}"


def listed(words: Iterable[str]) -> str:
    """Join words, sorted, for a sentence."""
    return ", ".join(sorted(words))
