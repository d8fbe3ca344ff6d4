"""Pool of reward workers that can be killed: takes groups of completions, returns `Scored | Failed` for each.

One thread, the pump, serves all workers. A job is a few calls on completions of one group. A worker has one job at a
time and answers each call separately.

The deadline of a job's first call is measured from when the job was sent. The deadline of each later call is measured
from when the previous answer was read. The parent may read late when it is busy, but never early, and it reads once
more before it kills. So no call gets less than its time. A call that misses its deadline is killed with everything that
it has started. Only that call fails: the rest of its job goes to a fresh worker.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import pickle
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo.config import RewardConfig, part_names
from grpo.rewards.counts import Counted, Counter
from grpo.rewards.process import (
    START_S,
    Part,
    WorkerProcess,
    failed,
    parse_answer,
    parse_greeting,
    scrubbed,
    spec_of,
    withheld,
)
from grpo.types import NOTHING_LOGGED, Failed, FailureKind, Logged, Moment, Scored, UserError

MAX_FAILED_STARTS = 3
"""Consecutive failed starts that are retried, once the files have been loaded."""
CALLS_PER_JOB = 8
"""Small enough to spread a group of slow calls over the workers, large enough to keep message overhead low."""

ABSTAINED = Part(value=None)
"""Result of a reward for a row that it does not apply to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardItem:
    """One completion to be scored."""

    completion: str
    row: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]] | None
    """Chat turns of the prompt, or None."""
    info: Mapping[str, Any]
    """Keys: token_count, finish_reason, prompt (text), step."""
    dataset: str
    """Name of the row's data set. Rewards for other data sets abstain."""
    completion_ids: Sequence[int] | NDArray[np.int32] = ()
    """Sampled token ids."""
    moment: Moment = field(default_factory=Moment)
    """The same for every item of a group."""


@dataclass(slots=True, kw_only=True)
class _Group:
    """A submitted group, and the answers received so far."""

    future: Future[list[Scored | Failed]]
    context: bytes
    """Pickle of (row, messages, state), shared by all calls. It is made in the caller's thread, so that its errors are
    raised there."""
    inputs: list[tuple[str, dict[str, Any], list[int]]]
    """(completion, info, token ids if a reward receives them) of each item."""
    answers: list[dict[int, Part]]
    """For each reward: item -> part."""
    outcomes: dict[int, Scored | Failed]
    """item -> outcome, for the items that every reward has answered."""
    missing: int
    """Calls without an answer."""


@dataclass(slots=True, kw_only=True)
class _Job:
    group: _Group
    calls: deque[tuple[int, Sequence[int]]]
    """(reward, items) of the unanswered calls. The first one is running."""


