"""The time of a run over all its sessions."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from grpo.run.sessions import begin, end, wall_line
from grpo.types import UserError


def test_sessions_are_added_and_a_killed_one_counts_to_its_last_line(tmp_path: Path) -> None:
    assert end(tmp_path, begin(tmp_path, 2.0), 30.5) == [30.5]
    begin(tmp_path, 0.0)  # killed 40 seconds after this, when it had logged for 25
    [_, second] = json.loads((tmp_path / "sessions.json").read_text())
    assert second["seconds"] is None
    assert abs(second["began"] - time.time()) < 60
    (tmp_path / "log.txt").write_text("step 1/3\n")
    os.utime(tmp_path / "log.txt", (0, second["began"] + 25))
    assert end(tmp_path, begin(tmp_path, 0.0), 4.0) == [30.5, pytest.approx(25), 4.0]


def test_a_session_that_was_killed_before_it_logged_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("an earlier session\n")
    os.utime(tmp_path / "log.txt", (0, 1000))
    begin(tmp_path, 0.0)
    sessions = begin(tmp_path, 0.0)
    (tmp_path / "sessions.json").unlink()  # while the run works
    assert end(tmp_path, sessions, 4.0) == [0.0, 4.0]
    assert [one["seconds"] for one in json.loads((tmp_path / "sessions.json").read_text())] == [0.0, 4.0]


def test_a_session_begins_before_its_record(tmp_path: Path) -> None:
    before = time.time()
    begin(tmp_path, 50.0)
    [session] = json.loads((tmp_path / "sessions.json").read_text())
    assert before - 50 <= session["began"] <= time.time() - 50


@pytest.mark.parametrize("text", ["[", "[{}]", "7", '[{"began": "x", "seconds": 1}]'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sessions.json").write_text(text)
    with pytest.raises(UserError, match=r"sessions.json is damaged; remove it: the run then counts its seconds anew"):
        begin(tmp_path, 0.0)


def test_the_last_line() -> None:
    assert wall_line([812.4]) == "wall time 812 s"
    assert wall_line([1000.0, 587.6, 812.4]) == "wall time 812 s; 2400 s in 3 sessions"
