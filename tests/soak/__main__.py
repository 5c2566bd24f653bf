"""`python -m tests.soak --seed N --minutes M`: random faults against load, then the proof; exit 1 if it fails."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from dataclasses import asdict
from pathlib import Path

from connector.cli.signals import interrupt_on_signals
from connector.demo.embedded import scratch_directory
from tests.services.choice import Choice
from tests.services.kafka import Kafka, kafka_candidates
from tests.services.postgres import Postgres, postgres_candidates
from tests.soak.run import Options, soak

MESSAGES_A_MINUTE = 12_000


def main() -> int:
    """Run, print the result, and leave plot and numbers behind."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, help="repeat the run of this seed (default: a new one, printed)")
    parser.add_argument("--minutes", type=float, default=3.0, help="for so long faults come (default: 3)")
    parser.add_argument("--messages", type=int, help=f"to be written meanwhile (default: {MESSAGES_A_MINUTE} a minute)")
    parser.add_argument("--output", type=Path, default=Path("soak"), help="folder for plot, numbers and logs (soak)")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else secrets.randbelow(1_000_000)
    options = Options(seed, given.minutes, given.messages or round(given.minutes * MESSAGES_A_MINUTE))
    _say(f"seed {options.seed}, {options.minutes:g} minutes, {options.messages:,} messages")
    with scratch_directory() as directory:
        postgres: Choice[Postgres] = Choice("PostgreSQL", postgres_candidates(os.environ), directory)
        kafka: Choice[Kafka] = Choice("Kafka", kafka_candidates(os.environ), directory)
        try:
            report = soak(options, postgres.private(), kafka.private(), _say)
        finally:
            kafka.close()
            postgres.close()
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / f"soak-{seed}.svg").write_text(report.plot(), encoding="utf-8")
    numbers = {"options": asdict(options), "proof": asdict(report.proof), "faults": report.faults}
    (given.output / f"soak-{seed}.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    for line in report.lines():
        _say(line)
    return 0 if report.passed else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Or what it has written in a temporary folder, which is gigabytes, would outlive it.
    interrupt_on_signals()
    sys.exit(main())
