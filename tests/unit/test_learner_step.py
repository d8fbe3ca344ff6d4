"""The learner's arithmetic on a plain torch engine that really trains."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from grpo.batching import TrainingRow, rank_steps
from grpo.config import AlgorithmConfig, CriticConfig
from grpo.learner.prepare import prepare
from grpo.learner.step import run_step
from grpo.learner.tally import Tally
from grpo.types import Batch

VOCABULARY = 6
CPU = torch.device("cpu")


class PlainEngine:
    """A bigram model and a table of values with SGD behind the `StepEngine` protocol."""

    def __init__(self, lr: float = 0.1, temperature: float = 1.0) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.float64)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.critic = torch.nn.Embedding(VOCABULARY, 1, dtype=torch.float64)
        torch.nn.init.zeros_(self.critic.weight)
        self.optimizers = {
            "policy": torch.optim.SGD(self.model.parameters(), lr=lr),
            "critic": torch.optim.SGD(self.critic.parameters(), lr=lr),
        }
        self.temperature = temperature
        self.boundaries: list[bool] = []
        self.kept: list[list[int]] = []
        self.forwards = 0

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.forwards += 1
        every = torch.log_softmax(self.model(batch.input_ids) / self.temperature, -1)
        return every.gather(-1, batch.target_ids[..., None])[..., 0], -(every.exp() * every).sum(-1)

    def ref_logprobs(self, batch: Batch) -> torch.Tensor:
        every = torch.log_softmax(self.reference(batch.input_ids) / self.temperature, -1)
        return every.gather(-1, batch.target_ids[..., None])[..., 0]

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.critic(token_ids)[..., 0]

    def backward(self, model: str, loss: torch.Tensor, *, last: bool) -> None:
        if model == "policy":
            self.boundaries.append(last)
        loss.backward()

    def optimizer_step(self, model: str) -> float:
        parameters = (self.model if model == "policy" else self.critic).weight
        norm = float(parameters.grad.norm())
        if math.isfinite(norm):
            self.optimizers[model].step()
        self.optimizers[model].zero_grad()
        return norm

    def set_aside(self, minibatch: Sequence[Any], prepared: Sequence[Any], kl_coef: float) -> None:
        assert len(minibatch) == len(prepared)
        self.kept.append([index for batch in minibatch for index in batch.rollout_index.tolist() if index >= 0])

    def all_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def settings(**changes: Any) -> AlgorithmConfig:
    plain = AlgorithmConfig(prompts_per_step=1, group_size=2, importance_level="none")
    return dataclasses.replace(plain, **changes)


def step(engine: PlainEngine, laid_out: Any, critic: CriticConfig | None = None, **changes: Any) -> Tally:
    return run_step(laid_out, engine, settings(**changes), critic or CriticConfig(), CPU)


def rows(engine: PlainEngine, count: int = 6, temperature: float = 1.0, seed: int = 1) -> list[TrainingRow]:
    """Rows whose sampler logprobs are the model's own."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        prompt = rng.integers(VOCABULARY, size=2).tolist()
        completion = rng.integers(VOCABULARY, size=int(rng.integers(1, 5))).astype(np.int32)
        tokens = torch.tensor(prompt + completion.tolist())
        with torch.no_grad():
            every = torch.log_softmax(engine.model(tokens[1:-1]) / temperature, -1)
            logprobs = every.gather(-1, tokens[2:, None])[:, 0]
        made.append(
            TrainingRow(
                rollout_index=index,
                prompt_ids=prompt,
                completion_ids=completion,
                sampler_logprobs=logprobs.numpy().astype(np.float32),
                sampled_mask=np.ones(len(completion), dtype=bool),
                prompt=index // 2,
                advantage=float(rng.normal()),
                reward=float(rng.integers(2)),
                has_spread=True,
                truncated=index == 2,
            )
        )
    return made


def lay_out(minibatches, epochs=1, budget=1000, kl_coef=0.0):
    return rank_steps(
        minibatches, ranks=1, tokens_per_microbatch=budget, aggregation="token_mean", constant_length=8, epochs=epochs,
        kl_coef=kl_coef,
    )[0]  # fmt: skip


