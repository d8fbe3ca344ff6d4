"""Pool of reward workers that can be killed: takes groups of completions, returns `Scored | Failed` for each.

RewardPool  what other threads use: they submit groups and read the counts
Pump        the pool's thread: gives jobs to workers, reads their answers, enforces deadlines, replaces workers
JobQueue    jobs that wait for a worker
Workers     the started workers; only the pump changes them

A job is a few calls on completions of one group. A worker has one job at a time and answers each call separately.

The deadline of a job's first call is measured from when the job was sent. The deadline of each later call is measured
from when the previous answer was read. The parent may read late when it is busy, but never early, and it reads once
more before it kills. So no call gets less than its time. A call that misses its deadline is killed with everything that
it has started. Only that call fails: the rest of its job goes to a fresh worker.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from pathlib import Path

from grpo.config import RewardConfig, part_names
from grpo.rewards.child.loading import Spec
from grpo.rewards.counts import Counted, Counter
from grpo.rewards.groups import Job, Part, RewardItem, failed, make_group, parse_answer
from grpo.rewards.process import START_S, WorkerProcess, parse_greeting, scrubbed, spec_of, withheld
from grpo.types import Failed, FailureKind, Scored, UserError

MAX_FAILED_STARTS = 3
"""Consecutive failed starts that are retried, once the files have been loaded."""


class RewardPool:
    """Pool of `workers` processes that load the reward files. Close it, or use it as a context manager.

    If a file does not load, every future raises a UserError that says why.
    """

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        files: Sequence[Path],
        workers: int,
        log_dir: Path,
        sources: Sequence[bytes] = (),
        first: int = 0,
    ) -> None:
        """Start the workers.

        Args:
            sources: Contents of the files, if the files may be missing on this machine.
            first: Index of the first of `rewards` in the recipe.
        """
        self._rewards = list(rewards)
        self._names = part_names(rewards)
        # copied now: starting a child while another thread changes the environment may fail (EFAULT)
        passed = {name for reward in rewards for name in reward.env}
        environment, kept_back = scrubbed(os.environ, passed), withheld(os.environ, passed)
        specs = [
            spec_of(first + i, reward, file, source=sources[i] if sources else None, kept_back=kept_back)
            for i, (reward, file) in enumerate(zip(rewards, files, strict=True))
        ]
        log_dir.mkdir(parents=True, exist_ok=True)
        memory_gib = max(reward.memory_gib for reward in rewards)
        self._workers = Workers(specs, environment=environment, memory_gib=memory_gib, log_dir=log_dir)
        self._queue, self._counter = JobQueue(), Counter()
        self._pump = Pump(self._workers, workers, self._queue, self._counter)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]:
        """Score the completions of one group: items with the same row. Thread-safe.

        The future returns one outcome per item, in order.
        """
        if not items:
            nothing: Future[list[Scored | Failed]] = Future()
            nothing.set_result([])
            return nothing
        group, jobs = make_group(items, self._rewards, self._names)
        if jobs:
            self._queue.put(jobs)
            self._pump.wake_up()
        else:
            self._counter.add(scored=len(items), failed=len(items))
            group.future.set_result([group.outcome(i) for i in range(len(items))])
        return group.future

    def counts(self) -> Counted:
        """Return the counts so far, including running calls. Thread-safe."""
        now = time.monotonic()
        running = [(now - worker.since, tuple(job.calls)) for worker, job in self._workers.jobs()]
        return self._counter.read((self._names[calls[0][0]], seconds) for seconds, calls in running if calls)

    def close(self) -> None:
        """Kill every worker and cancel the futures that are not done. A second call does nothing."""
        self._pump.close()


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
                for worker in self._workers.started():
                    self._watch(worker)
                self._hand_out()
        except BaseException as error:  # raised again, after every waiting future has received it
            stopped = RuntimeError(f"the reward pool stopped: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            self._stop(stopped)
            raise

    def _watch(self, worker: Worker) -> None:
        """Handle a worker that has missed its deadline or died."""
        if worker.left_s() >= 0 and not worker.process.exited():
            return
        self._receive(worker)  # an answer sent in time counts, however late it is read
        if worker not in self._workers.started():
            return
        if (exited := worker.process.exited()) or worker.left_s() < 0:
            self._lose(worker, timed_out=not exited)

    def _hand_out(self) -> None:
        """Give each idle worker a job."""
        for worker in self._workers.started():
            if not worker.ready or worker.job is not None:
                continue
            job = self._queue.take()
            if job is None:
                return
            self._workers.give(worker, job)

    def _receive(self, worker: Worker) -> None:
        """Process what a worker has sent: any number of answers, or the end of its stream."""
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
                        return self._replace(worker, f"{name} has changed {changed}")
                else:
                    raise ValueError("nothing was asked")
                worker.since = time.monotonic()
        except (ValueError, RecursionError):  # invalid: a reward function has written to the socket
            more = False
        if not more:
            self._lose(worker, timed_out=False)

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

    def _lose(self, worker: Worker, *, timed_out: bool) -> None:
        """Replace a worker that died or must be killed: fail its running call and requeue the rest of its job."""
        self._workers.take_out(worker)
        ending = worker.process.kill(patience_s=0.0 if timed_out else 0.2)
        if self._queue.stopped is not None:
            return  # a file did not load, and all waiting futures have failed
        if not worker.ready:
            self._failed_starts += 1
            if self._has_worked and self._failed_starts <= MAX_FAILED_STARTS:  # the files do load
                self._workers.start(worker.number)
                return
            ending = f"took longer than {START_S:g} s" if timed_out else ending
            prints = self._workers.log(worker.number)
            return self._stop(
                UserError(f"the reward files did not load: a worker {ending}; its prints are in {prints}")
            )
        if worker.job is not None:
            kind: FailureKind = "timeout" if timed_out else "worker_died"
            detail = f"ran longer than {worker.job.timeout_s:g} s (timeout_s)" if timed_out else f"the worker {ending}"
            part = Part(value=failed(worker.job.name, kind, detail))
            self._answer(worker, [part] * len(worker.job.running[1]))
        self._restart(worker)

    def _replace(self, worker: Worker, why: str) -> None:
        """Replace a worker whose surroundings a call has changed, so that a fresh one makes the next call."""
        self._workers.take_out(worker)
        worker.process.kill()
        with self._workers.log(worker.number).open("a", encoding="utf-8") as log:
            log.write(f"replaced: {why}\n")
        self._restart(worker)

    def _restart(self, ended: Worker) -> None:
        """Start a fresh worker in the place of one that has ended, and requeue the job that it left."""
        if ended.job is not None:
            self._queue.put_back(ended.job)
        self._workers.start(ended.number)

    def _stop(self, error: Exception, *, cancel: bool = False) -> None:
        """Stop scoring for good: fail or cancel every waiting future. The first error is kept for later calls."""
        self._queue.stop(error, [job for _, job in self._workers.jobs()], cancel=cancel)


class JobQueue:
    """Thread-safe queue of the jobs that no worker has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self.stopped: Exception | None = None
        """Reason why nothing can be submitted any more."""

    def put(self, jobs: Sequence[Job]) -> None:
        """Add jobs. Raises the reason of `stop` once that has been called."""
        with self._lock:
            if self.stopped is not None:
                raise self.stopped
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
            self.stopped = self.stopped or error
            jobs = [*self._jobs, *running]
            self._jobs.clear()
        for future in {id(job.group): job.group.future for job in jobs}.values():
            if future.done() or (cancel and not future.cancel()):
                continue
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """A started worker and its current work."""

    number: int
    """Its place among the workers, which its replacement takes over."""
    process: WorkerProcess
    since: float
    """When the running call, or loading, began."""
    ready: bool = False
    """It has loaded the reward files."""
    job: Job | None = None

    def left_s(self) -> float:
        """Return the seconds until the current deadline: infinity when idle, negative once it has passed."""
        limit = START_S if not self.ready else inf if self.job is None else self.job.timeout_s
        return self.since + limit - time.monotonic()


