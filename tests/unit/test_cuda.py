"""What a run on this machine's GPUs needs, before an engine is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.cluster.cuda import check_machine, driver_of
from grpo.types import UserError

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs@U22)\nGCC version: 12.3.0\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Apr 1 00:00:00 UTC 2025\nGCC version:  gcc 13.2\n"


@pytest.mark.parametrize("text", [OPEN, CLOSED])
@pytest.mark.parametrize(("version", "major"), [("580.95.05", 580), ("575.57", 575), ("1000.10.01", 1000)])
def test_the_version_of_a_loaded_driver(text: str, version: str, major: int) -> None:
    assert driver_of(text.format(version)) == major


def test_a_text_without_a_version() -> None:
    assert driver_of("NVRM version: unknown\n") is None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which all is well: its folder, with `driver`, `include/Python.h` and `bin/gcc`."""
    (tmp_path / "driver").write_text(OPEN.format("580.65.06"))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def refusal(machine: Path) -> str:
    with pytest.raises(UserError) as refused:
        check_machine(0, machine / "driver", machine / "include")
    return str(refused.value)


def test_a_machine_that_has_all_passes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine(0, machine / "driver", machine / "include")
    (machine / "bin" / "gcc").rename(machine / "bin" / "own-cc")
    monkeypatch.setenv("CC", "own-cc")
    check_machine(0, machine / "driver", machine / "include")


def test_where_torch_sees_a_gpu_the_driver_is_not_asked(machine: Path) -> None:
    """In some containers and under WSL the driver's file is not there, and an older driver may have CUDA 13's parts."""
    (machine / "driver").unlink()
    check_machine(1, machine / "driver", machine / "include")


def test_what_is_missing_is_named_with_the_way_to_get_it(machine: Path) -> None:
    (machine / "include" / "Python.h").unlink()
    assert "Python.h is not there (on Debian and Ubuntu: apt install python3." in refusal(machine)
    (machine / "bin" / "gcc").unlink()
    assert "there is no gcc (on Debian and Ubuntu: apt install gcc)" in refusal(machine)
    (machine / "driver").write_text(CLOSED.format("570.124.06"))
    assert "is version 570, and the CUDA 13 builds of torch and vLLM need 580 or newer" in refusal(machine)
    (machine / "driver").unlink()
    assert "no NVIDIA driver is loaded on this machine" in refusal(machine)
