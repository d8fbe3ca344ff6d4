"""`python -m grpo.sweeper FOLDER`: outlives a driver that is killed, and takes what is left of its private Ray down.

Waits until its standard input ends, which the kernel sees to however the driver dies. Then it kills every process whose
environment carries the session's mark and removes the session's folder. Ray's own agents would linger for a while.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "GRPO_RAY_SESSION"


def marked(folder: str) -> list[int]:
    """Processes that were started with MARK=folder in their environment."""
    wanted = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # gone meanwhile, or not ours
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def main(folder: str) -> None:
    """Wait, then sweep; twice over, since a dying raylet may still start something."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for _ in range(3):
        for pid in marked(folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