def test_one_update_equals_reinforce_written_out() -> None:
    engine = PlainEngine(lr=1.0)
    made = rows(engine)
    before = engine.model.weight.detach().clone().requires_grad_()
    tokens = sum(len(row.completion_ids) for row in made)
    loss = torch.zeros((), dtype=torch.float64)
    for row in made:
        sequence = [*row.prompt_ids, *row.completion_ids.tolist()]
        for position in range(2, len(sequence)):
            logprob = torch.log_softmax(before[sequence[position - 1]], -1)[sequence[position]]
            loss = loss - row.advantage * logprob / tokens
    loss.backward()
    tally = step(engine, lay_out([made]))
    assert tally.maxima["policy/updates"] == 1
    torch.testing.assert_close(engine.model.weight.detach(), (before - before.grad).detach(), atol=1e-7, rtol=0)
    assert tally.sums["policy/clip_fraction_low"] == [0.0, tokens]
    assert tally.sums["policy/ratio_mean"] == [tokens, tokens]


@pytest.mark.parametrize("budget", [1, 8, 1000])
def test_microbatches_do_not_change_the_update(budget: int) -> None:
    whole, split = PlainEngine(), PlainEngine()
    made = rows(whole)
    step(whole, lay_out([made], kl_coef=0.1), kl_coef=0.1)
    step(split, lay_out([made], budget=budget, kl_coef=0.1), kl_coef=0.1)
    torch.testing.assert_close(whole.model.weight, split.model.weight, atol=1e-9, rtol=0)
    assert split.boundaries == [False] * (len(split.boundaries) - 1) + [True]


def test_old_logprobs_are_those_of_the_step_start() -> None:
    engine = PlainEngine(lr=5.0)
    made = rows(engine, count=8)
    tally = step(engine, lay_out([made[:4], made[4:]], epochs=2))
    assert tally.maxima["policy/updates"] == 4
    tokens = sum(len(row.completion_ids) for row in made)
    assert tally.sums["mismatch/mean"][0] / tokens < 1e-6  # measured before any update, and once per token
    assert tally.sums["mismatch/mean"][1] == tokens
    assert tally.sums["policy/kl_old"][1] == 2 * tokens
    assert tally.sums["policy/kl_old"][0] > 1e-3  # later updates see a moved policy


def test_a_minibatch_whose_first_update_was_skipped_is_measured_in_the_next_epoch() -> None:
    engine = PlainEngine()
    made = rows(engine)
    factors = iter([math.nan, 1.0, 1.0])
    engine.model.weight.register_hook(lambda gradient: gradient * next(factors))
    tally = step(engine, lay_out([made], epochs=3))
    assert tally.maxima["optim/skipped_updates"] == 1
    assert tally.maxima["policy/updates"] == 2
    assert tally.sums["mismatch/mean"][1] == sum(len(row.completion_ids) for row in made)
    assert set(tally.learner_logprob_sums) == {row.rollout_index for row in made}


def test_truncated_importance_weights_are_counted() -> None:
    engine = PlainEngine()
    made = rows(engine)
    tokens = sum(len(row.completion_ids) for row in made)
    made[0].sampler_logprobs[:] -= 1.0  # weight e on these tokens, 1 elsewhere
    tally = step(engine, lay_out([made]), importance_level="token")
    fraction = tally.sums["mismatch/importance_weight_bounded_fraction"]
    assert fraction == [len(made[0].completion_ids), tokens]
    assert tally.maxima["mismatch/importance_weight_max"] == pytest.approx(math.e, rel=1e-5)
    assert tally.minima["mismatch/importance_weight_min"] == pytest.approx(1.0, rel=1e-5)


def test_forwards_without_gradient_are_timed() -> None:
    engine = PlainEngine()
    made = rows(engine)
    tally = step(engine, lay_out([made]))
    assert not any(name.startswith("time/") for name in tally.maxima)
    tally = step(engine, lay_out([made], epochs=2, kl_coef=0.1), kl_coef=0.1)
    assert tally.maxima["time/old_logprobs_s"] > 0
    assert tally.maxima["time/ref_logprobs_s"] > 0


