"""Reaper of one reward worker: `python -P reaper.py FD MEMORY_BYTES`, started by `grpo.rewards.process`.

The reaper starts the worker, stays its parent and is a child subreaper: Linux reparents orphans to the nearest
ancestor that is one. So every process that a reward function starts stays below the reaper, however it detaches
itself. The reaper kills all of them when the worker ends, when the driver dies or closes the pipe to the reaper's
standard input, or when a limit is exceeded. Once the reaper has exited, none of them is left.

It runs no user code. It exits as the worker did, or with one of the codes below.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
WORKER = str(Path(__file__).with_name("worker.py"))
LOOK_S = 0.2
"""Seconds between two checks of the limits."""
MAX_PROCESSES = 64
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TOO_MANY, TOO_LARGE = 90, 91
"""Exit codes: more than MAX_PROCESSES processes; more than MEMORY_BYTES in all of them combined."""


def main(fd: int, memory_bytes: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    worker = subprocess.Popen(
        # By path and with -P: another `grpo` or a `json.py` in the working directory is not imported.
        # -u: the output of a function that is killed is not lost in a buffer.
        [sys.executable, "-P", "-u", WORKER, str(fd), str(os.getpid()), str(memory_bytes)],
        stdin=subprocess.DEVNULL,
        pass_fds=(fd,),
        start_new_session=True,
    )
    os.close(fd)  # so that the parent sees the end of the stream when the worker ends
    ended = os.pidfd_open(worker.pid)
    over = 0
    while not over and not select.select([0, ended], [], [], LOOK_S)[0]:
        reap_orphans(worker.pid)
        over = passed(memory_bytes)
    code = kill_all(worker.pid)
    if over:
        os._exit(over)
    if code < 0:
        os.kill(os.getpid(), signal.SIGKILL if -code in IGNORED else -code)
    os._exit(code)


def passed(memory_bytes: int) -> int:
    """Return the exit code of the limit that the descendants of this process exceed, or 0."""
    below = descendants(os.getpid())
    if len(below) > MAX_PROCESSES:
        return TOO_MANY
    return TOO_LARGE if sum(map(resident, below)) > memory_bytes else 0


def reap_orphans(worker: int) -> None:
    """Reap adopted orphans that have ended. The worker itself is not reaped here."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (ended := os.waitid(os.P_ALL, 0, flags)) is not None and ended.si_pid != worker:
        os.waitpid(ended.si_pid, 0)


def descendants(pid: int) -> list[int]:
    """Return all descendants of `pid`, at any depth."""
    found: list[int] = []
    todo = [pid]
    while todo:
        try:
            tasks = list(Path(f"/proc/{todo.pop()}/task").iterdir())
            children = [int(text) for task in tasks for text in (task / "children").read_text().split()]
        except OSError:  # the process has ended
            continue
        found += children
        todo += children
    return found


def resident(pid: int) -> int:
    """Return the bytes of a process's resident memory that no file backs: anonymous and shared memory. Memory files
    that are not mapped are not counted."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(kib) * 1024 for kib in sizes)


def kill_all(worker: int) -> int:
    """Kill all descendants until none is left. Return the exit code of the worker, as subprocess reports it.

    Each process group is killed at once: a process that is being killed can no longer fork.
    """
    code, own = 0, os.getpgrp()
    groups = {worker}
    while True:
        below = descendants(os.getpid())
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                groups.add(os.getpgid(pid))
        for group in groups - {own}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
            while pid:
                if pid == worker:
                    code = os.waitstatus_to_exitcode(status)
                pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
