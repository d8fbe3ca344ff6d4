"""The thread of a reward pool: gives jobs to workers, reads their answers, and replaces workers.

The deadline of a job's first call is measured from when the job was sent. The deadline of each later call is measured
from when the previous answer was read. The parent may read late when it is busy, but never early, and it reads once
more before it kills. So no call gets less than its time. A call that misses its deadline is killed with everything that
it has started. Only that call fails: the rest of its job goes to a fresh worker.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Sequence

from grpo.rewards.counts import Counter
from grpo.rewards.job_queue import JobQueue
from grpo.rewards.process import START_S, Part, failed, parse_answer, parse_greeting
from grpo.rewards.workers import Worker, Workers
from grpo.types import FailureKind, UserError

MAX_FAILED_STARTS = 3
"""Consecutive failed starts that are retried, once the files have been loaded."""


class Pump:
    """Thread that serves the jobs of `queue` with `count` workers, and adds their calls to `counter`."""

    def __init__(self, workers: Workers, count: int, queue: JobQueue, counter: Counter) -> None:
        self._workers, self._count, self._queue, self._counter = workers, count, queue, counter
        self._closing = self._has_worked = False
        """`_has_worked`: the files have been loaded at least once."""
        self._failed_starts = 0
        self._wake_end, self._wake = socket.socketpair()
        for end in (self._wake_end, self._wake):
            end.setblocking(False)
        workers.selector.register(self._wake_end, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def wake_up(self) -> None:
        """Have the thread look at the queue. Thread-safe."""
        with contextlib.suppress(BlockingIOError):  # full: wake-ups are already pending
            self._wake.send(b"x")

    def close(self) -> None:
        """End the thread, kill every worker, and cancel the futures that are not done. A second call does nothing."""
        if self._closing:
            return
        self._closing = True
        self.wake_up()
        self._thread.join()
        self._stop(RuntimeError("the reward pool is closed"), cancel=True)
        self._workers.close()
        self._wake.close()
        self._wake_end.close()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for number in range(self._count):
                self._workers.start(number)
            while not self._closing:
                # at least once a second: a death that leaves the socket open is only found by polling
                for key, events in self._workers.selector.select(timeout=min(1.0, self._workers.deadline_s())):
                    if key.data is None:
                        self._wake_end.recv(4096)
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._workers.flush(key.data)
                    if events & selectors.EVENT_READ:
                        self._receive(key.data)
                for number, worker in self._workers.numbered():
                    self._watch(number, worker)
                self._hand_out()
        except BaseException as error:  # raised again, after every waiting future has received it
            stopped = RuntimeError(f"the reward pool stopped: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            self._stop(stopped)
            raise

    def _watch(self, number: int, worker: Worker) -> None:
        """Handle a worker that has missed its deadline or died."""
        if not worker.overdue() and not worker.process.exited():
            return
        self._receive(number)  # an answer sent in time counts, however late it is read
        if self._workers.get(number) is not worker:
            return
        if (exited := worker.process.exited()) or worker.overdue():
            self._lose(number, timed_out=not exited)

    def _hand_out(self) -> None:
        """Give each idle worker a job."""
        for number, worker in self._workers.numbered():
            if not worker.ready or worker.job is not None:
                continue
            job = self._queue.take()
            if job is None:
                return
            self._workers.give(number, job)

    def _receive(self, number: int) -> None:
        """Process what a worker has sent: any number of answers, or the end of its stream."""
        worker = self._workers[number]
        lines, more = worker.process.receive()
        try:
            for line in lines:
                if not worker.ready:
                    greeting = parse_greeting(line)
                    if greeting.error is not None:
                        self._stop(UserError(greeting.error))
                        break
                    worker.ready = self._has_worked = True
                    self._failed_starts = 0
                elif worker.job is not None:
                    name, (_, items) = worker.job.name, worker.job.running
                    parts, changed = parse_answer(line, name, len(items))
                    self._answer(worker, parts)
                    if changed is not None:  # its later answers are dropped and their calls repeated
                        return self._replace(number, f"{name} has changed {changed}")
                else:
                    raise ValueError("nothing was asked")
                worker.since = time.monotonic()
        except (ValueError, RecursionError):  # invalid: a reward function has written to the socket
            more = False
        if not more:
            self._lose(number, timed_out=False)

    def _answer(self, worker: Worker, parts: Sequence[Part]) -> None:
        """Record the answer to the running call of the worker's job. The worker has no job after the last one."""
        job = worker.job
        assert job is not None
        scored, failed = job.group.add(job.calls.popleft(), parts)
        self._counter.add(scored=scored, failed=failed, seconds=time.monotonic() - worker.since)
        if job.group.missing == 0:
            job.group.finish()
        if not job.calls:
            worker.job = None

    def _lose(self, number: int, *, timed_out: bool) -> None:
        """Replace a worker that died or must be killed: fail its running call and requeue the rest of its job."""
        worker = self._workers.take_out(number)
        ending = worker.process.kill(patience_s=0.0 if timed_out else 0.2)
        if self._queue.stopped:
            return  # a file did not load, and all waiting futures have failed
        if not worker.ready:
            self._failed_starts += 1
            if self._has_worked and self._failed_starts <= MAX_FAILED_STARTS:  # the files do load
                self._workers.start(number)
                return
            ending = f"took longer than {START_S:g} s" if timed_out else ending
            prints = self._workers.log(number)
            self._stop(UserError(f"the reward files did not load: a worker {ending}; its prints are in {prints}"))
            return
        if worker.job is not None:
            kind: FailureKind = "timeout" if timed_out else "worker_died"
            detail = f"ran longer than {worker.job.timeout_s:g} s (timeout_s)" if timed_out else f"the worker {ending}"
            part = Part(value=failed(worker.job.name, kind, detail))
            self._answer(worker, [part] * len(worker.job.running[1]))
        self._restart(number, worker)

    def _replace(self, number: int, why: str) -> None:
        """Replace a worker whose surroundings a call has changed, so that a fresh one makes the next call."""
        worker = self._workers.take_out(number)
        worker.process.kill()
        with self._workers.log(number).open("a", encoding="utf-8") as log:
            log.write(f"replaced: {why}\n")
        self._restart(number, worker)

    def _restart(self, number: int, ended: Worker) -> None:
        """Start a fresh worker in the place of one that has ended, and requeue the job that it left."""
        if ended.job is not None:
            self._queue.put_back(ended.job)
        self._workers.start(number)

    def _stop(self, error: Exception, *, cancel: bool = False) -> None:
        """Stop scoring for good: fail or cancel every waiting future. The first error is kept for later calls."""
        self._queue.stop(error, [job for _, job in self._workers.jobs()], cancel=cancel)