def test_temperature_is_replayed() -> None:
    for temperature, small in ((0.6, True), (1.0, False)):
        engine = PlainEngine(temperature=temperature)
        tally = step(engine, lay_out([rows(engine, temperature=0.6)]))
        assert (tally.maxima["mismatch/max"] < 1e-6) is small


def test_logprob_sums_come_back_per_rollout() -> None:
    engine = PlainEngine()
    made = rows(engine)
    expected = {row.rollout_index: float(row.sampler_logprobs.sum()) for row in made}
    tally = step(engine, lay_out([made], budget=6))
    assert tally.learner_logprob_sums == pytest.approx(expected, abs=1e-5)


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    engine = PlainEngine()
    made = rows(engine)
    with torch.no_grad():
        engine.model.weight[3, 2] = float("nan")
    before = engine.model.weight.detach().clone()
    tally = step(engine, lay_out([made]))
    assert torch.equal(engine.model.weight.nan_to_num(7.0), before.nan_to_num(7.0))
    assert [sorted(rows) for rows in engine.kept] == [[row.rollout_index for row in made]]
    assert tally.maxima == {"optim/skipped_updates": 1, "policy/updates": 0, "policy/stopped_minibatches": 0}
    assert tally.sums == {
        "gradient/zero_advantage": [0, 0], "gradient/stopped": [sum(len(row.completion_ids) for row in made), 0],
    }  # fmt: skip


@pytest.mark.parametrize("lost", [0, 1])
def test_one_update_that_is_not_finite_leaves_the_others_alone(lost: int) -> None:
    """Of two minibatches; the last microbatch of the lost one is not the one at fault."""
    engine, other = PlainEngine(), PlainEngine()
    halves = [rows(engine, seed=5), rows(engine, seed=6)]
    broken = [list(half) for half in halves]
    broken[lost][0] = dataclasses.replace(broken[lost][0], advantage=math.nan)
    tally = step(engine, lay_out(broken, budget=6))
    expected = step(other, lay_out([halves[1 - lost]], budget=6))
    assert torch.equal(engine.model.weight, other.model.weight)
    assert len(engine.kept) == 1
    assert tally.maxima["policy/updates"] == tally.maxima["optim/skipped_updates"] == tally.skipped_updates == 1
    assert tally.sums["policy/loss"] == expected.sums["policy/loss"]
    uses = sum(len(row.completion_ids) for row in halves[lost])
    assert tally.sums["gradient/stopped"] == [uses, 0]


def test_a_loss_that_is_not_finite_makes_the_last_loss_of_its_update_nan() -> None:
    """On ranks without the fault the gradient would otherwise be finite."""
    losses: list[float] = []

    class Records(PlainEngine):
        def backward(self, model: str, loss: torch.Tensor, *, last: bool) -> None:
            losses.append(float(loss.detach()))
            super().backward(model, loss, last=last)

    engine = Records()
    made = sorted(rows(engine), key=lambda row: -row.positions)
    made[0] = dataclasses.replace(made[0], advantage=math.nan)  # in the first microbatch
    step(engine, lay_out([made, rows(engine, seed=7)], budget=6))
    at = engine.boundaries.index(True)
    assert at > 1
    assert [math.isfinite(loss) for loss in losses] == [
        False,
        *[True] * (at - 1),
        False,
        *[True] * (len(losses) - at - 1),
    ]


def test_a_finite_loss_with_a_gradient_that_is_not_moves_nothing() -> None:
    engine = PlainEngine()
    made = rows(engine)
    before = engine.model.weight.detach().clone()
    engine.model.weight.register_hook(lambda gradient: gradient / 0)
    tally = step(engine, lay_out([made]))
    assert torch.equal(engine.model.weight, before)
    assert len(engine.kept) == 1
    assert "optim/grad_norm" not in tally.sums