class Workers:
    """The worker processes of a pool. Their sockets are registered with `selector`, with the worker as data."""

    def __init__(
        self, specs: Sequence[Spec], *, environment: Mapping[str, str], memory_gib: float, log_dir: Path
    ) -> None:
        self._specs, self._environment, self._memory_gib = specs, environment, memory_gib
        self._log_dir = log_dir
        self.selector = selectors.DefaultSelector()
        self._started: dict[int, Worker] = {}

    def started(self) -> list[Worker]:
        """Return the workers. Thread-safe."""
        return list(self._started.values())

    def jobs(self) -> Iterator[tuple[Worker, Job]]:
        """Yield the workers that have a job, and their jobs. Thread-safe."""
        for worker in self.started():
            if (job := worker.job) is not None:
                yield worker, job

    def deadline_s(self) -> float:
        """Return the seconds until the next deadline of a worker: 0 if it has passed, infinity if all are idle."""
        return max(0.0, min((worker.left_s() for worker in self._started.values()), default=inf))

    def log(self, number: int) -> Path:
        """Return the file that a worker's output is appended to."""
        return self._log_dir / f"reward-worker-{number}.log"

    def start(self, number: int) -> None:
        process = WorkerProcess(
            self._specs, environment=self._environment, memory_gib=self._memory_gib, log=self.log(number)
        )
        worker = self._started[number] = Worker(number=number, process=process, since=time.monotonic())
        unsent = selectors.EVENT_WRITE if process.has_unsent else 0
        self.selector.register(process.socket, selectors.EVENT_READ | unsent, worker)

    def take_out(self, worker: Worker) -> None:
        """Remove a worker, which still has to be killed."""
        del self._started[worker.number]
        self.selector.unregister(worker.process.socket)

    def give(self, worker: Worker, job: Job) -> None:
        """Send a job to an idle worker."""
        worker.job, worker.since = job, time.monotonic()
        worker.process.send(job.message())
        if worker.process.has_unsent:
            self.selector.modify(worker.process.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, worker)

    def flush(self, worker: Worker) -> None:
        """Send more of what a worker's socket has not accepted yet."""
        worker.process.flush()
        if not worker.process.has_unsent:
            self.selector.modify(worker.process.socket, selectors.EVENT_READ, worker)

    def close(self) -> None:
        """Kill every worker and close the selector."""
        for worker in self._started.values():
            worker.process.kill()
        self._started.clear()
        self.selector.close()
