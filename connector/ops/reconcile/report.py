"""What a reconciliation found, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from connector.ops.durations import written
from connector.ops.reconcile.damage import Damage, Sign
from connector.store.proofs import MOST_SAMPLES, Unproved, Verdict

GUIDE: Final = "docs/guides/prove.md"
_SHOWN_IN_TABLE: Final = 5


class Sample(NamedTuple):
    """One damaged message, by name."""

    outbox_id: int
    topic: str
    key: str
    status: str
    text: str
    signs: tuple[Sign, ...]


@dataclass(slots=True)
class Report:
    """Counts of damaged messages, samples of them, and `notes` of what is no damage, or cannot be proved."""

    checked: int = 0
    records: int = 0
    seconds: float = 0.0
    counts: dict[Damage, int] = field(default_factory=lambda: dict.fromkeys(Damage, 0))
    samples: dict[Damage, list[Sample]] = field(default_factory=lambda: {damage: [] for damage in Damage})
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no message is damaged."""
        return not any(self.counts.values())

    def add(self, damage: Damage, sample: Sample, most_samples: int) -> None:
        """Count a damaged message, and keep it as a sample if there is room."""
        self.counts[damage] += 1
        if len(self.samples[damage]) < most_samples:
            self.samples[damage].append(sample)

    def verdict(self, since: float | None) -> Verdict:
        """Return what is kept of it; `since` is how many seconds back it looked, None for all of them."""
        covers = f"{self.checked:,} messages"
        samples = [
            Unproved(sample.outbox_id, f"{damage}: {sample.text}")
            for damage, some in self.samples.items()
            for sample in some[: MOST_SAMPLES // len(Damage)]
        ]
        return Verdict(
            self.seconds,
            covers if since is None else f"{covers}, those of the last {written(since)}",
            sum(self.counts.values()),
            {str(damage): count for damage, count in self.counts.items() if count},
            samples,
        )


def as_json(report: Report) -> str:
    """Return the report as one line of JSON."""
    document: dict[str, Any] = {
        "ok": report.ok,
        "checked": report.checked,
        **{str(damage): count for damage, count in report.counts.items()},
        "samples": {
            str(damage): [sample._asdict() for sample in samples] for damage, samples in report.samples.items()
        },
    }
    return json.dumps(document, ensure_ascii=False)


def as_lines(report: Report) -> list[str]:
    """Return the report as a table of counts, and a line for each sample and note."""
    lines = [
        f"{report.checked:,} messages of the outbox, {report.records:,} in Kafka, compared in {report.seconds:.1f} s",
        "",
        f"{'':<11} {'count':>9}  samples",
    ]
    for damage, count in report.counts.items():
        ids = [f"#{sample.outbox_id}" for sample in report.samples[damage][:_SHOWN_IN_TABLE]]
        more = ["…"] if count > len(ids) else []
        lines.append(f"{damage:<11} {count:>9,}  {', '.join(ids + more)}".rstrip())
    samples = [(damage, sample) for damage, samples in report.samples.items() for sample in samples]
    if samples:
        lines.append("")
    lines += [
        f"{damage:<11} #{sample.outbox_id}  {sample.topic}  key {sample.key}: {sample.text}"
        for damage, sample in samples
    ]
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    verdict = "outbox, Kafka and history agree" if report.ok else f"NOT PROVED: what to do is in {GUIDE}"
    return [*lines, "", verdict]
