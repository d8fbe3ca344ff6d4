"""What a pool of reward workers has done so far and what it waits for: read by others while it works."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

SLOW_S = 10.0
"""A call that takes longer counts as slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The counts since the pool was made, and the call that has been running longest."""

    scored: int = 0
    """Completions with an outcome, the failed ones among them."""
    failed: int = 0
    """Completions that have failed, also where other rewards have yet to answer."""
    slow: int = 0
    """Calls that took longer than SLOW_S, those under way among them."""
    slowest: str = ""
    """The reward whose call has been running longest; "" where none runs."""
    slowest_s: float = 0.0

    def since(self, before: Counted) -> Counted:
        """Return what was added after `before`."""
        return Counted(
            scored=max(0, self.scored - before.scored), failed=max(0, self.failed - before.failed),
            slow=max(0, self.slow - before.slow), slowest=self.slowest, slowest_s=self.slowest_s,
        )  # fmt: skip


def total(counts: Iterable[Counted]) -> Counted:
    """Return the counts of several pools as one."""
    every = list(counts)
    longest = max(every, key=lambda one: one.slowest_s, default=Counted())
    return Counted(
        scored=sum(one.scored for one in every), failed=sum(one.failed for one in every),
        slow=sum(one.slow for one in every), slowest=longest.slowest, slowest_s=longest.slowest_s,
    )  # fmt: skip


class Counter:
    """Counts what one pool does; may be read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scored = self._failed = self._slow = 0

    def add(self, *, scored: int, failed: int, seconds: float = 0.0) -> None:
        """Enter a call: the completions that have their outcome by it, and those that have failed by it."""
        with self._lock:
            self._scored += scored
            self._failed += failed
            self._slow += seconds > SLOW_S

    def read(self, running: Iterable[tuple[str, float]]) -> Counted:
        """Return the counts; `running`: reward and seconds of the calls under way."""
        calls = list(running)
        name, seconds = max(calls, key=lambda call: call[1], default=("", 0.0))
        with self._lock:
            return Counted(
                scored=self._scored, failed=self._failed, slow=self._slow + sum(s > SLOW_S for _, s in calls),
                slowest=name, slowest_s=seconds,
            )  # fmt: skip
