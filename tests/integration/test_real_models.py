"""Whole runs in bfloat16 on models of real width: what fails only beyond toy size fails here."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in
from conftest import write_spread

from grpo.config import (
    AlgorithmConfig,
    ClusterConfig,
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    TrainSetConfig,
)
from grpo.config.validate import validate
from grpo.types import UserError

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


CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("bfloat16", "float32"),
    "learner.zero_stage": ("0", "1", "2", "3"),
    "learner.offload": ("none", "optimizer", "parameters"),
    "cluster.learner_ranks": ("1", "2"),
    "cluster.tensor_parallel": ("1", "2"),
    "cluster.sleep": ("false", "true"),
    "algorithm.kl_coef": ("0", "0.01"),
    "learner.gradient_checkpointing": ("false", "true"),
}
"""What a user chooses of how the engines hold a model."""

Choice = dict[str, str]


def allowed(choice: Choice) -> bool:
    """Whether `validate` lets the choice through."""
    fixed = AlgorithmConfig(prompts_per_step=4, group_size=4, kl_coef=float(choice["algorithm.kl_coef"]))
    cluster = ClusterConfig(
        sleep=choice["cluster.sleep"] == "true", learner_ranks=int(choice["cluster.learner_ranks"]),
        tensor_parallel=int(choice["cluster.tensor_parallel"]),
    )  # fmt: skip
    learner = LearnerConfig(
        zero_stage=int(choice["learner.zero_stage"]), offload=choice["learner.offload"],  # type: ignore[arg-type]
        gradient_checkpointing=choice["learner.gradient_checkpointing"] == "true",
    )  # fmt: skip
    config = Config(
        model=ModelConfig(path="x", dtype=choice["model.dtype"]),  # type: ignore[arg-type]
        data=DataConfig(train=[TrainSetConfig(path="x.jsonl")]), algorithm=fixed, run=RunConfig(steps=2),
        rewards=[RewardConfig(file="x.py")], cluster=cluster, learner=learner,
    )  # fmt: skip
    try:
        validate(config)
    except UserError:
        return False
    return True


def covering(seed: int) -> list[Choice]:
    """Return allowed choices that together hold every pair of values that some allowed choice holds (greedy, of a
    shuffled product)."""
    product = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    possible = [choice for choice in product if allowed(choice)]
    random.Random(seed).shuffle(possible)

    def pairs(choice: Choice) -> set[tuple[tuple[str, str], tuple[str, str]]]:
        return set(itertools.combinations(sorted(choice.items()), 2))

    missing = set().union(*map(pairs, possible))
    chosen = []
    while missing:
        best = max(possible, key=lambda choice: len(pairs(choice) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def test_the_covering_holds_every_allowed_pair() -> None:
    """Those that cannot be: bfloat16, a sampler's turn, an offload or sharded weights without the stage they need."""
    held = {pair for choice in covering(0) for pair in itertools.combinations(sorted(choice.items()), 2)}
    all_pairs = {
        tuple(sorted(((a, x), (b, y))))
        for a, b in itertools.combinations(CHOICES, 2)
        for x in CHOICES[a]
        for y in CHOICES[b]
    }
    stage, offload, sleep = "learner.zero_stage", "learner.offload", "cluster.sleep"
    assert all_pairs - held == {
        tuple(sorted(pair))
        for pair in (
            ((stage, "0"), ("model.dtype", "bfloat16")), ((stage, "0"), (sleep, "true")),
            ((stage, "3"), (sleep, "true")), ((stage, "0"), (offload, "optimizer")),
            *(((stage, value), (offload, "parameters")) for value in "012"), ((offload, "parameters"), (sleep, "true")),
        )
    }  # fmt: skip


PLAIN = {name: values[0] for name, values in CHOICES.items()} | {"learner.zero_stage": "2"}


@pytest.mark.parametrize(
    "choice",
    [PLAIN, *(pytest.param(choice, marks=pytest.mark.slow) for choice in covering(0))],
    ids=lambda choice: " ".join(value for value in choice.values()),
)
def test_two_steps_of_a_random_model_of_real_width(
    choice: Choice, make_recipe: Callable[..., Path], tmp_path: Path
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
        cluster={"learner_cpus": 0.5, "sampler_cpus": 0.5},
    )
    metrics = train(recipe, *(f"{name}={value}" for name, value in choice.items()))
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
