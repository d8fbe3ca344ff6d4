"""Every option of the objective reaches its term: two epochs of `run_step` against the same written out.

The terms themselves are proven elsewhere (test_losses, test_kl, test_golden); here they are called with each
option given by name and value, on whole rows one at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from padded import policy_term
from test_learner_step import PlainEngine, lay_out, rows, step

from grpo.batching import TrainingRow
from grpo.config import CriticConfig
from grpo.learner.step import measured_kl_old
from grpo.objective.kl import anchor_kl

LR, EPOCHS, STEP_KL_COEF = 4.0, 3, 0.3
PLAIN: dict[str, Any] = {
    "loss": "ppo_clip", "eps_low": 0.2, "eps_high": 0.2, "dual_clip": None, "sapo_tau_positive": 1.0,
    "sapo_tau_negative": 1.05, "kl_coef": 0.0, "kl_estimator": "k3", "kl_gradient": "autodiff", "kl_clamp": None,
    "entropy_coef": 0.0, "importance_low": 0.0, "importance_high": 2.0,
}  # fmt: skip
ANCHORED = {"kl_coef": 0.01}  # the recipe's; the step says STEP_KL_COEF, as an adaptive coefficient would

CASES: list[dict[str, Any]] = [
    {},
    {"eps_low": 0.05, "eps_high": 0.5},
    {"eps_low": 0.5, "eps_high": 0.05},
    {"dual_clip": 1.05},
    {"loss": "sapo"},
    {"loss": "sapo", "sapo_tau_positive": 3.0},
    {"loss": "sapo", "sapo_tau_negative": 4.0},
    {"loss": "cispo", "eps_high": 0.1},
    {"loss": "reinforce"},
    {"entropy_coef": 0.2},
    ANCHORED,
    ANCHORED | {"kl_gradient": "k2"},
    ANCHORED | {"kl_gradient": "ratio_weighted"},
    ANCHORED | {"kl_estimator": "k1", "kl_gradient": "ratio_weighted"},
    ANCHORED | {"kl_clamp": 0.1},
    {"importance_level": "token"},
    {"importance_level": "token", "importance_high": 1.2},
    {"importance_level": "token", "importance_low": 0.9},
]


def made(engine: PlainEngine) -> list[TrainingRow]:
    """Rows that a slightly other sampler wrote."""
    found = rows(engine, count=8)
    rng = np.random.default_rng(3)
    return [
        dataclasses.replace(r, sampler_logprobs=r.sampler_logprobs + rng.normal(0, 0.4, len(r.sampler_logprobs)))
        for r in found
    ]


def other_reference(engine: PlainEngine) -> None:
    generator = torch.Generator().manual_seed(5)
    engine.reference.weight += torch.randn(engine.reference.weight.shape, generator=generator, dtype=torch.float64)


def written_out(engine: PlainEngine, batch: list[TrainingRow], **options: Any) -> torch.Tensor:
    """The weights after EPOCHS updates."""
    o = PLAIN | options
    weights = engine.model.weight.detach().clone()
    start = weights.clone()
    tokens = sum(len(row.completion_ids) for row in batch)

    def logprobs_of(table: torch.Tensor, row: TrainingRow) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [*row.prompt_ids, *row.completion_ids.tolist()]
        every = torch.log_softmax(table[ids[:-1]], -1)[len(row.prompt_ids) - 1 :]
        return every[range(len(every)), ids[len(row.prompt_ids) :]], -(every.exp() * every).sum(-1)

    for _ in range(EPOCHS):
        weights.requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for row in batch:
            logprobs, entropy = logprobs_of(weights, row)
            old, ref = logprobs_of(start, row)[0], logprobs_of(engine.reference.weight, row)[0]
            mask = torch.ones(1, len(logprobs), dtype=torch.bool)
            policy = policy_term(
                o["loss"], logprobs=logprobs[None], old_logprobs=old[None],
                advantages=torch.full_like(old, row.advantage)[None], mask=mask, eps_low=o["eps_low"],
                eps_high=o["eps_high"], dual_clip=o["dual_clip"], tau_positive=o["sapo_tau_positive"],
                tau_negative=o["sapo_tau_negative"],
            ).loss[0]  # fmt: skip
            if "importance_level" in o:
                weight = (old - torch.tensor(row.sampler_logprobs)).exp()
                policy = policy * weight.clamp(o["importance_low"], o["importance_high"])
            total = total + policy.sum() / tokens - o["entropy_coef"] * entropy.sum() / tokens
            if o["kl_coef"]:
                kl = anchor_kl(
                    logprobs[None], old[None], ref[None], estimator=o["kl_estimator"], gradient=o["kl_gradient"],
                    clamp=o["kl_clamp"],
                )  # fmt: skip
                total = total + STEP_KL_COEF * kl.sum() / tokens
        [gradient] = torch.autograd.grad(total, weights)
        weights = (weights - LR * gradient).detach()
    return weights


@pytest.mark.parametrize("options", CASES, ids=str)
def test_an_option_reaches_its_term(options: dict[str, Any]) -> None:
    engine = PlainEngine(lr=LR)
    other_reference(engine)
    batch = made(engine)
    expected = written_out(engine, batch, **options)
    coef = STEP_KL_COEF if options.get("kl_coef") else 0.0
    step(engine, lay_out([batch], epochs=EPOCHS, budget=16, kl_coef=coef), **options)
    torch.testing.assert_close(engine.model.weight.detach(), expected, rtol=0, atol=1e-6)  # weights travel as float32


def test_every_case_moves_the_weights_elsewhere() -> None:
    """Else one of them would prove nothing."""
    engine = PlainEngine(lr=LR)
    other_reference(engine)
    batch = made(engine)
    ends = [written_out(engine, batch, **options) for options in CASES]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert (one - other).abs().max() > 1e-4, CASES[i]


@pytest.mark.parametrize(("coef", "clip"), [(1.0, None), (0.5, None), (1.0, 0.1), (0.7, 0.3)])
def test_the_critic_learns_the_value_of_the_state_before_each_token(coef: float, clip: float | None) -> None:
    """gamma = lambda = 1: the return of every token is the row's reward, whatever the values."""
    engine = PlainEngine(lr=LR)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        engine.critic.weight += torch.randn(engine.critic.weight.shape, generator=generator, dtype=torch.float64)
    batch = rows(engine, count=8)
    table = engine.critic.weight.detach()[:, 0].clone()
    start, tokens = table.clone(), sum(len(row.completion_ids) for row in batch)
    for _ in range(EPOCHS):
        gradient = torch.zeros_like(table)
        for row in batch:
            ids = [*row.prompt_ids, *row.completion_ids.tolist()]
            for state in ids[len(row.prompt_ids) - 1 : -1]:
                value, old = float(table[state]), float(start[state])
                held = value if clip is None else min(max(value, old - clip), old + clip)
                if (value - row.reward) ** 2 >= (held - row.reward) ** 2:  # else the held one counts, and is constant
                    gradient[state] += coef * (value - row.reward) / tokens
        table -= LR * gradient
    critic = CriticConfig(coef=coef, clip=clip)
    laid_out = lay_out([batch], epochs=EPOCHS, budget=16)
    step(engine, laid_out, critic, advantage="gae", gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(engine.critic.weight.detach()[:, 0], table, rtol=0, atol=1e-6)


def test_the_trust_region_is_measured_over_all_ranks_and_forwards() -> None:
    """KL(old || now) by k3 of the sampled tokens, r - 1 - log r, over both ranks' tokens."""
    from grpo.config import AlgorithmConfig
    from grpo.learner.prepare import prepare
    from grpo.learner.tally import Tally

    class TwoRanks(PlainEngine):
        def all_sum(self, values: Any) -> list[float]:
            return [10.0 * value for value in values[:1]] + [2.0 * value for value in values[1:]]

    engine = TwoRanks()
    batch = rows(engine, count=4)
    laid_out = lay_out([batch], epochs=2)
    algorithm = AlgorithmConfig(prompts_per_step=1, group_size=2, max_kl_old=1.0, epochs_per_step=2)
    prepared = prepare(laid_out, engine, algorithm, CriticConfig(), torch.device("cpu"), Tally())
    before = engine.model.weight.detach().clone()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        engine.model.weight += torch.randn(before.shape, generator=generator, dtype=torch.float64)
    total, count = 0.0, 0
    for row in batch:
        ids = [*row.prompt_ids, *row.completion_ids.tolist()]
        for position in range(len(row.prompt_ids), len(ids)):
            now, old = (
                float(torch.log_softmax(t[ids[position - 1]], -1)[ids[position]])
                for t in (engine.model.weight.detach(), before)
            )
            total += np.exp(now - old) - 1 - (now - old)
            count += 1
    measured = measured_kl_old(laid_out.minibatches[0], prepared[0], engine, torch.device("cpu"))
    assert measured == pytest.approx(5.0 * total / count, rel=1e-6)
