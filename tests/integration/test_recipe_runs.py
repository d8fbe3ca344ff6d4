"""Every recipe and every YAML of the documentation: checked and run for two steps, real engines on the stand-in."""

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
from conftest import drawn
from documented import RECIPES, ROOT, blocks, completed

from grpo.config import Config, load

SCORE = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(len(solution_str) % 2), "seen": f"{data_source} {ground_truth}"}
"""
JUDGE = "def judge(completion, row):\n    return float(len(completion) % 2)\n"


def two_steps(recipe: Path, runs: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Run it as its documentation says; returns the run folder and the metrics."""
    folder = runs / f"stand_in_{recipe.stem}"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "stand_in.py"), str(recipe), f"run.dir={runs}"],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=environment | {"HF_HUB_OFFLINE": "1", "JUDGE_API_KEY": "none"},
    )  # fmt: skip
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in (folder / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["exit_reason"], summary["steps"]) == ("done", 2)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        assert all(math.isfinite(value) for name, value in line.items() if name != "time")
    for line in metrics[-2:]:
        assert line["reward/failed_fraction"] == 0
        assert line["mismatch/max"] < 1e-3
        assert line["optim/optimizer_steps"] > 0
    assert list((folder / "model").glob("*.safetensors"))
    return folder, metrics


AT_FULL = (
    "countdown_3b", "dapo_7b", "deepscaler_1.5b_8k", "deepscaler_1.5b_16k", "deepscaler_1.5b_24k", "gsm8k_qwen2.5_1.5b",
    "gsm8k_qwen2.5_7b", "math_simplerl_zoo_7b",
)  # fmt: skip
"""Each of these differs in sizes from one that the default suite runs, or in objectives that other tests run. `--full`
runs half of them, drawn by its seed."""


@pytest.mark.parametrize("name", [*(name for name in RECIPES if name not in AT_FULL), *drawn(AT_FULL, 4)])
def test_a_recipe_is_checked_and_runs_two_steps(name: str, tmp_path: Path) -> None:
    folder, metrics = two_steps(RECIPES[name], tmp_path)
    config = load(RECIPES[name], stand_in.overrides(RECIPES[name]))
    assert [line["step"] for line in metrics] == [0, 1, 2]
    for line in metrics[1:]:
        assert ("policy/kl_ref" in line) == (config.algorithm.kl_coef > 0)
        assert ("refill/attempts" in line) == (config.algorithm.max_refills > 0)
    assert max(line["optim/grad_norm"] for line in metrics[1:]) > 0
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-000001", "step-000002"}
    every_set_is_asked(config, folder)


def every_set_is_asked(config: Config, folder: Path) -> None:
    """Each training set is drawn from, each evaluation set is answered, and there is something to learn from."""

    def samples(name: str) -> Any:
        return pq.read_table(folder / "samples" / f"{name}.parquet").to_pandas()

    def names(table: Any) -> set[str]:
        return {prompt_id.rsplit(":", 2)[0] for prompt_id in table.prompt_id}

    steps = [samples(f"step-{step:06d}") for step in (1, 2)]
    assert names(steps[0]) == {train.name for train in config.data.train}
    assert any(table.reward.nunique() > 1 for table in steps)
    assert names(samples("eval-000000")) == {held_out.name for held_out in config.data.eval.sets}


BLOCKS = {str(block.id): str(block.values[0]) for block in blocks("yaml")}
"""The README's first one is run in the default suite, and half of the others, drawn by its seed, with `--full`."""


@pytest.mark.parametrize("block", [next(iter(BLOCKS)), *drawn([*BLOCKS][1:], len(BLOCKS) // 2)])
def test_a_yaml_of_the_documentation_is_checked_and_runs_two_steps(block: str, tmp_path: Path) -> None:
    recipe = completed(BLOCKS[block], tmp_path)
    [polite] = {str(python.values[0]) for python in blocks("python") if "def polite" in str(python.values[0])}
    (tmp_path / "my_rewards.py").write_text(polite)
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "my_score.py").write_text(SCORE)
    two_steps(recipe, tmp_path)


@pytest.mark.slow
def test_the_tiny_model_of_the_documentation_learns_its_task(tmp_path: Path) -> None:
    """Its script and its command as they are printed, in an empty folder, for fewer steps."""
    page = (ROOT / "docs" / "train.md").read_text().partition("## A tiny model of your own")[2]
    script, command = page.split("```python\n")[1].split("```")[0], page.split("```bash\n")[1].split("```")[0]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=300, check=True)
    command = command.replace("grpo train", f"{sys.executable} -m grpo train").replace("run.steps=40", "run.steps=15")
    done = subprocess.run(
        ["bash", "-c", f"{command.rstrip()} run.dir=runs run.name=a"], cwd=tmp_path, env=environment, timeout=600,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "overlap" not in done.stdout
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert summary["warnings"] == []
    assert 0.1 < summary["accuracy_before"] < 0.9
    assert summary["accuracy_after"] > summary["accuracy_before"]
