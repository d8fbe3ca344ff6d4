"""The learner's arithmetic on a plain torch engine that really trains."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from grpo.batching import TrainingRow, rank_steps
from grpo.logprobs import selected_logprobs
from grpo.update import NonFiniteError, Objective, run_step

VOCABULARY = 6
CPU = torch.device("cpu")


class PlainEngine:
    """A bigram model and SGD behind the `PolicyEngine` protocol."""

    def __init__(self, lr: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.float64)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.boundaries: list[bool] = []

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids)

    def ref_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.reference(input_ids)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.boundaries.append(last)
        loss.backward()

    def optimizer_step(self) -> float:
        norm = float(self.model.weight.grad.norm())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def any_rank(self, flag: bool) -> bool:
        return flag


def objective(**changes: float) -> Objective:
    values = {"temperature": 1.0, "eps_low": 0.2, "eps_high": 0.2, "kl_coef": 0.0, "importance_weight_cap": 0.0}
    return Objective(**{**values, **changes})


def rows(engine: PlainEngine, count: int = 6, temperature: float = 1.0, seed: int = 1) -> list[TrainingRow]:
    """Rows whose sampler logprobs are the model's own."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        prompt = rng.integers(VOCABULARY, size=2).tolist()
        completion = rng.integers(VOCABULARY, size=int(rng.integers(1, 5))).astype(np.int32)
        tokens = torch.tensor(prompt + completion.tolist())
        with torch.no_grad():
            logprobs, _ = selected_logprobs(
                engine.logits(tokens[None, 1:-1]), tokens[None, 2:], temperature=temperature
            )
        made.append(
            TrainingRow(
                rollout_index=index,
                prompt_ids=prompt,
                completion_ids=completion,
                sampler_logprobs=logprobs[0].numpy().astype(np.float32),
                sampled_mask=np.ones(len(completion), dtype=bool),
                advantage=float(rng.normal()),
            )
        )
    return made


def lay_out(minibatches, epochs=1, budget=1000):
    return rank_steps(minibatches, ranks=1, tokens_per_microbatch=budget, aggregation="token_mean", epochs=epochs)[0]


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
    tally, updates = run_step(lay_out([made]), engine, objective(), CPU)
    assert updates == 1
    torch.testing.assert_close(engine.model.weight.detach(), (before - before.grad).detach(), atol=1e-8, rtol=0)
    assert tally.sums["policy/clip_fraction_low"] == [0.0, tokens]
    assert tally.sums["policy/ratio_mean"] == [tokens, tokens]


@pytest.mark.parametrize("budget", [1, 8, 1000])
def test_microbatches_do_not_change_the_update(budget: int) -> None:
    whole, split = PlainEngine(), PlainEngine()
    made = rows(whole)
    run_step(lay_out([made]), whole, objective(kl_coef=0.1), CPU)
    run_step(lay_out([made], budget=budget), split, objective(kl_coef=0.1), CPU)
    torch.testing.assert_close(whole.model.weight, split.model.weight, atol=1e-9, rtol=0)
    assert split.boundaries == [False] * (len(split.boundaries) - 1) + [True]


def test_old_logprobs_are_those_of_the_step_start() -> None:
    engine = PlainEngine(lr=5.0)
    made = rows(engine, count=8)
    tally, updates = run_step(lay_out([made[:4], made[4:]], epochs=2), engine, objective(), CPU)
    assert updates == 4
    tokens = sum(len(row.completion_ids) for row in made)
    assert tally.sums["mismatch/mean"][0] / tokens < 1e-6  # measured before any update, and once per token
    assert tally.sums["mismatch/mean"][1] == tokens
    assert tally.sums["policy/kl_old"][1] == 2 * tokens
    assert tally.sums["policy/kl_old"][0] > 1e-3  # later updates see a moved policy


def test_truncated_importance_weights_are_counted() -> None:
    engine = PlainEngine()
    made = rows(engine)
    tokens = sum(len(row.completion_ids) for row in made)
    made[0].sampler_logprobs[:] -= 1.0  # weight e on these tokens, 1 elsewhere
    tally, _ = run_step(lay_out([made]), engine, objective(importance_weight_cap=2.0), CPU)
    fraction = tally.sums["mismatch/importance_weight_truncated_fraction"]
    assert fraction == [len(made[0].completion_ids), tokens]


def test_forwards_without_gradient_are_timed() -> None:
    engine = PlainEngine()
    made = rows(engine)
    tally, _ = run_step(lay_out([made]), engine, objective(), CPU)
    assert not any(name.startswith("time/") for name in tally.extremes)
    tally, _ = run_step(lay_out([made], epochs=2), engine, objective(kl_coef=0.1), CPU)
    assert tally.extremes["time/old_logprobs_s"] > 0
    assert tally.extremes["time/ref_logprobs_s"] > 0


def test_temperature_is_replayed() -> None:
    for temperature, small in ((0.6, True), (1.0, False)):
        engine = PlainEngine()
        made = rows(engine, temperature=0.6)
        tally, _ = run_step(lay_out([made]), engine, objective(temperature=temperature), CPU)
        assert (tally.extremes["mismatch/max"] < 1e-6) is small


def test_logprob_sums_come_back_per_rollout() -> None:
    engine = PlainEngine()
    made = rows(engine)
    expected = {row.rollout_index: float(row.sampler_logprobs.sum()) for row in made}
    tally, _ = run_step(lay_out([made], budget=6), engine, objective(), CPU)
    assert tally.learner_logprob_sums == pytest.approx(expected, abs=1e-5)


def test_a_non_finite_loss_stops_before_the_weights_move() -> None:
    engine = PlainEngine()
    made = rows(engine)
    with torch.no_grad():
        engine.model.weight[3, 2] = float("nan")
    before = engine.model.weight.detach().clone()
    with pytest.raises(NonFiniteError):
        run_step(lay_out([made]), engine, objective(), CPU)
    assert torch.equal(engine.model.weight.nan_to_num(7.0), before.nan_to_num(7.0))


def test_the_reference_pulls_back() -> None:
    free, anchored = PlainEngine(lr=1.0), PlainEngine(lr=1.0)
    made = rows(free)
    for _ in range(20):
        run_step(lay_out([made]), free, objective(), CPU)
        run_step(lay_out([made]), anchored, objective(kl_coef=1.0), CPU)

    def distance(engine: PlainEngine) -> float:
        return float((engine.model.weight - engine.reference.weight).detach().norm())

    assert distance(anchored) < 0.7 * distance(free)
