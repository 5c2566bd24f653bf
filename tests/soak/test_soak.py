"""The soak as a test, for as many minutes as SOAK_MINUTES says, from a seed that SOAK_SEED may give."""

from __future__ import annotations

import os
import secrets

import pytest

from tests.services import Kafka, Postgres
from tests.soak.__main__ import MESSAGES_A_MINUTE
from tests.soak.run import Options, soak

MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
SEED = int(os.environ.get("SOAK_SEED") or secrets.randbelow(1_000_000))
TIME_LIMIT = 60 * MINUTES + 400


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT)
def test_nothing_is_lost_doubled_reordered_or_stuck_whatever_happens(
    own_postgres: Postgres, durable_own_kafka: Kafka, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills, freezes, network faults, crashes of both services and a slot that is dropped leave every row settled."""
    with capsys.disabled():
        print(f"\nsoak: seed {SEED}, {MINUTES:g} minutes")  # noqa: T201 - to repeat a run that is stopped half-way
    options = Options(SEED, MINUTES, round(MINUTES * MESSAGES_A_MINUTE))
    report = soak(options, own_postgres, durable_own_kafka, say=print)
    assert report.passed, "\n".join(report.lines())
