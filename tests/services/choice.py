"""Choosing a service: candidates in order of preference, each with the reason for it or against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pytest


class Service(Protocol):
    """A server that can be started, stopped, and named in a report."""

    kind: str

    def start(self) -> None:
        """Start it and wait until it answers; nothing if it runs."""

    def close(self) -> None:
        """Stop it for good; nothing if it is down."""


S = TypeVar("S", bound=Service)


@dataclass(frozen=True, slots=True)
class Candidate(Generic[S]):
    """One way to have a service; `make` takes a directory of its own, and is None if there is a reason against it."""

    name: str
    reason: str
    make: Callable[[Path], S] | None
    external: bool = False


class Choice(Generic[S]):
    """The candidates for one service, and the instances that were started from them."""

    def __init__(
        self, what: str, candidates: Sequence[Candidate[S]], directory: Path, *, lent: S | None = None
    ) -> None:
        """`lent` is shared already, with other processes, and somebody else's to stop."""
        self._lent = lent
        self._what = what
        self._candidates = candidates
        self._directory = directory
        self._shared: S | Exception | None = None
        self._private: S | None = None
        self._failed: set[str] = set()
        self.failures: list[str] = []

    def describe(self) -> str:
        """Tell which candidate is used and why, in one line."""
        against = [f"{c.name}: {c.reason}" for c in self._candidates if c.make is None]
        chosen = next((c for c in self._candidates if c.make is not None), None)
        if chosen is None:
            return f"{self._what}: none ({'; '.join(against)})"
        before = [f"{c.name}: {c.reason}" for c in self._candidates[: self._candidates.index(chosen)]]
        return f"{self._what}: {chosen.name} ({'; '.join([chosen.reason, *before])})"

    def shared(self) -> S:
        """Return the instance that all tests share, started at the first call; it must not be stopped by a test."""
        if self._lent is not None:
            return self._lent
        if self._shared is None:
            try:
                self._shared = self._start("shared", list(self._candidates))
            except RuntimeError as error:
                self._shared = error
        if isinstance(self._shared, Exception):
            pytest.fail(str(self._shared), pytrace=False)
        return self._shared

    def private(self) -> S:
        """Return an instance that the test may stop and kill, up and running.

        The test is skipped if there is only one that somebody else runs.
        """
        if self._private is None:
            try:
                self._private = self._start("private", [c for c in self._candidates if not c.external])
            except RuntimeError as error:
                if any(c.external for c in self._candidates):
                    pytest.skip(str(error))
                pytest.fail(str(error), pytrace=False)
        self._private.start()
        return self._private

    def close(self) -> None:
        """Stop what was started."""
        for service in (self._shared, self._private):
            if service is not None and not isinstance(service, Exception):
                service.close()

    def _start(self, purpose: str, candidates: Sequence[Candidate[S]]) -> S:
        for number, candidate in enumerate(candidates):
            if candidate.make is None or candidate.name in self._failed:
                continue
            service = candidate.make(self._directory / f"{self._what.lower()}-{purpose}-{number}")
            try:
                service.start()
            except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 (whatever is wrong with Docker or a download: try the next one)
                service.close()
                self._failed.add(candidate.name)
                self.failures.append(f"{self._what}: {candidate.name} did not start: {error}")
            else:
                return service
        reasons = [*self.failures, *(f"{c.name}: {c.reason}" for c in candidates if c.make is None)]
        raise RuntimeError(f"there is no {purpose} {self._what} to test with: {'; '.join(reasons)}")