def test_a_critic_that_is_not_finite_stops_itself_only() -> None:
    engine = PlainEngine()
    made = rows(engine)
    before = engine.model.weight.detach().clone()
    engine.critic.weight.register_hook(lambda gradient: gradient * math.nan)
    tally = step(engine, lay_out([made]), advantage="gae")
    assert not torch.equal(engine.model.weight, before)
    assert torch.equal(engine.critic.weight, torch.zeros(VOCABULARY, 1, dtype=torch.float64))
    assert tally.maxima["optim/skipped_updates"] == 0
    assert tally.maxima["value/skipped_updates"] == tally.skipped_updates == 1
    assert len(engine.kept) == 1
    assert "value/loss" not in tally.sums


def test_the_reference_pulls_back() -> None:
    free, anchored = PlainEngine(lr=1.0), PlainEngine(lr=1.0)
    made = rows(free)
    for _ in range(20):
        step(free, lay_out([made]))
        step(anchored, lay_out([made], kl_coef=1.0), kl_coef=1.0)

    def distance(engine: PlainEngine) -> float:
        return float((engine.model.weight - engine.reference.weight).detach().norm())

    assert distance(anchored) < 0.7 * distance(free)


USES = ("zero_advantage", "stopped", "mismatch_masked", "clipped", "contributing")


def uses(tally: Tally) -> dict[str, float]:
    return {name: tally.sums[f"gradient/{name}"][0] for name in USES if f"gradient/{name}" in tally.sums}


def test_every_use_of_a_token_is_in_one_column() -> None:
    """Eight rows, two epochs: one without advantage, one that the sampler saw otherwise, one of a dull group."""
    engine = PlainEngine(lr=4.0)
    made = rows(engine, count=8)
    made[0] = dataclasses.replace(made[0], advantage=0.0)
    made[1].sampler_logprobs[:] -= 3.0
    made[2] = dataclasses.replace(made[2], has_spread=False, advantage=0.0)
    lengths = [len(row.completion_ids) for row in made]
    tally = step(engine, lay_out([made], epochs=2), importance_level="token", importance_mode="mask")
    table = uses(tally)
    assert table["zero_advantage"] == 2 * lengths[0]
    assert table["mismatch_masked"] == 2 * lengths[1]
    assert table["clipped"] > 0
    assert sum(table.values()) == 2 * (sum(lengths) - lengths[2])  # the dull group's are accounted for by the driver
    assert tally.sums["mismatch/masked_fraction"] == [lengths[1], sum(lengths)]  # measured once, not per epoch


def test_the_trust_region_ends_a_step_and_counts_what_it_left() -> None:
    made = rows(PlainEngine(), count=8)
    free, bound = PlainEngine(lr=4.0), PlainEngine(lr=4.0)
    whole = step(free, lay_out([made[:4], made[4:]], epochs=2))
    ended = step(bound, lay_out([made[:4], made[4:]], epochs=2), max_kl_old=1e-6)
    assert whole.maxima["policy/updates"] == 4
    assert ended.maxima["policy/updates"] == 1
    assert ended.maxima["policy/stopped_minibatches"] == 3
    tokens = [len(row.completion_ids) for row in made]
    assert uses(ended)["stopped"] == 2 * sum(tokens) - sum(tokens[:4])
    alone = PlainEngine(lr=4.0)
    step(alone, lay_out([made[:4]]))
    torch.testing.assert_close(bound.model.weight, alone.model.weight)  # exactly the first update and no trace of more
    wide = step(PlainEngine(lr=4.0), lay_out([made[:4], made[4:]], epochs=2), max_kl_old=1e6)
    assert wide.maxima["policy/updates"] == 4


def test_tokens_without_advantage_are_not_counted_as_stopped() -> None:
    engine = PlainEngine(lr=4.0)
    made = rows(engine, count=8)
    made[4:] = [dataclasses.replace(row, advantage=0.0) for row in made[4:]]
    ended = step(engine, lay_out([made[:4], made[4:]]), max_kl_old=1e-6)
    assert ended.maxima["policy/stopped_minibatches"] == 1
    table = uses(ended)
    assert table.get("stopped", 0) == 0
    assert table["zero_advantage"] == sum(len(row.completion_ids) for row in made[4:])


