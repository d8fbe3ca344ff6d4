"""Sweeper of a private Ray: `python -P sweeper.py FOLDER`. It outlives a killed driver and cleans up after it.

It waits until its standard input ends, which the kernel ensures however the driver dies. Then it kills every process
of the Ray session and removes the session folder. Ray's own agents would linger for a while.
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
"""Rounds of 0.2 s each before it gives up."""


def belonging(folder: str, spared: set[int]) -> list[int]:
    """Return the processes of the session: with MARK=folder in their environment, or with an open file in the folder.

    One condition alone is not enough: a process that sets its title, as Ray's do, may overwrite its environment.
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
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def main(folder: str) -> None:
    """Wait for the end of standard input, then sweep until two rounds in a row find nothing.

    A dying raylet may still start a process or write a file.
    """
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
