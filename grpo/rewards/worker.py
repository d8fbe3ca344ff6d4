"""Reward worker: `python -P worker.py FD PARENT MEMORY_BYTES`, started by its reaper. It makes one call at a time.

The parent sends pickles, each preceded by its length, which it made from the rows of the data set. The worker answers
each call, in order, with one line of JSON. So the parent never unpickles data that a reward function touched. Each line
also signals that the next call begins, which starts that call's deadline.

This module and `grpo.rewards.child` import nothing heavy: a worker that is killed must be replaced in a fraction of a
second. It is started by its path and imports `grpo.rewards.child` from its own folder, whatever `sys.path` names.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from grpo.types import Unchecked

if __name__ == "__main__":  # empty packages: nothing else of this package is imported
    for _name, _folder in (("grpo", Path(__file__).parents[1]), ("grpo.rewards", Path(__file__).parent)):
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = [str(_folder)]

from grpo.rewards.child import calls, errors, loading, log, results, surroundings

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
    watched = surroundings.Surroundings([sys.modules["__main__"], calls, errors, loading, log, results, surroundings])
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


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
