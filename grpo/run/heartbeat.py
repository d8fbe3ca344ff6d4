"""Heartbeat while the driver waits: every HEARTBEAT_S seconds, a line reports what is awaited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from grpo.rewards.counts import SLOW_S
from grpo.rollout.collect import SamplerGroup, Scorer
from grpo.run.timeline import Timeline

HEARTBEAT_S = 30.0
"""Seconds between two lines."""


class Heartbeat:
    """Calls `say` with a line every HEARTBEAT_S seconds while the context is active."""

    def __init__(self, line: Callable[[], str], say: Callable[[str], None]) -> None:
        """`line`: returns what is awaited now."""
        self._line, self._say = line, say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self._say(self._line())


def waiting(what: str, awaited: str, say: Callable[[str], None]) -> Heartbeat:
    """Return a heartbeat with the seconds since this call: `<what>: waiting for <awaited>; 42 s`."""
    started = time.monotonic()
    return Heartbeat(lambda: f"{what}: waiting for {awaited}; {time.monotonic() - started:.0f} s", say)


class Watch:
    """Observer of one `collect`: its heartbeat counts completions, and its timeline has the scoring as spans. A context
    manager."""

    def __init__(
        self,
        what: str,
        completions: int,
        *,
        sampler: SamplerGroup,
        scorer: Scorer,
        timeline: Timeline,
        say: Callable[[str], None],
    ) -> None:
        """Prepare the heartbeat.

        Args:
            what: Prefix of each line.
            completions: Number of completions that are requested.
        """
        self._what, self._completions = what, completions
        self._sampler, self._scorer, self._timeline = sampler, scorer, timeline
        self._sampled = self._submitted = 0
        self._started = time.monotonic()
        self._before = scorer.counts()
        self._heartbeat = Heartbeat(self.line, say)

    def __enter__(self) -> Watch:
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.__exit__()

    def sampled(self, completions: int) -> None:
        """Count completions that have arrived."""
        self._sampled += completions

    def submitted(self, completions: int) -> Callable[[], None]:
        """Count completions that are submitted for scoring, and begin their span. The returned function ends it."""
        self._submitted += completions
        return self._timeline.begin("rewards", "score", completions=completions)

    def line(self) -> str:
        """Return the heartbeat line: what is awaited now."""
        counted = self._scorer.counts().since(self._before)
        parts = []
        if self._sampled < self._completions:
            parts.append(f"sampling, {self._sampled} of {self._completions} completions")
            left = self._sampler.outstanding()
            slowest = max(left, key=left.__getitem__, default="")
            if len(left) > 1 and left[slowest]:
                parts.append(f"{slowest} has {left[slowest]} left")
        if counted.scored < self._submitted:
            parts.append(f"scoring, {counted.scored} of {self._submitted}")
            if counted.slowest:
                parts.append(f"reward {counted.slowest} slowest, {counted.slowest_s:.0f} s")
        if counted.slow:
            parts.append(f"{counted.slow} calls over {SLOW_S:g} s")
        if counted.failed:
            parts.append(f"{counted.failed} failed")
        return f"{self._what}: {'; '.join([*parts, f'{time.monotonic() - self._started:.0f} s'])}"
