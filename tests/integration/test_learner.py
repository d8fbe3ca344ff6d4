"""The learner through DeepSpeed itself: one plain SGD step, clipping off, against a naive loop in float64.

Adam and clipping would hide a wrong gradient scale, so neither is used. Each rank is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.batching import TrainingRow

LR = 0.5
KL_COEF = 0.1
STAGES = (0, 1, 2, 3)
BUDGETS = (10, 40, 4096)
WORKER = Path(__file__).with_name("learner_process.py")


def recorded_rows(rows: int, seed: int = 0) -> list[TrainingRow]:
    """Unequal lengths, tokens that the policy did not sample, zero advantages."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(rows):
        completion = rng.integers(0, 13, size=int(rng.integers(1, 6))).astype(np.int32)
        mask = np.ones(len(completion), dtype=bool)
        if index == 1 and len(mask) > 1:
            mask[0] = False
        made.append(
            TrainingRow(
                rollout_index=index,
                prompt_ids=rng.integers(1, 13, size=int(rng.integers(2, 7))).tolist(),
                completion_ids=completion,
                sampler_logprobs=rng.uniform(-2, -1, size=len(completion)).astype(np.float32),
                sampled_mask=mask,
                advantage=0.0 if index == 2 else float(rng.normal()),
            )
        )
    return made


def naive_step(model_path: Path, rows: list[TrainingRow], aggregation: str) -> dict[str, torch.Tensor]:
    """Token by token in float64: truncated importance weight x advantage x logprob, mean over tokens or sequences.

    The reference is the model itself, so k3 and its gradient are 0 and the anchor must change nothing.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(int(row.sampled_mask.sum()) for row in rows)
    for row in rows:
        ids = [*row.prompt_ids, *row.completion_ids.tolist()]
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        for i, token in enumerate(row.completion_ids.tolist()):
            if not row.sampled_mask[i]:
                continue
            logprob = logprobs[len(row.prompt_ids) + i - 1, token]
            weight = min(float(torch.exp(logprob.detach() - float(row.sampler_logprobs[i]))), 2.0)
            share = 1 / tokens if aggregation == "token_mean" else 1 / (len(rows) * int(row.sampled_mask.sum()))
            total = total - share * weight * row.advantage * logprob
    total.backward()
    return {name: (p - LR * p.grad).detach() for name, p in model.named_parameters()}


def run_cases(tmp_path: Path, recipe: Path, rows: list[TrainingRow], ranks: int, cases: list[dict[str, Any]]):
    """Run `cases` on `ranks` processes; returns what rank 0 saved of each."""
    torch.save(rows, tmp_path / "rows.pt")
    job = {
        "recipe": str(recipe), "rows": str(tmp_path / "rows.pt"), "store": str(tmp_path / f"store-{ranks}"),
        "out": str(tmp_path / f"out-{ranks}"),
        "cases": [
            {"aggregation": "token_mean", "offload": "none", "unscaled": False, "save": None, "budget": 4096, **case}
            for case in cases
        ],
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    commands = [
        [sys.executable, str(WORKER), str(rank), str(ranks), str(tmp_path / "job.json")] for rank in range(ranks)
    ]
    logs = [(tmp_path / f"rank-{rank}.log").open("w") for rank in range(ranks)]
    processes = [
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        for command, log in zip(commands, logs, strict=True)
    ]
    codes = [process.wait(timeout=600) for process in processes]
    for log in logs:
        log.close()
    assert codes == [0] * ranks, "\n".join((tmp_path / f"rank-{r}.log").read_text()[-3000:] for r in range(ranks))
    return [torch.load(f"{job['out']}-{i}.pt") for i in range(len(cases))]


def distance(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a tensor: |a - b| / |b|."""
    assert state.keys() == expected.keys()
    return max(
        float((state[name].double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-12))
        for name in expected
    )


@pytest.fixture
def sgd_recipe(make_recipe: Callable[..., Path]) -> Callable[[Path], Path]:
    def make(model: Path) -> Path:
        return make_recipe(
            model, optimizer={"name": "sgd", "lr": LR, "max_grad_norm": 0.0}, algorithm={"kl_coef": KL_COEF}
        )

    return make


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_sgd_step_is_the_same_however_it_is_split(
    ranks: int, tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[[Path], Path]
) -> None:
    model = make_model("qwen2")
    rows = recorded_rows(7)
    expected = naive_step(model, rows, "token_mean")
    cases = [{"stage": stage, "budget": budget} for stage in STAGES for budget in BUDGETS]
    results = run_cases(tmp_path, sgd_recipe(model), rows, ranks, cases)
    for case, result in zip(cases, results, strict=True):
        assert distance(result["state"], expected) < 1e-6, case
    norms = [total / count for total, count in (result["grad_norm"] for result in results)]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-4)
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert distance({n: t for n, t in start.items() if n in expected}, expected) > 1e-3  # the step moved something


def test_the_invariance_test_notices_a_missing_world_size_factor(
    tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[[Path], Path]
) -> None:
    model = make_model("qwen2")
    rows = recorded_rows(7)
    cases = [{"stage": stage, "unscaled": True} for stage in (0, 2, 3)]
    for result in run_cases(tmp_path, sgd_recipe(model), rows, 2, cases):
        assert distance(result["state"], naive_step(model, rows, "token_mean")) > 1e-4


def test_more_ranks_than_rows_sequence_mean_untied_and_offload(
    tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[[Path], Path]
) -> None:
    model = make_model("llama")
    rows = recorded_rows(1)
    expected = naive_step(model, rows, "sequence_mean")
    cases = [
        {"stage": stage, "aggregation": "sequence_mean", "offload": offload}
        for stage, offload in ((0, "none"), (2, "optimizer"), (3, "none"), (3, "parameters"))
    ]
    for case, result in zip(cases, run_cases(tmp_path, sgd_recipe(model), rows, 2, cases), strict=True):
        assert distance(result["state"], expected) < 1e-6, case


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_saved_folders_load_to_the_learners_weights(
    family: str, tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[[Path], Path]
) -> None:
    model = make_model(family)
    cases = [{"stage": stage, "save": str(tmp_path / f"saved-{stage}")} for stage in (0, 3)]
    results = run_cases(tmp_path, sgd_recipe(model), recorded_rows(5), 2, cases)
    for case, result in zip(cases, results, strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(case["save"])
        named = dict(loaded.named_parameters())
        assert named.keys() == result["state"].keys()
        assert all(torch.equal(named[name], tensor) for name, tensor in result["state"].items())
        assert (Path(case["save"]) / "tokenizer.json").exists()
        assert not Path(case["save"] + ".partial").exists()
