"""Five hundred steps: what a run holds after the fiftieth it holds at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import write_spread

ROOT = Path(__file__).resolve().parents[2]
STEPS, SETTLED = 500, 50
GROWTH = 1.05

LAST_WORDS = """
import sys
from grpo.commands import cli
from grpo.cluster import engines
import ray
from ray._private.internal_api import memory_summary
close = engines.Engines.close
def closing(self):
    said = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    print("OBJECT STORE", said.replace("\\n", " | "), flush=True)
    close(self)
engines.Engines.close = closing
raise SystemExit(cli.main(sys.argv[1:]))
"""
"""`grpo` itself, which says what is in the object store before the engines go."""


def held(process: psutil.Process) -> dict[str, tuple[int, int]]:
    """Command -> (own resident bytes, open files) of the run's processes."""
    found = {}
    for p in [process, *process.children(recursive=True)]:
        try:
            memory = p.memory_info()
            found[f"{p.pid} {' '.join(p.cmdline())[-60:]}"] = (memory.rss - memory.shared, p.num_fds())
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_nothing_grows(tmp_path: Path, make_model: Callable[..., Path], make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe(
        make_model("qwen2"), run={"steps": STEPS, "save_every": 20}, learner={"zero_stage": 2}, cluster={"cpus": 4},
        rewards=[write_spread(tmp_path)],
    )  # fmt: skip
    metrics = recipe.parent / "runs" / "run" / "metrics.jsonl"
    with (recipe.parent / "console.txt").open("w") as console:
        process = subprocess.Popen(
            [sys.executable, "-c", LAST_WORDS, "train", str(recipe)],
            stdout=console, stderr=console, cwd=ROOT, env=os.environ,
        )  # fmt: skip
        seen: dict[int, dict[str, tuple[int, int]]] = {}
        while process.poll() is None:
            step = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            if step and step not in seen:
                seen[step] = held(psutil.Process(process.pid))
            time.sleep(0.5)
    said = (recipe.parent / "console.txt").read_text()
    assert process.returncode == 0, said[-3000:]
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == STEPS
    early = [found for step, found in seen.items() if SETTLED <= step < SETTLED + 50]
    late = [found for step, found in seen.items() if STEPS - 60 <= step < STEPS - 5]
    assert early
    assert late
    names = [name for name in early[0] if all(name in found for found in (*early, *late))]
    assert len(names) > 8  # driver, sampler, learner, reaper, worker, and Ray's own
    grown = []
    for name in names:
        before = max(found[name][0] for found in early), max(found[name][1] for found in early)
        after = min(found[name][0] for found in late), min(found[name][1] for found in late)
        print(f"{name!r}: {before[0] / 2**20:.1f} -> {after[0] / 2**20:.1f} MiB, {before[1]} -> {after[1]} files")
        if after[0] > GROWTH * before[0] + 2**20 or after[1] > before[1]:
            grown.append(name)
    assert grown == []
    [store] = [line for line in said.splitlines() if line.startswith("OBJECT STORE")]
    print(store)
    assert "Plasma memory usage 0 MiB, 0 objects" in store