@dataclass(slots=True, kw_only=True)
class _Worker:
    process: WorkerProcess
    since: float
    """When the running call, or loading, began."""
    ready: bool = False
    job: _Job | None = None


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
        self._environment, kept_back = scrubbed(os.environ, passed), withheld(os.environ, passed)
        self._specs = [
            spec_of(first + i, reward, file, source=sources[i] if sources else None, kept_back=kept_back)
            for i, (reward, file) in enumerate(zip(rewards, files, strict=True))
        ]
        self._gives_ids = any(reward.style == "trl" for reward in rewards)
        self._log_dir = log_dir
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._count = workers
        self._memory_gib = max(reward.memory_gib for reward in rewards)
        self._workers: dict[int, _Worker] = {}
        self._queue: deque[_Job] = deque()
        self._stopped: Exception | None = None
        """Reason why nothing can be submitted any more. Threads share it and the queue, under the lock."""
        self._lock = threading.Lock()
        self._closing = self._has_worked = False
        """`_has_worked`: the files have been loaded at least once."""
        self._failed_starts = 0
        self._counter = Counter()
        self._selector = selectors.DefaultSelector()
        self._wake_end, self._wake = socket.socketpair()
        for end in (self._wake_end, self._wake):
            end.setblocking(False)
        self._selector.register(self._wake_end, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._pump, name="rewards", daemon=True)
        self._thread.start()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]:
        """Score the completions of one group: items with the same row. Thread-safe.

        The future returns one outcome per item, in order.
        """
        future: Future[list[Scored | Failed]] = Future()
        if not items:
            future.set_result([])
            return future
        row, messages = items[0].row, items[0].messages
        if any(item.row is not row and item.row != row for item in items):
            raise ValueError("the items of one group must have one row")
        calls: list[tuple[int, Sequence[int]]] = []
        everyone = range(len(items))
        answers: list[dict[int, Part]] = []
        for reward, config in enumerate(self._rewards):
            asked = config.applies_to(items[0].dataset)
            answers.append({} if asked else dict.fromkeys(everyone, ABSTAINED))
            if not asked:
                continue
            calls += [(reward, everyone)] if config.style == "trl" else [(reward, (i,)) for i in everyone]
        group = _Group(
            future=future,
            context=pickle.dumps(
                (
                    dict(row),
                    None if messages is None else [dict(turn) for turn in messages],
                    items[0].moment.trainer_state(),
                )
            ),
            inputs=[
                (item.completion, dict(item.info), np.asarray(item.completion_ids).tolist() if self._gives_ids else [])
                for item in items
            ],
            answers=answers,
            outcomes={},
            missing=len(calls),
        )
        if not calls:
            self._counter.add(scored=len(items), failed=len(items))
            future.set_result([self._outcome(group, i) for i in everyone])
            return future
        jobs = [
            _Job(group=group, calls=deque(calls[start : start + CALLS_PER_JOB]))
            for start in range(0, len(calls), CALLS_PER_JOB)
        ]
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._queue.extend(jobs)
        self._wake_up()
        return future

    def counts(self) -> Counted:
        """Return the counts so far, including running calls. Thread-safe."""
        now = time.monotonic()
        running = [
            (now - worker.since, tuple(job.calls))
            for worker in list(self._workers.values())
            if (job := worker.job) is not None
        ]
        return self._counter.read((self._names[calls[0][0]], seconds) for seconds, calls in running if calls)

    def close(self) -> None:
        """Kill every worker and cancel the futures that are not done. A second call does nothing."""
        if self._closing:
            return
        self._closing = True
        self._wake_up()
        self._thread.join()
        self._stop(RuntimeError("the reward pool is closed"), cancel=True)
        for worker in self._workers.values():
            worker.process.kill()
        self._workers.clear()
        self._selector.close()
        self._wake.close()
        self._wake_end.close()

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: wake-ups are already pending
            self._wake.send(b"x")

    # --- the pump's thread -------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        try:
            for number in range(self._count):
                self._start(number)
            while not self._closing:
                for key, events in self._selector.select(timeout=self._patience()):
                    if key.data is None:
                        self._wake_end.recv(4096)
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._flush(key.data)
                    if events & selectors.EVENT_READ:
                        self._receive(key.data)
                for number in list(self._workers):
                    self._watch(number)
                self._hand_out()
        except BaseException as error:  # raised again, after every waiting future has received it
            stopped = RuntimeError(f"the reward pool stopped: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            self._stop(stopped)
            raise

    def _limit(self, worker: _Worker) -> float | None:
        """Return the seconds that the worker's current work may take; None when it is idle."""
        if not worker.ready:
            return START_S
        return None if worker.job is None else self._rewards[worker.job.calls[0][0]].timeout_s

    def _patience(self) -> float:
        """Return the seconds until the next deadline, at most 1.

        A death that leaves the socket open is only found by polling.
        """
        now = time.monotonic()
        left = [w.since + limit - now for w in self._workers.values() if (limit := self._limit(w)) is not None]
        return max(0.0, min([*left, 1.0]))

    def _watch(self, number: int) -> None:
        """Handle a worker that has missed its deadline or died."""
        worker = self._workers[number]
        if not self._overdue(worker) and not worker.process.exited():
            return
        self._receive(number)  # an answer sent in time counts, however late it is read
        if self._workers.get(number) is not worker:
            return
        if worker.process.exited():
            self._lose(number, timed_out=False)
        elif self._overdue(worker):
            self._lose(number, timed_out=True)

    def _overdue(self, worker: _Worker) -> bool:
        limit = self._limit(worker)
        return limit is not None and time.monotonic() - worker.since > limit

    def _hand_out(self) -> None:
        for number, worker in self._workers.items():
            if not worker.ready or worker.job is not None:
                continue
            with self._lock:
                job = self._queue.popleft() if self._queue else None
            if job is None:
                return
            inputs = job.group.inputs
            calls = [(reward, [inputs[i] for i in items]) for reward, items in job.calls]
            worker.job, worker.since = job, time.monotonic()
            worker.process.send(pickle.dumps({"context": job.group.context, "calls": calls}))
            if worker.process.has_unsent:
                self._selector.modify(worker.process.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, number)

    def _flush(self, number: int) -> None:
        process = self._workers[number].process
        process.flush()
        if not process.has_unsent:
            self._selector.modify(process.socket, selectors.EVENT_READ, number)

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
                    reward, items = worker.job.calls[0]
                    parts, changed = parse_answer(line, self._names[reward], len(items))
                    self._answer(worker, worker.job, parts)
                    worker.job = worker.job if worker.job.calls else None
                    if changed is not None:  # its later answers are dropped and their calls repeated
                        return self._replace(number, f"{self._names[reward]} has changed {changed}")
                else:
                    raise ValueError("nothing was asked")
                worker.since = time.monotonic()
        except (ValueError, RecursionError):  # invalid: a reward function has written to the socket
            more = False
        if not more:
            self._lose(number, timed_out=False)

    def _answer(self, worker: _Worker, job: _Job, parts: Sequence[Part]) -> None:
        """Record the answer to the running call of the worker's `job`."""
        reward, items = job.calls.popleft()
        group = job.group
        scored = failed = 0
        for item, part in zip(items, parts, strict=True):
            before = [answers[item].value for answers in group.answers if item in answers]
            group.answers[reward][item] = part
            outcome: Scored | Failed | float | None = part.value
            if all(item in answers for answers in group.answers):
                scored += 1
                outcome = group.outcomes[item] = self._outcome(group, item)
            failed += isinstance(outcome, Failed) and not any(isinstance(value, Failed) for value in before)
        self._counter.add(scored=scored, failed=failed, seconds=time.monotonic() - worker.since)
        group.missing -= 1
        future = group.future
        if group.missing == 0 and not future.done() and future.set_running_or_notify_cancel():
            future.set_result([group.outcomes[i] for i in range(len(group.inputs))])

    def _outcome(self, group: _Group, item: int) -> Scored | Failed:
        """Return the weighted sum of the parts that did not abstain. Any failed part fails the rollout."""
        total = 0.0
        parts: dict[str, float] = {}
        own = [answers[item] for answers in group.answers]
        logged = NOTHING_LOGGED
        if any(part.logged is not NOTHING_LOGGED for part in own):
            logged = Logged(
                columns={name: value for part in own for name, value in part.logged.columns.items()},
                metrics={name: pair for part in own for name, pair in part.logged.metrics.items()},
            )
        for name, reward, part in zip(self._names, self._rewards, own, strict=True):
            if isinstance(part.value, Failed):
                return replace(part.value, logged=logged)
            if part.value is not None:
                total += reward.weight * part.value
                parts |= {name: part.value, **part.entries}
        if not parts:
            return Failed(kind="abstained", detail=f"{', '.join(self._names)}: returned None", logged=logged)
        if not isfinite(total):
            detail = f"the weighted sum of {', '.join(self._names)} is {total}"
            return Failed(kind="not_finite", detail=detail, logged=logged)
        return Scored(value=total, parts=parts, logged=logged)

    def _lose(self, number: int, *, timed_out: bool) -> None:
        """Replace a worker that died or must be killed: fail its running call and requeue the rest of its job."""
        worker = self._workers.pop(number)
        self._selector.unregister(worker.process.socket)
        ending = worker.process.kill(patience_s=0.0 if timed_out else 0.2)
        if self._stopped is not None:
            return  # a file did not load, and all waiting futures have failed
        if not worker.ready:
            self._failed_starts += 1
            if self._has_worked and self._failed_starts <= MAX_FAILED_STARTS:  # the files do load
                self._start(number)
                return
            ending = f"took longer than {START_S:g} s" if timed_out else ending
            log = self._log_dir / f"reward-worker-{number}.log"
            self._stop(UserError(f"the reward files did not load: a worker {ending}; its prints are in {log}"))
            return
        if worker.job is not None:
            reward, items = worker.job.calls[0]
            kind: FailureKind = "timeout" if timed_out else "worker_died"
            detail = (
                f"ran longer than {self._rewards[reward].timeout_s:g} s (timeout_s)"
                if timed_out
                else f"the worker {ending}"
            )
            self._answer(worker, worker.job, [Part(value=failed(self._names[reward], kind, detail))] * len(items))
        self._requeue(worker)
        self._start(number)

    def _replace(self, number: int, why: str) -> None:
        """Replace a worker whose surroundings a call has changed, so that a fresh one makes the next call."""
        worker = self._workers.pop(number)
        self._selector.unregister(worker.process.socket)
        worker.process.kill()
        with (self._log_dir / f"reward-worker-{number}.log").open("a", encoding="utf-8") as log:
            log.write(f"replaced: {why}\n")
        self._requeue(worker)
        self._start(number)

    def _requeue(self, worker: _Worker) -> None:
        if worker.job is not None and worker.job.calls:
            with self._lock:
                self._queue.appendleft(worker.job)

    def _start(self, number: int) -> None:
        process = WorkerProcess(
            self._specs,
            environment=self._environment,
            memory_gib=self._memory_gib,
            log=self._log_dir / f"reward-worker-{number}.log",
        )
        self._workers[number] = _Worker(process=process, since=time.monotonic())
        unsent = selectors.EVENT_WRITE if process.has_unsent else 0
        self._selector.register(process.socket, selectors.EVENT_READ | unsent, number)

    def _stop(self, error: Exception, *, cancel: bool = False) -> None:
        """Stop scoring for good: fail or cancel every waiting future. The first error is kept for later calls."""
        with self._lock:
            self._stopped = self._stopped or error
            jobs = [*self._queue, *(w.job for w in self._workers.values() if w.job is not None)]
            self._queue.clear()
        for future in {id(job.group): job.group.future for job in jobs}.values():
            if future.done() or (cancel and not future.cancel()):
                continue
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def locate(rewards: Sequence[RewardConfig], recipe: Path) -> list[Path]:
    """Find the files of `rewards`: in the working directory, else next to the recipe, else in the folder above it.

    Raises UserError naming the option and the file with the most similar name.
    """
    found = []
    for i, reward in enumerate(rewards):
        given = Path(reward.file).expanduser()
        places = [given] if given.is_absolute() else [given, recipe.parent / given, recipe.parent.parent / given]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            if any(place.is_dir() for place in places):
                raise UserError(f"rewards[{i}].file={reward.file} is a folder; it must be a Python file")
            nearby = {p.name: p for place in places if place.parent.is_dir() for p in place.parent.glob("*.py")}
            near = difflib.get_close_matches(given.name, nearby, n=1, cutoff=0.4)
            hint = f"; did you mean {nearby[near[0]]}?" if near else ""
            if recipe.name == "config.yaml":  # the copy in a run folder
                hint += "; go to the directory that the run was started in, or give another one with --reward FILE"
            raise UserError(f"rewards[{i}].file={reward.file} does not exist{hint}")
        found.append(path)
    return found
