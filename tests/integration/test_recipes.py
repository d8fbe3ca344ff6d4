"""Every recipe, checked and run for two steps with the real engines on the stand-in."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import stand_in

from grpo.config import Config, load

ROOT = Path(__file__).resolve().parents[2]
OWN = ("arithmetic_cpu", "arithmetic_objectives")
RECIPES = {p.stem: p for p in sorted((ROOT / "recipes").glob("*.yaml")) if p.stem not in OWN}


def samples_of(folder: Path, name: str) -> Any:
    return pq.read_table(folder / "samples" / f"{name}.parquet").to_pandas()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_checked_and_runs_two_steps(name: str, tmp_path: Path) -> None:
    recipe, folder = RECIPES[name], tmp_path / f"stand_in_{name}"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "stand_in.py"), str(recipe), f"run.dir={tmp_path}"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment,
    )  # fmt: skip
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in (folder / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs
    config = load(recipe, stand_in.overrides(recipe))
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (summary["exit_reason"], summary["steps"]) == ("done", 2)
    assert [line["step"] for line in metrics] == [0, 1, 2]
    every_set_is_asked(config, folder)
    for line in metrics[1:]:
        assert line["reward/failed_fraction"] == 0
        assert line["mismatch/max"] < 1e-3
        assert all(math.isfinite(value) for value in line.values())
        assert line["optim/optimizer_steps"] > 0
        assert line["optim/grad_norm"] > 0
        assert ("policy/kl_ref" in line) == (config.algorithm.kl_coef > 0)
        assert ("refill/attempts" in line) == (config.algorithm.max_refills > 0)
    if config.run.save_every:
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-000001", "step-000002"}
    assert list((folder / "model").glob("*.safetensors"))


def every_set_is_asked(config: Config, folder: Path) -> None:
    """Each training set is drawn from, each evaluation set is answered, and each reward gives a part."""
    steps = [samples_of(folder, f"step-{step:06d}") for step in (1, 2)]
    drawn = {prompt_id.rsplit(":", 2)[0] for table in steps for prompt_id in table.prompt_id}
    assert drawn == {train.name for train in config.data.train}
    assert any(table.reward.nunique() > 1 for table in steps)  # something to learn from
    asked = {prompt_id.rsplit(":", 2)[0] for prompt_id in samples_of(folder, "eval-000000").prompt_id}
    assert asked == {held_out.name for held_out in config.data.eval.sets}
