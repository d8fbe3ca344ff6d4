"""Checks that this machine can run the CUDA builds that the locks pin: its driver, and what Triton compiles with."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path

from grpo.types import UserError

DRIVER = 580
"""Oldest driver that CUDA 13 runs on (NVIDIA's table of minor-version compatibility)."""
LOADED_DRIVER = Path("/proc/driver/nvidia/version")
"""Version file of the loaded kernel module."""


def driver_of(text: str) -> int | None:
    """Return the major version in the text of LOADED_DRIVER; None if it has none."""
    found = re.search(r"\b(\d{3,4})\.\d+(?:\.\d+)?\b", text)
    return int(found[1]) if found else None


def check_machine(gpus: int, driver: Path = LOADED_DRIVER, headers: Path | None = None) -> None:
    """Check that engines can start on this machine's GPUs.

    Args:
        gpus: Number of GPUs that torch sees. The driver is checked only if there are none.
        headers: Folder of Python's C headers.

    Raises UserError saying what is missing, and how to get it.
    """
    if gpus == 0:
        check_driver(driver)
    compiler = os.environ.get("CC") or "gcc"
    if not any(shutil.which(name) for name in (compiler, "clang", "cc")):
        raise UserError(
            f"cluster.device=gpu: Triton compiles its kernels with a C compiler, and there is no {compiler} "
            "(on Debian and Ubuntu: apt install gcc)"
        )
    headers = headers or Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise UserError(
            f"cluster.device=gpu: Triton compiles its kernels with Python's headers, and {headers / 'Python.h'} is not "
            f"there (on Debian and Ubuntu: apt install python{sysconfig.get_python_version()}-dev)"
        )


def check_driver(driver: Path) -> None:
    """Raise UserError if the driver is the reason why torch sees no GPU."""
    if not driver.exists():
        raise UserError(
            f"cluster.device=gpu: no NVIDIA driver is loaded on this machine ({driver} does not exist); "
            "set cluster.address to use a Ray cluster with GPUs, or cluster.device=cpu"
        )
    version = driver_of(driver.read_text(errors="replace"))
    if version is None or version < DRIVER:
        raise UserError(
            f"cluster.device=gpu: the NVIDIA driver is version {version or 'unknown'}, and the CUDA 13 builds of torch "
            f"and vLLM need {DRIVER} or newer"
        )
