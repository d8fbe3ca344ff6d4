"""The Python face with real engines, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
EXECUTE = """
import asyncio, json, linecache, sys

async def execute():
    with open(sys.argv[1]) as file:
        notebook = json.load(file)
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            name = f"<cell {number}>"
            linecache.cache[name] = (0, None, cell["source"], name)
            exec(compile("".join(cell["source"]), name, "exec"), globals())

asyncio.run(execute())
print(json.dumps([str(run.path), run.accuracy, *(last[name].tolist() for name in ("reward", "completion", "gold"))]))
"""
"""Executes the cells of a notebook in order, as Jupyter does: in `__main__`, in a running event loop, with sources that
`inspect` can read."""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "steps"), [("failing", 2), ("twice", 2), ("interrupted", 6)])
def test_trainings_leave_the_process_as_it_was(
    mode: str, steps: int, make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(make_model("qwen2"), run={"steps": steps})
    command = [sys.executable, str(Path(__file__).with_name("python_process.py")), str(recipe), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.splitlines()[-1] == "as it was"


def test_the_notebook_runs(arithmetic: Path, tmp_path: Path) -> None:
    """In a folder that has the recipes, so that the run is not written into this one."""
    notebook = json.loads(NOTEBOOK.read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(sources) == 5
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    for name in ("recipes", "reward_fns"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    path, accuracy, rewards, completions, golds = json.loads(done.stdout.splitlines()[-1])
    assert path == str(tmp_path / "runs" / "arithmetic_cpu")
    assert 0 < accuracy < 1
    assert len(rewards) == 64 * 4
    for reward, completion, gold in zip(rewards, completions, golds, strict=True):
        text = completion.strip()
        right = sum(text[i : i + 1] == gold[i] for i in range(len(gold)))
        assert reward == right / max(len(text), len(gold))