def test_masks_never_renormalise() -> None:
    """A masked token leaves the others' gradient exactly as it was."""
    engines = PlainEngine(lr=1.0), PlainEngine(lr=1.0)
    made = rows(engines[0])
    start = engines[0].model.weight.detach().clone()
    made[0].sampler_logprobs[:] -= 3.0
    step(engines[0], lay_out([made]), importance_level="token", importance_mode="mask")
    made[0] = dataclasses.replace(made[0], advantage=0.0)
    step(engines[1], lay_out([made]))
    torch.testing.assert_close(engines[0].model.weight, engines[1].model.weight, atol=1e-7, rtol=0)
    assert not torch.equal(engines[0].model.weight, start)


def test_rejected_sequences_take_no_part_in_the_policy_term() -> None:
    engine, other = PlainEngine(lr=1.0), PlainEngine(lr=1.0)
    made = rows(engine)
    made[1].sampler_logprobs[:] += 1.0  # geometric mean of the weights exp(-1)
    tally = step(engine, lay_out([made]), rejection_low=0.5, rejection_high=2.0)
    assert tally.sums["mismatch/rejected_sequence_fraction"] == [1.0, len(made)]
    made[1] = dataclasses.replace(made[1], advantage=0.0)
    step(other, lay_out([made]))
    torch.testing.assert_close(engine.model.weight, other.model.weight, atol=1e-7, rtol=0)


def test_entropy_bonus_flattens_the_policy() -> None:
    plain, curious = PlainEngine(lr=1.0), PlainEngine(lr=1.0)
    made = [dataclasses.replace(row, advantage=0.0) for row in rows(plain, count=12)]
    before = step(plain, lay_out([made])).sums["policy/entropy"]
    for _ in range(30):
        step(curious, lay_out([made]), entropy_coef=0.5)
    after = step(curious, lay_out([made])).sums["policy/entropy"]
    assert after[0] / after[1] > before[0] / before[1] + 0.1


def in_row(values: torch.Tensor, batch: Batch, row: int) -> list[float]:
    """Return the values of one row's trained tokens; `values` has those of the whole batch, row after row."""
    return values.split(batch.completion_mask.sum(1).tolist())[row].tolist()


def naive_advantages(
    engine: PlainEngine, row: TrainingRow, *, gamma: float, lam: float, beta: float, bootstrap: bool
) -> list[float]:
    """GAE of one row with k1 to the reference in the reward, written backwards from the definition."""
    ids = [*row.prompt_ids, *row.completion_ids.tolist()]
    first = len(row.prompt_ids)
    policy = torch.log_softmax(engine.model.weight.detach(), -1)
    anchor = torch.log_softmax(engine.reference.weight, -1)
    value = [float(engine.critic.weight[ids[t - 1], 0].detach()) for t in range(first, len(ids))]
    value.append(float(engine.critic.weight[ids[-1], 0].detach()) if bootstrap and row.truncated else 0.0)
    rewards = [-beta * float(policy[ids[t - 1], ids[t]] - anchor[ids[t - 1], ids[t]]) for t in range(first, len(ids))]
    rewards[-1] += row.reward
    deltas = [r + gamma * value[t + 1] - value[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("truncated", ["zero", "bootstrap"])
def test_gae_with_kl_in_the_reward_equals_its_definition(truncated: str) -> None:
    engine = PlainEngine()
    torch.manual_seed(5)
    torch.nn.init.normal_(engine.critic.weight)
    made = rows(engine, count=5)
    with torch.no_grad():
        engine.model.weight += 0.3 * torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64)
    laid_out = lay_out([made], budget=12, kl_coef=0.2)
    algorithm = settings(advantage="gae", gamma=0.9, gae_lambda=0.8, kl_coef=0.2, kl_place="reward", kl_estimator="k1")
    prepared = prepare(laid_out, engine, algorithm, CriticConfig(truncated=truncated), CPU, Tally())
    naive = {
        row.rollout_index: naive_advantages(
            engine, row, gamma=0.9, lam=0.8, beta=0.2, bootstrap=truncated == "bootstrap"
        )
        for row in made
    }
    flat = [x for values in naive.values() for x in values]
    mean = sum(flat) / len(flat)
    scale = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1) + 1e-8)
    for batch, got in zip(laid_out.minibatches[0], prepared[0], strict=True):
        for i, index in enumerate(batch.rollout_index.tolist()):
            expected = [(x - mean) / scale for x in naive[index]]
            assert in_row(got.advantages, batch, i) == pytest.approx(expected, abs=1e-5)
            returns = [a + v for a, v in zip(naive[index], in_row(got.old_values, batch, i), strict=True)]
            assert in_row(got.returns, batch, i) == pytest.approx(returns, abs=1e-5)


