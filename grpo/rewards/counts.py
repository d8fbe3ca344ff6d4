"""Counts of the finished and running calls of a reward pool. Other threads read them while the pool works."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

SLOW_S = 10.0
"""A call that takes longer is counted as slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Counts since the pool was created, and the call that has been running longest."""

    scored: int = 0
    """Completions with an outcome, including the failed ones."""
    failed: int = 0
    """Completions that have failed, even if other rewards have not answered yet."""
    slow: int = 0
    """Calls that took longer than SLOW_S, including running ones."""
    slowest: str = ""
    """Reward whose call has been running longest; "" if none is running."""
    slowest_s: float = 0.0

    def since(self, before: Counted) -> Counted:
        """Return the counts added since `before`."""
        return Counted(
            scored=max(0, self.scored - before.scored), failed=max(0, self.failed - before.failed),
            slow=max(0, self.slow - before.slow), slowest=self.slowest, slowest_s=self.slowest_s,
        )  # fmt: skip


def total(counts: Iterable[Counted]) -> Counted:
    """Sum the counts of several pools, and keep the longest running call."""
    every = list(counts)
    longest = max(every, key=lambda one: one.slowest_s, default=Counted())
    return Counted(
        scored=sum(one.scored for one in every), failed=sum(one.failed for one in every),
        slow=sum(one.slow for one in every), slowest=longest.slowest, slowest_s=longest.slowest_s,
    )  # fmt: skip


class Counter:
    """Thread-safe counter of the calls of one pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scored = self._failed = self._slow = 0

    def add(self, *, scored: int, failed: int, seconds: float = 0.0) -> None:
        """Record a call that took `seconds`: the completions that it gave an outcome, and those that it made fail."""
        with self._lock:
            self._scored += scored
            self._failed += failed
            self._slow += seconds > SLOW_S

    def read(self, running: Iterable[tuple[str, float]]) -> Counted:
        """Return the counts. `running`: reward and elapsed seconds of each running call."""
        calls = list(running)
        name, seconds = max(calls, key=lambda call: call[1], default=("", 0.0))
        with self._lock:
            return Counted(
                scored=self._scored, failed=self._failed, slow=self._slow + sum(s > SLOW_S for _, s in calls),
                slowest=name, slowest_s=seconds,
            )  # fmt: skip
