"""The file by which torch marks a build: one that a killed build has left behind is removed, any other is respected."""

from __future__ import annotations

import select
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.learner.zero.extensions import sole_build

HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
"""As torch.utils.file_baton holds the file."""
BUILD = """
import sys
from grpo.learner.zero.extensions import sole_build
print("outside", flush=True)
with sole_build("some_op"):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    return tmp_path / "some_op" / "lock"


def test_the_file_of_a_killed_build_is_removed(marker: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(marker)], stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        with sole_build("some_op"):
            assert marker.exists()  # its process builds
        builder.kill()
    with sole_build("some_op"):
        assert not marker.exists()


def test_two_processes_build_one_after_the_other(marker: Path) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", BUILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as first:
        assert first.stdout is not None
        assert [first.stdout.readline() for _ in range(2)] == ["outside\n", "inside\n"]
        with start() as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "outside\n"
            assert select.select([second.stdout], [], [], 1) == ([], [], [])
            first.kill()  # the lock ends with its process
            assert second.stdout.readline() == "inside\n"
            second.kill()
