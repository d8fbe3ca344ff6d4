"""Whole runs in bfloat16 on models of real width: what fails only beyond toy size fails here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in
from conftest import write_spread

ROOT = Path(__file__).resolve().parents[2]
SVAMP = ROOT.parent / "shared" / "data" / "svamp_test.jsonl"


def train(recipe: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run `grpo train`; returns the metrics of its steps."""
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "train", str(recipe), *overrides],
        capture_output=True, text=True, timeout=850, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("run folder "))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"]]


def held(metrics: list[dict[str, Any]]) -> None:
    """Sampler and learner are apart by rounding and no more, and something was learned from."""
    for line in metrics:
        assert 0 < line["sync/probe_q90"] <= 1.5 * line["sync/noise_q90"]  # the limit is 2
        assert 0 < line["mismatch/rms"] <= 2 * line["sync/noise_rms"]  # the limit is 5
        assert line["mismatch/mean"] <= line["mismatch/rms"] <= line["mismatch/max"]
        assert line["mismatch/rms"] <= line["mismatch/q99"] <= 1.06 * line["mismatch/max"]
        assert 0 <= line["mismatch/equal_fraction"] < 0.5
        assert line["optim/grad_norm"] > 0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["cluster.tensor_parallel=2"], marks=pytest.mark.slow),
        pytest.param(["learner.zero_stage=2", "cluster.sleep=true"], marks=pytest.mark.slow),
        pytest.param(["learner.zero_stage=3", "cluster.learner_ranks=2", "cluster.learner_cpus=0.5"],
                     marks=pytest.mark.slow),
    ],
    ids=lambda overrides: " ".join(overrides) or "plain",
)  # fmt: skip
def test_two_steps_of_a_random_model_of_real_width(
    overrides: list[str], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """With a full check after the second step, too: in turns, the learner leaves its memory between its groups."""
    recipe = make_recipe(
        stand_in.make_wide(),
        data={"max_prompt_tokens": 16},
        sampling={"max_tokens": 8},
        algorithm={"prompts_per_step": 4, "group_size": 4},
        rewards=[write_spread(tmp_path)],
        optimizer={"lr": 1e-5},
        run={"verify_every": 2},
    )
    metrics = train(recipe, "model.dtype=bfloat16", *overrides)
    assert len(metrics) == 2
    held(metrics)
    assert "sync/movement_error" not in metrics[0]
    assert 0 < metrics[1]["sync/movement_error"] < 0.3


@pytest.mark.slow
@pytest.mark.skipif(not SVAMP.exists(), reason="needs ../shared/data/svamp_test.jsonl, which a clone alone has not")
def test_two_steps_of_smollm2_on_svamp(smollm2_model: Path, tmp_path: Path) -> None:
    """The recipe with another data set, in the model's own chat format, without solved problems before it."""
    recipe = ROOT / "recipes" / "smollm2_word_problems.yaml"
    options = [
        f"data.train={SVAMP}", "data.messages_column=null", "data.overlap_ngram=13", "data.eval.sets=[]",
        "data.eval.every=0", "data.eval.samples_per_prompt=1", "algorithm.prompts_per_step=2", "run.steps=2",
        "algorithm.group_size=4", f"run.dir={tmp_path}", "run.name=svamp", "run.tensorboard=false",
    ]  # fmt: skip
    metrics = train(recipe, *options)
    assert len(metrics) == 2
    for line in metrics:
        assert 0 < line["sync/probe_q90"] <= 1.5 * line["sync/noise_q90"]
        assert 0 < line["mismatch/rms"] <= 2 * line["sync/noise_rms"]
    assert os.path.exists(tmp_path / "svamp" / "model" / "model.safetensors")
