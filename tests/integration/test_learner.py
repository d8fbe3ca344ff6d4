"""The learner through DeepSpeed itself: one plain SGD step, clipping off, against a naive loop in float64.

Adam and clipping would hide a wrong gradient scale, so neither is used. Each rank is a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo.batching import TrainingRow
from grpo.learner.replay import replay
from grpo.objective.compatibility import LEGAL_AGGREGATIONS

LR = 0.5
SMALL_LR = 0.05  # two steps: a large first one would magnify float32's rounding in the second
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
                prompt=index // 2,
                reward=0.0,
                has_spread=True,
                truncated=False,
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
        "out": str(tmp_path / f"out-{ranks}"), "runs": str(tmp_path / f"runs-{ranks}"),
        "cases": [
            {"aggregation": "token_mean", "offload": "none", "unscaled": False, "save": None, "budget": 4096,
             "algorithm": {}, "minibatches": 1, "epochs": 1, "driver_steps": 1, "rows": None, "poisoned": [], **case}
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
def sgd_recipe(make_recipe: Callable[..., Path]) -> Callable[..., Path]:
    def make(model: Path, lr: float = LR) -> Path:
        return make_recipe(
            model, optimizer={"name": "sgd", "lr": lr, "max_grad_norm": 0.0}, algorithm={"kl_coef": KL_COEF}
        )

    return make


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_sgd_step_is_the_same_however_it_is_split(
    ranks: int, tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[..., Path]
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
    tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[..., Path]
) -> None:
    model = make_model("qwen2")
    rows = recorded_rows(7)
    cases = [{"stage": stage, "unscaled": True} for stage in (0, 2, 3)]
    for result in run_cases(tmp_path, sgd_recipe(model), rows, 2, cases):
        assert distance(result["state"], naive_step(model, rows, "token_mean")) > 1e-4


def test_more_ranks_than_rows_sequence_mean_untied_and_offload(
    tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[..., Path]
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


EPS_LOW, EPS_HIGH = 0.05, 0.1


def naive_policy_loss(loss: str, new: list[Tensor], old: list[float], advantage: float) -> list[Tensor]:
    """Loss of each token of a row, from the papers' formulas."""
    ratios = [torch.exp(n - o) for n, o in zip(new, old, strict=True)]
    clipped = [r.clamp(1 - EPS_LOW, 1 + EPS_HIGH) for r in ratios]
    if loss == "ppo_clip":
        return [-torch.minimum(r * advantage, c * advantage) for r, c in zip(ratios, clipped, strict=True)]
    if loss == "cispo":
        return [-c.detach() * advantage * n for c, n in zip(clipped, new, strict=True)]
    if loss == "reinforce":
        return [-advantage * n for n in new]
    if loss == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return [-(4 / tau) / (1 + torch.exp(-tau * (r - 1))) * advantage for r in ratios]
    logs = [n - o for n, o in zip(new, old, strict=True)]
    if loss == "gspo":
        # the token form, eq. 14: the sequence's ratio, with the gradient of each token's own logprob
        sequence = math.exp(sum(float(x.detach()) for x in logs) / len(logs))
        tokens = [sequence * torch.exp(n - n.detach()) for n in new]
        return [-torch.minimum(r * advantage, r.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantage) for r in tokens]
    assert loss == "gmpo"
    kept = [
        torch.minimum(x, x.clamp(-EPS_LOW, EPS_HIGH))
        if advantage > 0
        else torch.maximum(x, x.clamp(-EPS_LOW, EPS_HIGH))
        for x in logs
    ]
    return [-torch.exp(sum(kept) / len(kept)) * advantage] * len(new)


