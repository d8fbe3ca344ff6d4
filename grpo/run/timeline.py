"""Timeline of a step: one file of Chrome trace events per step, if `run.trace` is on.

Perfetto and chrome://tracing display them. Times are measured in the driver: the span of a sampler begins when its
requests are sent and ends when its last completion has arrived.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.types import Json


class Timeline:
    """Spans of the current step, by role: driver, samplers, rewards, learner. Thread-safe."""

    def __init__(self, folder: Path | None) -> None:
        """Start the clock. `folder`: folder of the files; None records nothing."""
        self._folder = folder
        self._events: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._origin = time.monotonic()

    @contextmanager
    def span(self, role: str, name: str, **details: Json) -> Iterator[None]:
        """Record the block as a span."""
        end = self.begin(role, name, **details)
        try:
            yield
        finally:
            end()

    def begin(self, role: str, name: str, **details: Json) -> Callable[[], None]:
        """Begin a span. The returned function ends it."""
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
        """Write the file of the step: the spans that ended since the last call."""
        if self._folder is None:
            return
        with self._lock:
            events, self._events = self._events, []
        self._folder.mkdir(exist_ok=True)
        events.sort(key=lambda event: event["ts"])
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        (self._folder / f"step-{step:06d}.json").write_text(text, encoding="utf-8")
