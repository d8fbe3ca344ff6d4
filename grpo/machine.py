"""Resources that this process may use. A scheduler or a container may grant less than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Return how many CPUs this process may use at once: those it is bound to, limited by its container's quota."""
    bound = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _folders("cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([bound, *(int(quota) for quota in quotas)]))


def usable_memory_gib() -> float:
    """Return the machine's memory in GiB, or the limit of this process's container or job if that is lower."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdigit():
                sizes.append(int(words[0]))
    return min(sizes) / 2**30


def _quota(folder: Path) -> float | None:
    """Return the CPU quota of a control group, in CPUs; None if it has none."""
    words = _words(folder / "cpu.max") or [
        *_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")
    ]  # fmt: skip
    if len(words) != 2 or not words[0].isdigit():  # "max", or -1
        return None
    return int(words[0]) / int(words[1])


def _folders(controller: str) -> list[Path]:
    """Return the folders of this process's control group and its ancestors, of cgroup versions 2 and 1."""
    folders = []
    for line in PROCESS.read_text().splitlines() if PROCESS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = CGROUP if controllers == "" else CGROUP / controller
            inner = root / path.lstrip("/")
            folders += [folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return folders


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
