"""Groups in, `Scored | Failed` out: a pool of reward workers that can be killed.

One thread pumps all workers. A job is a few calls on completions of one group, and a worker has one job at a time. It
sends its answers every few milliseconds, so the time since the last ones is the running time of the call that it is in;
which call that is it keeps in shared memory. A call past its deadline is killed with its process group and fails alone:
what else was not answered goes to a fresh worker.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import mmap
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from grpo.config import RewardConfig
from grpo.types import Failed, FailureKind, Scored, UserError

CALLS_PER_JOB = 8
"""Small enough to spread a group of slow calls over the workers, large enough that messages cost little."""
START_S = 120.0
"""Deadline for a worker to load the reward files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardItem:
    """One completion to be scored."""

    completion: str
    row: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]] | None
    """Chat turns of the prompt, or None."""
    info: Mapping[str, Any]
    """token_count, finish_reason, prompt (text), step."""


@dataclass(slots=True)
class _Group:
    """The calls of one `submit`, as their answers come in."""

    future: Future[list[Scored | Failed]]
    values: list[list[float | Failed | None]]
    """[rewards][items]"""
    parts: list[dict[str, float]]
    missing: int


@dataclass(slots=True)
class _Job:
    group: _Group
    calls: deque[tuple[int, list[int]]]
    """(reward, items) still to be answered."""
    payload: dict[str, Any]
    handed_out: int = 0
    """Calls that the worker was given."""


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    begun: memoryview
    """[1] int64: position of the running call among those handed out; written by the worker."""
    since: float
    """When the running call, or the loading, began."""
    ready: bool = False
    job: _Job | None = field(default=None)


