"""What is said when a wait passes its deadline."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def test_a_deadline_shows_where_each_engine_hangs(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(make_model("qwen2"))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("stuck.py")), str(recipe), str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waited 3 s for the hang; the engines' last lines, with their stacks:\n--- stuck-0\n" in done.stdout
    frames = [line for line in done.stdout.splitlines() if " in somewhere_deep" in line or " in hang" in line]
    assert len(frames) == 2  # the innermost first
    assert "somewhere_deep" in frames[0]
    assert time.monotonic() - started < 60
