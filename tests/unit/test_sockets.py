"""Where Ray and vLLM put their sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo import sockets
from grpo.types import UserError


@pytest.fixture
def named() -> Iterator[dict[int, str]]:
    """Length -> a folder whose path is so long."""
    start = tempfile.mkdtemp(prefix="g", dir="/tmp")
    folders = {}
    for length in (23, 24, 90):
        folder = Path(start) / ("x" * (length - len(start) - 1))
        folder.mkdir()
        folders[length] = str(folder)
    yield folders
    shutil.rmtree(start)


def temporary(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", folder)


def test_the_folder_for_temporary_files_is_taken_where_sockets_fit(
    named: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """107 bytes of a socket's path, less 84 of /grpo-ray-xxxxxxxx/r/session_<time>_<pid>/sockets/plasma_store."""
    temporary(monkeypatch, named[23])
    assert sockets.socket_folder(sockets.RAY) == named[23]
    temporary(monkeypatch, named[24])
    assert sockets.socket_folder(sockets.RAY) == "/tmp"
    assert sockets.socket_folder(sockets.VLLM) == named[24]  # a UUID needs less


def test_a_long_one_is_left_for_a_short_one(named: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    temporary(monkeypatch, named[90])
    monkeypatch.setattr(sockets, "SHORT_FOLDERS", ("/nowhere", "/var/tmp"))
    assert sockets.socket_folder(sockets.RAY) == "/var/tmp"


def test_without_a_short_one_the_run_is_refused(named: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    temporary(monkeypatch, named[90])
    monkeypatch.setattr(sockets, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(UserError, match=f"TMPDIR: the path {named[90]} has 90 bytes, .* at most 23; .*/nowhere"):
        sockets.socket_folder(sockets.RAY)
