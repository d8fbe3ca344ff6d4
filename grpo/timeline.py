"""Who did what when in a step: a file of Chrome's trace events per step where `run.trace` is on.

Perfetto and chrome://tracing show them. Times are the driver's: a span of a sampler begins when it is asked and ends
when its last completion has come.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.rewards.counts import Counted
from grpo.rewards.pool import RewardItem
from grpo.rollouts import Scorer
from grpo.types import Failed, Scored


class Timeline:
    """Spans of the step under way, by role: driver, samplers, rewards, learner. Threads may add at once."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: where files go; None keeps nothing."""
        self._folder = folder
        self._events: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._origin = time.monotonic()

    @contextmanager
    def span(self, role: str, name: str, **details: Any) -> Iterator[None]:
        """What happens in the block."""
        end = self.begin(role, name, **details)
        try:
            yield
        finally:
            end()

    def begin(self, role: str, name: str, **details: Any) -> Callable[[], None]:
        """What ends when the returned function is called."""
        started = time.monotonic()

        def end() -> None:
            if self._folder is None:
                return
            event = {
                "name": name, "ph": "X", "pid": "grpo", "tid": role, "args": details,
                "ts": round(1e6 * (started - self._origin)), "dur": round(1e6 * (time.monotonic() - started)),
            }  # fmt: skip
            with self._lock:
                self._events.append(event)

        return end

    def write(self, step: int) -> None:
        """The step's file: what has ended since the last one."""
        if self._folder is None:
            return
        with self._lock:
            events, self._events = self._events, []
        self._folder.mkdir(exist_ok=True)
        events.sort(key=lambda event: event["ts"])
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        (self._folder / f"step-{step:06d}.json").write_text(text, encoding="utf-8")


class TimedScorer:
    """A scorer whose every call is a span."""

    def __init__(self, scorer: Scorer, timeline: Timeline) -> None:
        self._scorer, self._timeline = scorer, timeline

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]:
        end = self._timeline.begin("rewards", "score", completions=len(items))
        future = self._scorer.submit(items)
        future.add_done_callback(lambda _: end())
        return future

    def counts(self) -> Counted:
        return self._scorer.counts()
