"""Reward worker: `python -P worker.py FD PARENT MEMORY_BYTES`, started by its reaper. It makes one call at a time, and
checks after each what the call has changed in its process.

The parent sends pickles, each preceded by its length, which it made from the rows of the data set. The worker answers
each call, in order, with one line of JSON. So the parent never unpickles data that a reward function touched. Each line
also signals that the next call begins, which starts that call's deadline.

This module and `grpo.rewards.child` import nothing heavy: a worker that is killed must be replaced in a fraction of a
second. It is started by its path and imports `grpo.rewards.child` from its own folder, whatever `sys.path` names.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from grpo.types import Unchecked

if __name__ == "__main__":  # empty packages: nothing else of this package is imported
    for _name, _folder in (("grpo", Path(__file__).parents[1]), ("grpo.rewards", Path(__file__).parent)):
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = [str(_folder)]

from grpo.rewards.child import calls, errors, loading

if __name__ == "__main__":  # a reward file that imports `grpo` finds what `sys.path` names
    for _name in [name for name in sys.modules if name.partition(".")[0] == "grpo"]:
        del sys.modules[_name]

PR_SET_PDEATHSIG = 1
FILE_BYTES = 1 << 28
"""Largest file that a reward function may write, in bytes."""
LOG_BYTES = 1 << 24
"""A log that has grown beyond this is truncated before the next call."""
HEADER_BYTES = 8
"""Size of the header: the length of the pickle that follows, little endian."""
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
LIMITS = (resource.RLIMIT_DATA, resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)
HANDLED = (signal.SIGALRM, signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


def main(fd: int, parent: int, memory_bytes: int) -> None:
    """Load the rewards of the first message, then answer calls until the driver closes the socket."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above, so no signal will come
        return
    for limit, value in (
        (resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))
    # Ray sends SIGTERM to every process of a job that it stops, but the current step must still be scored
    signal.signal(signal.SIGTERM, go_on)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    sys.path.append(os.getcwd())  # last: reward files may import from it, but it shadows no module
    os.set_inheritable(fd, False)  # a process that a reward function starts must not keep the socket open
    stream = os.fdopen(fd, "rb", closefd=False)
    try:
        rewards = [loading.load(spec) for spec in pickle.loads(receive(stream))]
    except loading.LoadError as error:
        return send(fd, {"load_error": str(error)})
    watched = Surroundings([sys.modules["__main__"], calls, errors, loading])
    own = os.getpid()
    send(fd, {"ready": True, "unfilled": [reward.unfilled for reward in rewards]})
    while message := receive(stream):
        job = pickle.loads(message)
        for reward, items in job["calls"]:
            cut_log()
            answer = calls.call(rewards[reward], job["context"], items)
            if os.getpid() != own:  # a fork made by the function: only the original may answer
                os._exit(0)
            if name := watched.changed():
                answer["changed"] = name
            send(fd, answer)


def go_on(number: int, frame: FrameType | None) -> None:
    """Do nothing: the driver handles this signal."""


def receive(stream: BinaryIO) -> bytes:
    """Return the next message; empty when the parent has closed the socket."""
    return stream.read(int.from_bytes(stream.read(HEADER_BYTES), "little"))


def send(fd: int, message: Mapping[str, Unchecked]) -> None:
    line = memoryview(json.dumps(message).encode() + b"\n")
    while line:
        line = line[os.write(fd, line) :]


def cut_log() -> None:
    """Truncate a log that exceeds LOG_BYTES. If a function has closed its output, `Surroundings` detects it."""
    with contextlib.suppress(OSError):
        if os.fstat(1).st_size > LOG_BYTES:
            os.ftruncate(1, 0)


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return -1


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class Surroundings:
    """State that a call could change for later calls, such as built-in names and functions of the standard library."""

    def __init__(self, own: Sequence[ModuleType]) -> None:
        """Record the state. `own`: modules of the worker, which are watched too."""
        watched = (builtins, json, math, os, pickle, random, re, signal, time)
        holders: tuple[ModuleType | type, ...] = (*watched, json.JSONDecoder, json.JSONEncoder, *own)
        self._modules = [(holder, dict(vars(holder))) for holder in holders]
        self._others = self._look()

    def changed(self) -> str | None:
        """Return the name of the first thing that has changed, or None. Additions to a module do not count."""
        for module, before in self._modules:
            now = vars(module)
            if now != before:  # comparing the dictionaries takes a microsecond
                for name, value in before.items():
                    if name not in ("_", "_runner") and now.get(name) is not value and now.get(name) != value:
                        return f"{module.__name__}.{name}"
        others = self._look()
        return next((name for name, value in self._others.items() if others[name] != value), None)

    def _look(self) -> dict[str, Unchecked]:
        return {
            "sys.stdout": sys.stdout,
            "sys.stderr": sys.stderr,
            "the working directory": os.getcwd(),
            "a timer": [signal.getitimer(timer) != (0.0, 0.0) for timer in TIMERS],
            "a limit": [resource.getrlimit(limit) for limit in LIMITS],
            "a signal's handler": [signal.getsignal(number) for number in HANDLED],
            "the recursion limit": sys.getrecursionlimit(),
            "a file of the prints": [_inode(fd) for fd in (1, 2)],
            "the processes, leaving some": _has_children(),
        }


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
