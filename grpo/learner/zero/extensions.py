"""Builds of DeepSpeed's C++ extensions, one process at a time, also after one that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch.utils import cpp_extension


@contextmanager
def sole_build(name: str) -> Iterator[None]:
    """Run the block, in which DeepSpeed builds or loads the extension `name`, in one process at a time.

    torch marks a build in progress by a file, for whose removal every other build waits without a limit. A build that
    is killed leaves the file behind. It is removed here if no process has it open.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with (folder / "grpo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with its process, unlike torch's file
        marker = folder / "lock"
        if marker.exists() and not _is_open(marker):
            logging.getLogger(__name__).warning("%s is left from a build that was killed; it is removed", marker)
            marker.unlink(missing_ok=True)
        yield


def _is_open(file: Path) -> bool:
    """Return whether a process of this user has `file` open, as torch has while it builds."""
    path = str(file.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or belongs to another user
            if any(opened.path == path for opened in process.open_files()):
                return True
    return False
