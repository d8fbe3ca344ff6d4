"""`python -P sweeper.py FOLDER`: outlives a driver that is killed, and takes what is left of its private Ray down.

Waits until its standard input ends, which the kernel sees to however the driver dies. Then it kills every process of
the session and removes the session's folder. Ray's own agents would linger for a while.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "GRPO_RAY_SESSION"
ROUNDS = 50
"""Of a fifth of a second each, before it gives up."""


def belonging(folder: str, spared: set[int]) -> list[int]:
    """Processes of the session: with MARK=folder in their environment, or a file of the folder open.

    Either alone is not enough: a process that sets its title, as Ray's do, may write it over its environment.
    """
    wanted = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        try:
            in_environment = wanted in (entry / "environ").read_bytes().split(b"\0")
            if in_environment or any(os.readlink(fd).startswith(f"{folder}/") for fd in (entry / "fd").iterdir()):
                found.append(int(entry.name))
        except OSError:  # gone meanwhile, or not ours
            continue
    return found


def main(folder: str) -> None:
    """Wait, then sweep until nothing is found twice over: a dying raylet may still start something, or write a file."""
    spared = {os.getpid(), os.getppid()}  # the driver ends by itself, with its own exit code
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean = 0
    for _ in range(ROUNDS):
        found = belonging(folder, spared)
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        clean = 0 if found or Path(folder).exists() else clean + 1
        if clean == 2:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1])
