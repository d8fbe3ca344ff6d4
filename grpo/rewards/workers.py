"""The worker processes of a reward pool: start, give a job, take out. Only the pump changes them."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from grpo.rewards.child.loading import Spec
from grpo.rewards.groups import Job
from grpo.rewards.process import START_S, WorkerProcess


@dataclass(slots=True, kw_only=True)
class Worker:
    """A started worker and its current work."""

    process: WorkerProcess
    since: float
    """When the running call, or loading, began."""
    ready: bool = False
    """It has loaded the reward files."""
    job: Job | None = None

    def limit_s(self) -> float | None:
        """Return the seconds that the current work may take; None when idle."""
        if not self.ready:
            return START_S
        return None if self.job is None else self.job.timeout_s

    def overdue(self) -> bool:
        limit = self.limit_s()
        return limit is not None and time.monotonic() - self.since > limit


class Workers:
    """The workers by number. Their sockets are registered with `selector`, with the number as data."""

    def __init__(
        self, specs: Sequence[Spec], *, environment: Mapping[str, str], memory_gib: float, log_dir: Path
    ) -> None:
        self._specs, self._environment, self._memory_gib = specs, environment, memory_gib
        self._log_dir = log_dir
        self.selector = selectors.DefaultSelector()
        self._started: dict[int, Worker] = {}

    def __getitem__(self, number: int) -> Worker:
        return self._started[number]

    def get(self, number: int) -> Worker | None:
        return self._started.get(number)

    def numbered(self) -> list[tuple[int, Worker]]:
        """Return the numbers and the workers. Thread-safe."""
        return list(self._started.items())

    def jobs(self) -> Iterator[tuple[Worker, Job]]:
        """Yield the workers that have a job, and their jobs. Thread-safe."""
        for worker in list(self._started.values()):
            if (job := worker.job) is not None:
                yield worker, job

    def deadline_s(self) -> float:
        """Return the seconds until the next deadline of a worker: 0 if it has passed, infinity if all are idle."""
        now, started = time.monotonic(), self._started.values()
        return max(
            0.0, min((w.since + limit - now for w in started if (limit := w.limit_s()) is not None), default=inf)
        )

    def log(self, number: int) -> Path:
        """Return the file that a worker's output is appended to."""
        return self._log_dir / f"reward-worker-{number}.log"

    def start(self, number: int) -> None:
        process = WorkerProcess(
            self._specs, environment=self._environment, memory_gib=self._memory_gib, log=self.log(number)
        )
        self._started[number] = Worker(process=process, since=time.monotonic())
        unsent = selectors.EVENT_WRITE if process.has_unsent else 0
        self.selector.register(process.socket, selectors.EVENT_READ | unsent, number)

    def take_out(self, number: int) -> Worker:
        """Remove a worker, which still has to be killed."""
        worker = self._started.pop(number)
        self.selector.unregister(worker.process.socket)
        return worker

    def give(self, number: int, job: Job) -> None:
        """Send a job to an idle worker."""
        worker = self._started[number]
        worker.job, worker.since = job, time.monotonic()
        worker.process.send(job.message())
        if worker.process.has_unsent:
            self.selector.modify(worker.process.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, number)

    def flush(self, number: int) -> None:
        """Send more of what a worker's socket has not accepted yet."""
        process = self._started[number].process
        process.flush()
        if not process.has_unsent:
            self.selector.modify(process.socket, selectors.EVENT_READ, number)

    def close(self) -> None:
        """Kill every worker and close the selector."""
        for worker in self._started.values():
            worker.process.kill()
        self._started.clear()
        self.selector.close()