def test_the_critic_learns_what_states_are_worth() -> None:
    engine = PlainEngine(lr=0.5)
    made = [dataclasses.replace(row, reward=1.0, truncated=False) for row in rows(engine, count=12)]
    first = step(engine, lay_out([made]), CriticConfig(clip=None), advantage="gae")
    for _ in range(60):
        last = step(engine, lay_out([made]), CriticConfig(clip=None), advantage="gae")
    error = [tally.sums["value/error_square"][0] / tally.sums["value/error_square"][1] for tally in (first, last)]
    assert error[0] == pytest.approx(1.0)
    assert error[1] < 0.05
    assert last.sums["value/grad_norm"][1] == 1


def test_reinforce_pp_is_discounted_penalised_and_whitened() -> None:
    engine = PlainEngine()
    made = rows(engine, count=6)
    laid_out = lay_out([made], budget=12)
    prepared = prepare(laid_out, engine, settings(advantage="reinforce_pp", gamma=0.5), CriticConfig(), CPU, Tally())
    raw = {
        row.rollout_index: [
            row.reward * 0.5 ** (len(row.completion_ids) - 1 - t) for t in range(len(row.completion_ids))
        ]
        for row in made
    }
    flat = [x for values in raw.values() for x in values]
    mean = sum(flat) / len(flat)
    scale = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1) + 1e-8)
    for batch, ready in zip(laid_out.minibatches[0], prepared[0], strict=True):
        for i, index in enumerate(batch.rollout_index.tolist()):
            got = in_row(ready.advantages, batch, i)
            assert got == pytest.approx([(x - mean) / scale for x in raw[index]], abs=1e-6)


def test_kl_in_the_reward_is_a_return_to_go_on_top_of_the_advantage() -> None:
    engine = PlainEngine()
    made = rows(engine, count=4)
    with torch.no_grad():
        engine.model.weight += 0.3 * torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64)
    laid_out = lay_out([made], kl_coef=0.2)
    algorithm = settings(kl_coef=0.2, kl_place="reward", kl_estimator="k1")
    tally = Tally()
    prepared = prepare(laid_out, engine, algorithm, CriticConfig(), CPU, tally)
    [[batch]], [[ready]] = laid_out.minibatches, prepared
    policy = torch.log_softmax(engine.model.weight.detach(), -1)
    anchor = torch.log_softmax(engine.reference.weight, -1)
    total = 0.0
    for i, index in enumerate(batch.rollout_index.tolist()):
        row = next(r for r in made if r.rollout_index == index)
        ids = [*row.prompt_ids, *row.completion_ids.tolist()]
        kl = [float((policy - anchor)[ids[t - 1], ids[t]]) for t in range(len(row.prompt_ids), len(ids))]
        expected = [row.advantage - 0.2 * sum(kl[t:]) for t in range(len(kl))]
        got = in_row(ready.advantages, batch, i)
        assert got == pytest.approx(expected, abs=1e-6)
        total += sum(kl)
    assert tally.kl_ref.total == pytest.approx(total, abs=1e-6)


def test_the_reference_is_asked_once_a_step_however_many_epochs() -> None:
    engine = PlainEngine()
    made = rows(engine)
    engine.forwards = 0
    step(engine, lay_out([made], epochs=3, kl_coef=0.1), kl_coef=0.1)
    assert engine.forwards == 1 + 3  # old logprobs, then one a microbatch and epoch