def naive_two_updates(
    model_path: Path, rows: list[TrainingRow], loss: str, aggregation: str, kl_coef: float, entropy_coef: float
) -> dict[str, Tensor]:
    """Two SGD steps on halves of the rows in float64, old logprobs and reference from before the first."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)

    def row_logprobs(row: TrainingRow) -> tuple[list[Tensor], list[Tensor]]:
        ids = [*row.prompt_ids, *row.completion_ids.tolist()]
        every = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        places = [(len(row.prompt_ids) + i - 1, t) for i, t in enumerate(row.completion_ids.tolist())]
        kept = [place for place, taken in zip(places, row.sampled_mask, strict=True) if taken]
        return [every[i, t] for i, t in kept], [-(every[i].exp() * every[i]).sum() for i, _ in kept]

    old = {row.rollout_index: [float(x.detach()) for x in row_logprobs(row)[0]] for row in rows}
    for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        tokens = {row.rollout_index: int(row.sampled_mask.sum()) for row in part}
        total = torch.zeros((), dtype=torch.float64)
        for row in part:
            new, entropy = row_logprobs(row)
            of_prompt = [tokens[r.rollout_index] for r in part if r.prompt == row.prompt]
            share = {
                "token_mean": 1 / sum(tokens.values()),
                "sequence_mean": 1 / (len(part) * tokens[row.rollout_index]),
                "sequence_sum": 1 / len(part),
                "constant_length": 1 / (len(part) * 8),
                "prompt_mean": 1 / (len({r.prompt for r in part}) * sum(of_prompt)),
            }[aggregation]
            sampler = [x for x, taken in zip(row.sampler_logprobs.tolist(), row.sampled_mask, strict=True) if taken]
            terms = naive_policy_loss(loss, new, old[row.rollout_index], row.advantage)
            for term, n, h, o, s in zip(terms, new, entropy, old[row.rollout_index], sampler, strict=True):
                anchor = torch.exp(o - n) - (o - n) - 1  # the reference is the policy before the first step
                weight = min(math.exp(o - s), 2.0)
                total = total + share * (weight * term + kl_coef * anchor - entropy_coef * h)
        model.zero_grad()
        total.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= SMALL_LR * p.grad
    return {name: p.detach() for name, p in model.named_parameters()}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "stage"),
    [("qwen2", 2), *(pytest.param(*other, marks=SLOW) for other in (("llama", 3), ("qwen2", 3), ("llama", 2)))],
)
def test_every_loss_and_aggregation_moves_the_weights_as_written_out(
    family: str, stage: int, tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[..., Path]
) -> None:
    """Two updates, so that ratios leave 1 and clips act; tied and untied, on two ranks."""
    model = make_model(family)
    rows = recorded_rows(8)
    pairs = [(loss, aggregation) for loss, legal in LEGAL_AGGREGATIONS.items() for aggregation in legal]
    extra = {"kl_coef": KL_COEF, "entropy_coef": 0.03}
    cases = [
        {"stage": stage, "aggregation": aggregation, "minibatches": 2, "budget": 24,
         "algorithm": {"loss": loss, "eps_low": EPS_LOW, "eps_high": EPS_HIGH, **extra}}
        for loss, aggregation in pairs
    ]  # fmt: skip
    results = run_cases(tmp_path, sgd_recipe(model, SMALL_LR), rows, 2, cases)
    clipped = 0.0
    for (loss, aggregation), result in zip(pairs, results, strict=True):
        expected = naive_two_updates(model, rows, loss, aggregation, **extra)
        assert distance(result["state"], expected) < 1e-5, (loss, aggregation)
        clipped += result["metrics"]["policy/clip_fraction_low"][0] + result["metrics"]["policy/clip_fraction_high"][0]
    assert clipped > 0


MOVING = {
    "refreshed": {"kl_coef": 0.3, "reference_refresh_every": 2},
    "averaged": {"kl_coef": 0.3, "reference_average": 0.3},
    "fixed": {"kl_coef": 0.3},
    "penalised": {"kl_coef": 0.3, "kl_place": "reward", "kl_estimator": "k1", "advantage": "reinforce_pp"},
    "critic": {"kl_coef": 0.0, "advantage": "gae"},
}


def test_a_moving_reference_and_a_critic_are_the_same_at_every_stage(
    tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[..., Path]
) -> None:
    """Four driver steps on two ranks; one rank at stage 0 is what the others must equal."""
    model = make_model("qwen2")
    rows = [dataclasses.replace(row, reward=float(row.rollout_index % 2)) for row in recorded_rows(7)]
    cases = {
        (name, stage): {"stage": stage, "budget": 24, "driver_steps": 4, "algorithm": algorithm}
        for name, algorithm in MOVING.items()
        for stage in STAGES
    }
    recipe = sgd_recipe(model, SMALL_LR)
    alone = run_cases(tmp_path, recipe, rows, 1, [cases[name, 0] for name in MOVING])
    expected = dict(zip(MOVING, alone, strict=True))
    for (name, stage), result in zip(cases, run_cases(tmp_path, recipe, rows, 2, list(cases.values())), strict=True):
        assert distance(result["state"], expected[name]["state"]) < 1e-5, (name, stage)
        if name == "critic":
            # the score starts as zeros: its first steps are as small as its relative error is large
            assert distance(result["critic"], expected[name]["critic"]) < 1e-4, stage
            assert float(result["critic"]["score.weight"].abs().max()) > 0
            explained = result["metrics"]["value/error_square"][0], result["metrics"]["value/return_square"][0]
            assert explained[0] < explained[1]
    for one, other in (("refreshed", "fixed"), ("averaged", "fixed"), ("averaged", "refreshed")):
        assert distance(expected[one]["state"], expected[other]["state"]) > 1e-4, (one, other)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_saved_folders_load_to_the_learners_weights(
    family: str, tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[..., Path]
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


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_update_that_is_not_finite_moves_nothing_on_any_rank(
    ranks: int, tmp_path: Path, make_model: Callable[..., Path], sgd_recipe: Callable[..., Path]
) -> None:
    """One row of eight is NaN, so on one rank: the update that it is in is as if it had never been. With Adam, whose
    moments would remember."""
    model = make_model("qwen2")
    recipe = sgd_recipe(model)
    settings = yaml.safe_load(recipe.read_text())
    settings["optimizer"] = {"name": "adamw", "lr": 1e-3, "warmup_steps": 3, "max_grad_norm": 1.0}
    recipe.write_text(yaml.safe_dump(settings))
    rows, second_half = recorded_rows(8), [4, 5, 6, 7]
    cases = [
        case
        for stage in STAGES
        for case in (
            {"stage": stage, "budget": 11, "minibatches": 2, "poisoned": [1], "driver_steps": 2},
            {"stage": stage, "budget": 11, "rows": second_half, "driver_steps": 2},
        )
    ]
    results = run_cases(tmp_path, recipe, rows, ranks, cases)
    for stage in STAGES:
        poisoned, without = results[2 * stage], results[2 * stage + 1]
        assert all(torch.equal(poisoned["state"][name], t) for name, t in without["state"].items()), stage
        assert poisoned["metrics"]["optim/lr"] == without["metrics"]["optim/lr"]
        assert poisoned["metrics"]["optim/grad_norm"] == without["metrics"]["optim/grad_norm"]
        assert poisoned["maxima"]["optim/skipped_updates"] == 1
        assert without["maxima"]["optim/skipped_updates"] == 0
        assert all(math.isfinite(total) for total, _ in poisoned["metrics"].values())
        assert all(math.isfinite(value) for value in poisoned["maxima"].values())
        dump = tmp_path / f"runs-{ranks}" / str(2 * stage) / "nonfinite" / "step-000001-1"
        lines = replay(dump)
        assert lines[0] == f"{dump}: {ranks} ranks, float32 on cpu"
        assert "advantages not finite at" in lines[-1]
        assert "of rollouts [1]" in lines[-1]
        assert any("loss" in line and line.endswith("finite, and so is its gradient") for line in lines)
        assert any(" gradient of model.embed_tokens.weight" in line for line in lines)
        assert (dump.parent / "step-000002-2").is_dir()
