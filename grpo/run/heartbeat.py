"""Heartbeat while the driver waits: every HEARTBEAT_S seconds, a line reports what is awaited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from grpo.rewards.counts import SLOW_S, Counted
from grpo.rewards.groups import RewardItem
from grpo.rollout.collect import SamplerGroup, Scorer
from grpo.types import Failed, SampledBlock, SampleRequest, SamplingSettings, Scored

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
    """Wrapper around the samplers and the scorer of one `collect` that counts completions. A context manager."""

    def __init__(
        self, what: str, completions: int, *, sampler: SamplerGroup, scorer: Scorer, say: Callable[[str], None]
    ) -> None:
        """Prepare the heartbeat.

        Args:
            what: Prefix of each line.
            completions: Number of completions that are requested.
        """
        self._what, self._completions = what, completions
        self._sampler, self._scorer = sampler, scorer
        self._sampled = self._submitted = 0
        self._started = time.monotonic()
        self._before = scorer.counts()
        self._heartbeat = Heartbeat(self.line, say)

    def __enter__(self) -> Watch:
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.__exit__()

    def sample(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> Iterator[SampledBlock]:
        """Sample `requests` and count the completions."""
        for block in self._sampler.sample(requests, settings):
            self._sampled += len(block.lengths)
            yield block

    def outstanding(self) -> dict[str, int]:
        """Return the outstanding completions of the samplers."""
        return self._sampler.outstanding()

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]:
        """Score `items` and count them."""
        self._submitted += len(items)
        return self._scorer.submit(items)

    def counts(self) -> Counted:
        """Return the counts of the scorer."""
        return self._scorer.counts()

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
