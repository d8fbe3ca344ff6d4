"""What a process may use of its machine: by the CPUs it is bound to and by the limits of its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo import machine
from grpo.machine import usable_cpus, usable_memory_gib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """group(lines, {file: text}) makes the files of control groups, and says which this process is in."""

    def make(lines: str, files: dict[str, str]) -> None:
        (tmp_path / "process").write_text(lines)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        monkeypatch.setattr(machine, "PROCESS", tmp_path / "process")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))

    return make


@pytest.mark.parametrize(
    ("lines", "files", "cpus", "gib"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n", "memory.max": f"{2**30}\n"}, 2, 1.0),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, 64, None),
        ("0::/job/step\n", {"job/cpu.max": "350000 100000\n", "job/step/memory.max": f"{2**29}\n"}, 3, 0.5),
        ("0::/job\n", {"job/cpu.max": "50000 100000\n"}, 1, None),
        (
            "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000",
             "memory/docker/x/memory.limit_in_bytes": f"{2**30}"},
            4,
            1.0,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64, None),
        ("", {}, 64, None),
    ],
)  # fmt: skip
def test_limits_of_control_groups(
    lines: str, files: dict[str, str], cpus: int, gib: float | None, group: Callable[..., None]
) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    group(lines, files)
    assert usable_cpus() == cpus
    assert usable_memory_gib() == (whole if gib is None else gib)


def test_a_process_bound_to_a_cpu_uses_that_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from grpo import machine as m; "
    code += "print(m.usable_cpus())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closing: str) -> None:
    command = f"{sys.executable} -m grpo options {closing}"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE).returncode == 0


def test_a_working_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    command = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m grpo options"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (
        2,
        "grpo: the working directory has been removed; change to one that exists\n",
    )
