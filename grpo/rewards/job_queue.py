"""Jobs that wait for a worker of a reward pool."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from grpo.rewards.groups import Job


class JobQueue:
    """Thread-safe queue of the jobs that no worker has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._stopped: Exception | None = None
        """Reason why nothing can be submitted any more."""

    @property
    def stopped(self) -> bool:
        return self._stopped is not None

    def put(self, jobs: Sequence[Job]) -> None:
        """Add jobs. Raises the reason of `stop` once that has been called."""
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._jobs.extend(jobs)

    def put_back(self, job: Job) -> None:
        """Return a job, to be the next one that is taken."""
        with self._lock:
            self._jobs.appendleft(job)

    def take(self) -> Job | None:
        with self._lock:
            return self._jobs.popleft() if self._jobs else None

    def stop(self, error: Exception, running: Iterable[Job], *, cancel: bool = False) -> None:
        """Fail or cancel every waiting future for good, also those of the `running` jobs. The first error is kept for
        later calls of `put`."""
        with self._lock:
            self._stopped = self._stopped or error
            jobs = [*self._jobs, *running]
            self._jobs.clear()
        for future in {id(job.group): job.group.future for job in jobs}.values():
            if future.done() or (cancel and not future.cancel()):
                continue
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