class RewardPool:
    """`workers` processes that have the reward files loaded. Close it, or use it as a context manager."""

    def __init__(self, rewards: Sequence[RewardConfig], *, files: Sequence[Path], workers: int, log_dir: Path) -> None:
        self._rewards = list(rewards)
        self._names = [part_name(reward) for reward in rewards]
        self._specs = [
            {"index": i, "file": str(file.resolve()), "shown": reward.file, "name": name, "style": reward.style}
            for i, (reward, file, name) in enumerate(zip(rewards, files, self._names, strict=True))
        ]
        self._log_dir = log_dir
        self._queue: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._closing = False
        self._broken: UserError | None = None
        self._workers: dict[int, _Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, wake_end = socket.socketpair()
        self._selector.register(wake_end, selectors.EVENT_READ, None)
        self._wake_end = wake_end
        self._count = workers
        self._thread = threading.Thread(target=self._pump, name="rewards", daemon=True)
        self._thread.start()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]:
        """Score the completions of one group. The future's list has one outcome per item, in order."""
        calls: list[tuple[int, list[int]]] = []
        for reward, config in enumerate(self._rewards):
            everyone = list(range(len(items)))
            calls += [(reward, everyone)] if config.style == "trl" else [(reward, [i]) for i in everyone]
        group = _Group(
            future=Future(),
            values=[[None] * len(items) for _ in self._rewards],
            parts=[{} for _ in items],
            missing=len(calls),
        )
        payload = {
            "row": pickle.dumps(dict(items[0].row)),
            "messages": items[0].messages,
            "completions": [item.completion for item in items],
            "infos": [dict(item.info) for item in items],
        }
        jobs = [
            _Job(group=group, calls=deque(calls[start : start + CALLS_PER_JOB]), payload=payload)
            for start in range(0, len(calls), CALLS_PER_JOB)
        ]
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._queue.extend(jobs)
        self._wake.send(b"x")
        return group.future

    def close(self) -> None:
        """Kill every worker. Futures that are not done are cancelled."""
        if self._closing:
            return
        self._closing = True
        self._wake.send(b"x")
        self._thread.join()
        for worker in list(self._workers.values()):
            self._remove(worker)
        with self._lock:
            for job in self._queue:
                job.group.future.cancel()
            self._queue.clear()
        self._selector.close()
        self._wake.close()
        self._wake_end.close()

    # --- the pump's thread -------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        for number in range(self._count):
            self._start(number)
        while not self._closing:
            for key, _ in self._selector.select(timeout=self._patience()):
                if key.data is None:
                    self._wake_end.recv(4096)
                elif key.data in self._workers:
                    self._receive(key.data)
            for number, worker in list(self._workers.items()):
                limit = self._limit(worker)
                if limit is not None and time.monotonic() - worker.since > limit:
                    self._lose(number, "timeout", f"ran longer than {limit:g} s")
            self._hand_out()

    def _limit(self, worker: _Worker) -> float | None:
        """Seconds that what the worker is doing may take; None when it is idle."""
        if not worker.ready:
            return START_S
        if worker.job is None:
            return None
        return self._rewards[worker.job.calls[0][0]].timeout_s

    def _patience(self) -> float:
        """Seconds until the next deadline."""
        now = time.monotonic()
        left = [w.since + limit - now for w in self._workers.values() if (limit := self._limit(w)) is not None]
        return max(0.0, min([*left, 1.0]))

    def _hand_out(self) -> None:
        for number, worker in list(self._workers.items()):
            if worker.ready and worker.job is None:
                with self._lock:
                    job = self._queue.popleft() if self._queue else None
                if job is None:
                    return
                worker.job, worker.since = job, time.monotonic()
                job.handed_out, worker.begun[0] = len(job.calls), 0
                try:
                    worker.connection.send_bytes(pickle.dumps({**job.payload, "calls": list(job.calls)}))
                except OSError:
                    self._lose(number, "worker_died", "")

    def _receive(self, number: int) -> None:
        """Take what a worker has sent, which may be many answers."""
        worker = self._workers[number]
        try:
            while worker.connection.poll():
                message = json.loads(worker.connection.recv_bytes())
                worker.since = time.monotonic()
                if not worker.ready:
                    worker.ready = "load_error" not in message
                    if not worker.ready:
                        self._break(UserError(message["load_error"]))
                        return
                elif worker.job is not None:
                    for answer in message["answers"]:
                        self._answer(worker.job, answer)
                    if not worker.job.calls:
                        worker.job = None
        except (OSError, EOFError, ValueError):
            self._lose(number, "worker_died", "")

    def _answer(self, job: _Job, message: Mapping[str, Any]) -> None:
        """Enter the answer to the running call of `job`."""
        reward, items = job.calls.popleft()
        group, name = job.group, self._names[reward]
        for position, item in enumerate(items):
            if "failed" in message:
                kind, detail = message["failed"]
                group.values[reward][item] = Failed(kind=cast(FailureKind, kind), detail=f"{name}: {detail}")
            else:
                value = message["values"][position]
                group.values[reward][item] = None if value is None else float(value)
                extra = {f"{name}/{key}": float(v) for key, v in message["parts"][position].items()}
                group.parts[item] |= extra
        group.missing -= 1
        if group.missing == 0 and not group.future.cancelled():
            group.future.set_result([self._outcome(group, i) for i in range(len(group.parts))])

    def _outcome(self, group: _Group, item: int) -> Scored | Failed:
        """Weighted sum of the parts that did not abstain; any failed part fails the rollout."""
        values = [column[item] for column in group.values]
        for value in values:
            if isinstance(value, Failed):
                return value
        present = [
            (name, reward.weight, value)
            for name, reward, value in zip(self._names, self._rewards, values, strict=True)
            if isinstance(value, float)
        ]
        if not present:
            return Failed(kind="abstained", detail="every reward returned None")
        return Scored(
            value=sum(weight * value for _, weight, value in present),
            parts={name: value for name, _, value in present} | group.parts[item],
        )

    def _lose(self, number: int, kind: FailureKind, detail: str) -> None:
        """A worker died or is killed: fail the call that it was in, put the rest of its job back, start another."""
        worker = self._workers[number]
        job, ready = worker.job, worker.ready
        code = self._remove(worker)
        del self._workers[number]
        if self._closing:
            return
        if not ready:
            self._break(UserError(f"the reward files did not load: the worker {detail or described_exit(code)}"))
            return
        if job is not None:
            if kind == "worker_died":
                detail = f"the worker {described_exit(code)}"
            job.calls.rotate(-self._running(worker, job))
            self._answer(job, {"failed": [kind, detail]})
            if job.calls:
                with self._lock:
                    self._queue.appendleft(job)
        self._start(number)

    def _running(self, worker: _Worker, job: _Job) -> int:
        """Place of the running call among the unanswered ones; those before it were made, their answers are lost."""
        answered = job.handed_out - len(job.calls)
        return min(max(0, int(worker.begun[0]) - answered), len(job.calls) - 1)

    def _break(self, error: UserError) -> None:
        """The reward files do not load: nothing can ever be scored."""
        with self._lock:
            self._broken = self._broken or error
            error = self._broken
            waiting = [job.group.future for job in self._queue]
            self._queue.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        begun_fd = os.memfd_create("grpo-reward-call")
        os.ftruncate(begun_fd, 8)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        with (self._log_dir / f"reward-worker-{number}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "grpo.rewards.worker", *map(str, (theirs.fileno(), begun_fd, os.getpid()))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), begun_fd),
                start_new_session=True,  # its own process group: killed whole, and Ctrl-C does not reach it
            )
        theirs.close()
        begun = memoryview(mmap.mmap(begun_fd, 8)).cast("q")
        os.close(begun_fd)
        worker = _Worker(process=process, connection=Connection(ours.detach()), begun=begun, since=time.monotonic())
        self._workers[number] = worker
        self._selector.register(worker.connection.fileno(), selectors.EVENT_READ, number)
        try:
            worker.connection.send_bytes(pickle.dumps(self._specs))
        except OSError:
            return  # it is gone already; the selector will say so

    def _remove(self, worker: _Worker) -> int:
        """Kill a worker and everything it started. Returns its exit code."""
        self._selector.unregister(worker.connection.fileno())
        try:
            exited = worker.process.wait(timeout=0.05)  # let a death of its own be seen before ours
        except subprocess.TimeoutExpired:
            exited = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.connection.close()
        code = worker.process.wait()
        return code if exited is None else exited


def part_name(reward: RewardConfig) -> str:
    """The reward's name in parts and metrics, and its function's."""
    return reward.name or Path(reward.file).stem


def described_exit(code: int) -> str:
    """An exit code in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def locate(rewards: Sequence[RewardConfig], recipe: Path) -> list[Path]:
    """The files of `rewards`: from the working directory, else beside the recipe, else in the folder above it.

    Raises UserError naming the option and the nearest file.
    """
    found = []
    for i, reward in enumerate(rewards):
        given = Path(reward.file).expanduser()
        places = [given] if given.is_absolute() else [given, recipe.parent / given, recipe.parent.parent / given]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            nearby = {p.name: p for place in places if place.parent.is_dir() for p in place.parent.glob("*.py")}
            near = difflib.get_close_matches(given.name, nearby, n=1, cutoff=0.4)
            hint = f"; did you mean {nearby[near[0]]}?" if near else ""
            raise UserError(f"rewards[{i}].file={reward.file} does not exist{hint}")
        found.append(path)
    return found
