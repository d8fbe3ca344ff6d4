"""The parts of a loss by hand and against naive loops, their gradients, and that no layout of a step changes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import importance_weight, kept_sequences, policy_term

from grpo.objective.compatibility import LEGAL_AGGREGATIONS, Aggregation, PolicyLoss
from grpo.objective.losses import PolicyTerm, aggregation_weights, bounded_weight, clipped_value_loss, ppo_clip

EPS_LOW, EPS_HIGH, DUAL_CLIP, TAU_POSITIVE, TAU_NEGATIVE = 0.2, 0.3, 1.7, 1.0, 1.4
OPTIONS: dict[str, Any] = {
    "eps_low": EPS_LOW, "eps_high": EPS_HIGH, "dual_clip": None, "tau_positive": TAU_POSITIVE,
    "tau_negative": TAU_NEGATIVE,
}  # fmt: skip
LOSSES: tuple[PolicyLoss, ...] = get_args(PolicyLoss)
PAIRS = [(loss, aggregation) for loss in LOSSES for aggregation in LEGAL_AGGREGATIONS[loss]]

Rows = list[list[float]]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def example(seed: int, *, token_advantages: bool = False, rows: int = 5, positions: int = 7) -> dict[str, torch.Tensor]:
    """[B,T] inputs in float64, 0 off a mask with holes; ratios far outside the clip range among them."""
    generator = torch.Generator().manual_seed(seed)
    new = -2 * torch.rand(rows, positions, generator=generator, dtype=torch.float64)
    old = new + 0.5 * torch.randn(rows, positions, generator=generator, dtype=torch.float64)
    old = old + 0.3 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    columns = positions if token_advantages else 1
    advantages = torch.randn(rows, columns, generator=generator, dtype=torch.float64).expand(rows, positions)
    mask = torch.rand(rows, positions, generator=generator) < 0.7
    mask[:, 2] = True
    tensors = {"logprobs": new, "old_logprobs": old, "advantages": advantages}
    return {name: torch.where(mask, value, 0.0) for name, value in tensors.items()} | {"mask": mask}


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(
    loss: PolicyLoss,
    new: Rows,
    old: Rows,
    advantages: Rows,
    mask: list[list[bool]],
    *,
    frozen: Rows | None = None,
    dual_clip: float | None = None,
) -> Rows:
    """Token losses from the formulas. `frozen`: the logprobs where a formula stops the gradient; the same by default,
    kept still while `new` moves to differentiate the surrogate."""
    still = new if frozen is None else frozen
    out = [[0.0] * len(row) for row in new]
    for b in range(len(new)):
        taken = [t for t in range(len(new[b])) if mask[b][t]]
        n = len(taken)
        sequence = math.exp(sum(still[b][t] - old[b][t] for t in taken) / n) if n else 1.0
        bounded = []
        for t in taken:
            difference, advantage = new[b][t] - old[b][t], advantages[b][t]
            kept = min(difference, EPS_HIGH) if advantage > 0 else max(difference, -EPS_LOW)
            bounded.append(kept if advantage != 0 else 0.0)
        for t in taken:
            advantage = advantages[b][t]
            ratio = math.exp(new[b][t] - old[b][t])
            if loss == "gspo":
                ratio = sequence * math.exp(new[b][t] - still[b][t])
            if loss in ("ppo_clip", "gspo"):
                objective = min(ratio * advantage, clip(ratio, 1 - EPS_LOW, 1 + EPS_HIGH) * advantage)
                if dual_clip is not None and advantage < 0:
                    objective = max(objective, dual_clip * advantage)
                out[b][t] = -objective
            elif loss == "cispo":
                weight = clip(math.exp(still[b][t] - old[b][t]), 1 - EPS_LOW, 1 + EPS_HIGH)
                out[b][t] = -weight * advantage * new[b][t]
            elif loss == "sapo":
                tau = TAU_POSITIVE if advantage > 0 else TAU_NEGATIVE
                out[b][t] = -4 / tau * sigmoid(tau * (ratio - 1)) * advantage
            elif loss == "gmpo":
                row_advantage = sum(advantages[b][s] for s in taken) / n
                out[b][t] = -math.exp(sum(bounded) / n) * row_advantage
            else:
                out[b][t] = -advantage * new[b][t]
    return out


def lists(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    short = {"logprobs": "new", "old_logprobs": "old", "advantages": "advantages", "mask": "mask"}
    return {short[name]: value.tolist() for name, value in inputs.items()}


def difference_quotients(value: Callable[[Rows], Rows], at: Rows, weights: Rows) -> Rows:
    """d sum(weights * value(x)) / d x by central differences."""

    def total(rows: Rows) -> float:
        losses = value(rows)
        return math.fsum(w * x for ws, xs in zip(weights, losses, strict=True) for w, x in zip(ws, xs, strict=True))

    step, out = 1e-6, [[0.0] * len(row) for row in at]
    for b in range(len(at)):
        for t in range(len(at[b])):
            up, down = [list(row) for row in at], [list(row) for row in at]
            up[b][t] += step
            down[b][t] -= step
            out[b][t] = (total(up) - total(down)) / (2 * step)
    return out


def gradient(
    loss: PolicyLoss, inputs: dict[str, torch.Tensor], weights: torch.Tensor, **changes: Any
) -> tuple[torch.Tensor, PolicyTerm]:
    new = inputs["logprobs"].clone().requires_grad_()
    term = policy_term(loss, **{**OPTIONS, **inputs, "logprobs": new, **changes})
    [grad] = torch.autograd.grad((weights * term.loss).sum(), new)
    return grad, term


def random_weights(mask: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.where(mask, torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).double(), 0.0)


VARIANTS = [(loss, None) for loss in LOSSES] + [("ppo_clip", DUAL_CLIP)]


@pytest.mark.parametrize("token_advantages", [False, True])
@pytest.mark.parametrize(("loss", "dual_clip"), VARIANTS)
def test_values_equal_a_naive_loop(loss: PolicyLoss, dual_clip: float | None, token_advantages: bool) -> None:
    for seed in range(4):
        inputs = example(seed, token_advantages=token_advantages)
        result = policy_term(loss, **inputs, **{**OPTIONS, "dual_clip": dual_clip}).loss
        expected = torch.tensor(naive(loss, **lists(inputs), dual_clip=dual_clip), dtype=torch.float64)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
        assert (result[~inputs["mask"]] == 0).all()


@pytest.mark.parametrize("token_advantages", [False, True])
@pytest.mark.parametrize(("loss", "dual_clip"), VARIANTS)
def test_gradients_equal_finite_differences(loss: PolicyLoss, dual_clip: float | None, token_advantages: bool) -> None:
    inputs = example(11, token_advantages=token_advantages)
    weights = random_weights(inputs["mask"], 0)
    grad, _ = gradient(loss, inputs, weights, dual_clip=dual_clip)
    fixed = lists(inputs)
    at = fixed.pop("new")
    numeric = difference_quotients(
        lambda new: naive(loss, new, **fixed, frozen=at, dual_clip=dual_clip), at, weights.tolist()
    )
    torch.testing.assert_close(grad, torch.tensor(numeric, dtype=torch.float64), rtol=0, atol=1e-7)
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["gspo", "gmpo"])
def test_under_its_aggregation_a_sequence_loss_has_the_gradient_of_the_sequence_objective(loss: PolicyLoss) -> None:
    inputs = example(12)
    mask = inputs["mask"]
    weights = mask / (len(mask) * mask.sum(1, keepdim=True))
    grad, _ = gradient(loss, inputs, weights)
    fixed = lists(inputs)
    at = fixed.pop("new")
    # nothing frozen: the whole row's ratio moves with each of its tokens
    numeric = difference_quotients(lambda new: naive(loss, new, **fixed), at, weights.tolist())
    torch.testing.assert_close(grad, torch.tensor(numeric, dtype=torch.float64), rtol=0, atol=1e-7)


@every_loss
@pytest.mark.parametrize("token_advantages", [False, True])
def test_ratio_one_gives_the_gradient_of_reinforce(loss: PolicyLoss, token_advantages: bool) -> None:
    inputs = example(0, token_advantages=token_advantages)
    mask, advantages = inputs["mask"], inputs["advantages"]
    lengths = mask.sum(1, keepdim=True)
    if "token_mean" in LEGAL_AGGREGATIONS[loss]:
        weights = mask / mask.sum().double()
    else:
        weights = mask / (len(mask) * lengths).double()
    if loss == "gmpo":
        advantages = torch.where(mask, advantages.sum(1, keepdim=True) / lengths, 0.0)
    new = inputs["logprobs"].clone().requires_grad_()
    term = policy_term(loss, **{**OPTIONS, **inputs, "logprobs": new, "old_logprobs": new.detach()})
    [grad] = torch.autograd.grad((weights * term.loss).sum(), new)
    torch.testing.assert_close(grad, -advantages * weights, rtol=0, atol=1e-15)
    assert not term.clipped_low.any()
    assert not term.clipped_high.any()


@every_loss
def test_old_logprobs_are_detached(loss: PolicyLoss) -> None:
    inputs = example(1)
    new = inputs["logprobs"].clone().requires_grad_()
    arguments = {**OPTIONS, **inputs, "logprobs": new, "old_logprobs": new}
    [grad] = torch.autograd.grad(policy_term(loss, **arguments).loss.sum(), new)
    assert (grad[inputs["mask"]] != 0).all()


@pytest.mark.parametrize(("loss", "dual_clip"), VARIANTS)
def test_zero_advantage_gives_exactly_zero(loss: PolicyLoss, dual_clip: float | None) -> None:
    inputs = example(2)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    grad, term = gradient(loss, inputs, torch.ones_like(inputs["logprobs"]), dual_clip=dual_clip)
    assert (grad == 0).all()
    assert (term.loss == 0).all()
    assert not term.clipped_low.any()
    assert not term.clipped_high.any()


@every_loss
def test_a_row_with_zero_advantage_has_no_gradient_beside_others(loss: PolicyLoss) -> None:
    inputs = example(3)
    inputs["advantages"][1] = 0.0
    grad, _ = gradient(loss, inputs, torch.ones_like(inputs["logprobs"]))
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).any()


# ratio below, below, above, above, within, within its range, with both signs of the advantage
SIDES = [(0.5, 1.0), (0.5, -1.0), (2.0, 1.0), (2.0, -1.0), (1.1, 1.0), (0.9, -1.0)]
STOPPED_LOW = [False, True, False, False, False, False]
STOPPED_HIGH = [False, False, True, False, False, False]
BOUNDED_LOW = [True, True, False, False, False, False]
BOUNDED_HIGH = [False, False, True, True, False, False]
NOTHING = [False] * 6


@pytest.mark.parametrize(
    ("loss", "low", "high"),
    [
        ("ppo_clip", STOPPED_LOW, STOPPED_HIGH),
        ("gspo", STOPPED_LOW, STOPPED_HIGH),
        ("gmpo", STOPPED_LOW, STOPPED_HIGH),
        ("cispo", BOUNDED_LOW, BOUNDED_HIGH),
        ("sapo", NOTHING, NOTHING),
        ("reinforce", NOTHING, NOTHING),
    ],
)
def test_clip_sides_are_told_apart(loss: PolicyLoss, low: list[bool], high: list[bool]) -> None:
    ratio = torch.tensor([[r, r] for r, _ in SIDES], dtype=torch.float64)
    inputs = {
        "logprobs": ratio.log(), "old_logprobs": torch.zeros(6, 2, dtype=torch.float64),
        "advantages": torch.tensor([[a, a] for _, a in SIDES], dtype=torch.float64),
        "mask": torch.ones(6, 2, dtype=torch.bool),
    }  # fmt: skip
    grad, term = gradient(loss, inputs, torch.ones(6, 2, dtype=torch.float64))
    assert term.clipped_low.tolist() == [[x, x] for x in low]
    assert term.clipped_high.tolist() == [[x, x] for x in high]
    stopped = term.clipped_low | term.clipped_high
    if loss == "cispo":  # bounded, not stopped
        weight = [0.8, 0.8, 1.3, 1.3, 1.1, 0.9]
        expected = [[-w * a, -w * a] for w, (_, a) in zip(weight, SIDES, strict=True)]
        torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    else:
        assert torch.equal(grad == 0, stopped)


def test_the_two_clip_ranges_are_not_confused() -> None:
    ratio = torch.tensor([[0.75, 1.25, 1.35]], dtype=torch.float64)
    term = ppo_clip(ratio.log(), torch.tensor([[-1.0, 1.0, 1.0]]).double(), eps_low=0.2, eps_high=0.3, dual_clip=None)
    assert term.loss.tolist()[0] == pytest.approx([0.8, -1.25, -1.3], abs=1e-12)
    assert term.clipped_low.tolist() == [[True, False, False]]
    assert term.clipped_high.tolist() == [[False, False, True]]


def test_a_ratio_that_overflows_without_advantage_is_nothing() -> None:
    log_ratio = torch.tensor([[100.0, 0.1]], requires_grad=True)  # exp(100) is infinite in float32
    term = ppo_clip(log_ratio, torch.tensor([[0.0, 1.0]]), eps_low=0.2, eps_high=0.2, dual_clip=3.0)
    [slope] = torch.autograd.grad(term.loss.sum(), log_ratio)
    assert term.loss[0, 0] == 0
    assert slope.tolist() == [[0.0, pytest.approx(-math.exp(0.1))]]


def test_dual_clip_stops_large_ratios_of_negative_advantages_alone() -> None:
    ratio = torch.tensor([[4.0, 2.0, 4.0, 0.5]], dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    advantages = torch.tensor([[-2.0, -2.0, 2.0, -2.0]], dtype=torch.float64)
    term = ppo_clip(log_ratio, advantages, eps_low=0.2, eps_high=0.3, dual_clip=3.0)
    # 3 * 2 instead of 4 * 2; 2 * 2 as it is; -1.3 * 2; 0.8 * 2
    assert term.loss.tolist()[0] == pytest.approx([6.0, 4.0, -2.6, 1.6], abs=1e-12)
    assert term.clipped_high.tolist() == [[True, False, True, False]]
    assert term.clipped_low.tolist() == [[False, False, False, True]]
    term.loss.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist()[0] == pytest.approx([0.0, 4.0, 0.0, 0.0], abs=1e-12)


def test_gspo_clips_the_row_and_not_its_tokens() -> None:
    log_ratio = [math.log(3.0), -math.log(3.0), 0.0]  # each far outside or at 1, their mean exactly 1
    inputs = {
        "logprobs": torch.tensor([log_ratio], dtype=torch.float64), "mask": torch.ones(1, 3, dtype=torch.bool),
        "old_logprobs": torch.zeros(1, 3, dtype=torch.float64), "advantages": torch.ones(1, 3, dtype=torch.float64),
    }  # fmt: skip
    grad, term = gradient("gspo", inputs, torch.ones(1, 3, dtype=torch.float64))
    assert term.loss.tolist()[0] == pytest.approx([-1.0] * 3, abs=1e-12)
    assert grad.tolist()[0] == pytest.approx([-1.0] * 3, abs=1e-12)
    assert not (term.clipped_low | term.clipped_high).any()


def test_gmpo_by_hand() -> None:
    inputs = {
        "logprobs": torch.tensor([[1.0, 0.1, -1.0, 9.0]], dtype=torch.float64),
        "old_logprobs": torch.zeros(1, 4, dtype=torch.float64),
        "advantages": torch.tensor([[2.0, 2.0, 2.0, 0.0]], dtype=torch.float64),
        "mask": torch.tensor([[True, True, True, False]]),
    }
    # log ratios 0.3 (clipped), 0.1, -1 (the advantage does not push it down): mean -0.2
    _, term = gradient("gmpo", inputs, torch.ones(1, 4, dtype=torch.float64))
    assert term.loss.tolist()[0] == pytest.approx([-2 * math.exp(-0.2)] * 3 + [0.0], abs=1e-12)
    assert term.clipped_high.tolist() == [[True, False, False, False]]
    inputs["advantages"] = -inputs["advantages"]
    # log ratios 1, 0.1, -0.2 (clipped): mean 0.3
    _, term = gradient("gmpo", inputs, torch.ones(1, 4, dtype=torch.float64))
    assert term.loss.tolist()[0] == pytest.approx([2 * math.exp(0.3)] * 3 + [0.0], abs=1e-12)
    assert term.clipped_low.tolist() == [[False, False, True, False]]


@every_loss
def test_nan_behind_the_mask_reaches_neither_value_nor_gradient(loss: PolicyLoss) -> None:
    inputs = example(4)
    mask = inputs["mask"]
    poison = torch.where(mask, 0.0, float("nan"))
    leaf = (inputs["logprobs"] + poison).requires_grad_()
    cleaned = {
        name: torch.where(mask, value, 0.0)
        for name, value in {
            "logprobs": leaf, "old_logprobs": inputs["old_logprobs"] + poison,
            "advantages": inputs["advantages"] + poison,
        }.items()
    }  # fmt: skip
    term = policy_term(loss, **OPTIONS, **cleaned, mask=mask)
    [grad] = torch.autograd.grad(term.loss.sum(), leaf)
    clean, _ = gradient(loss, inputs, torch.ones_like(inputs["logprobs"]))
    torch.testing.assert_close(grad, clean, rtol=0, atol=0)
    assert torch.isfinite(term.loss).all()
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("loss", ["gspo", "gmpo"])
def test_a_row_without_tokens_is_no_nan(loss: PolicyLoss) -> None:
    inputs = example(5)
    inputs["mask"][0] = False
    inputs = {name: torch.where(inputs["mask"], value, value.new_zeros(())) for name, value in inputs.items()}
    grad, term = gradient(loss, inputs, torch.ones_like(inputs["logprobs"]))
    assert (term.loss[0] == 0).all()
    assert (grad[0] == 0).all()


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """A step's rows and another layout of them: order, cuts into microbatches and extra padding on either side."""
    rows = draw(st.integers(2, 6))
    inputs = example(draw(st.integers(0, 10**6)), token_advantages=draw(st.booleans()), rows=rows, positions=4)
    prompts = draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    order = draw(st.permutations(range(rows)))
    if draw(st.booleans()):  # whole groups change places
        order = sorted(range(rows), key=lambda i: (-prompts[i], i))
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1), max_size=3)))
    padding = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=4, max_size=4))
    return {"inputs": inputs, "prompts": prompts, "order": order, "cuts": cuts, "padding": padding}


@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
@settings(deadline=None, max_examples=20)
@given(steps())
def test_no_layout_of_a_step_changes_loss_or_gradient(
    loss: PolicyLoss, aggregation: Aggregation, step: dict[str, Any]
) -> None:
    inputs, prompts, order = step["inputs"], step["prompts"], step["order"]

    def weigh(rows: list[int]) -> torch.Tensor:
        lengths = [int(inputs["mask"][i].sum()) for i in rows]
        weights = aggregation_weights(lengths, [prompts[i] for i in rows], aggregation=aggregation, constant_length=11)
        return torch.tensor(weights, dtype=torch.float64)[:, None] * inputs["mask"][rows]

    def evaluate(rows: list[int], weights: torch.Tensor, left: int, right: int) -> tuple[float, torch.Tensor]:
        def pad(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x, (left, right))

        padded = {name: pad(value[rows]) for name, value in inputs.items()}
        grad, term = gradient(loss, padded, pad(weights))
        outside = torch.cat([grad[:, :left], grad[:, left + 4 :]], 1)
        assert (outside == 0).all()
        return float((pad(weights) * term.loss.detach()).sum()), grad[:, left : left + 4]

    all_rows = list(range(len(prompts)))
    whole, whole_grad = evaluate(all_rows, weigh(all_rows), 0, 0)
    weights = weigh(order)  # once, over the whole step in its new order
    edges = [0, *step["cuts"], len(order)]
    total, grads = 0.0, []
    for (start, stop), (left, right) in zip(pairwise(edges), step["padding"], strict=False):
        part, grad = evaluate(order[start:stop], weights[start:stop], left, right)
        total += part
        grads.append(grad)
    assert total == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(torch.cat(grads), whole_grad[order], rtol=0, atol=1e-12)


def test_every_loss_has_its_legal_aggregations() -> None:
    assert set(LEGAL_AGGREGATIONS) == set(LOSSES)
    assert len(PAIRS) == 4 * 5 + 2
    for loss in ("gspo", "gmpo"):
        assert LEGAL_AGGREGATIONS[loss] == ("sequence_mean",)


ALL: tuple[Aggregation, ...] = get_args(Aggregation)
MEANS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "prompt_mean")

LENGTHS, PROMPTS = [1, 4, 5], [7, 7, 3]
BY_HAND: dict[Aggregation, list[float]] = {
    "token_mean": [1 / 10, 1 / 10, 1 / 10],
    "sequence_mean": [1 / 3, 1 / 12, 1 / 15],
    "sequence_sum": [1 / 3, 1 / 3, 1 / 3],
    "constant_length": [1 / 24, 1 / 24, 1 / 24],
    "prompt_mean": [1 / 10, 1 / 10, 1 / 10],
}

rows = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=12)


def weigh(lengths: list[int], prompts: list[int], aggregation: Aggregation) -> list[float]:
    return aggregation_weights(lengths, prompts, aggregation=aggregation, constant_length=8)


@pytest.mark.parametrize("aggregation", ALL)
def test_weights_by_hand(aggregation: Aggregation) -> None:
    assert weigh(LENGTHS, PROMPTS, aggregation) == pytest.approx(BY_HAND[aggregation], abs=1e-15)


def test_prompt_mean_by_hand_with_prompts_of_unequal_size() -> None:
    # three prompts with 3, 6 and 1 tokens
    weights = weigh([1, 6, 2, 1], [0, 1, 0, 5], "prompt_mean")
    assert weights == pytest.approx([1 / 9, 1 / 18, 1 / 9, 1 / 3], abs=1e-15)


@pytest.mark.parametrize("aggregation", ALL)
def test_loss_is_the_mean_that_its_name_says(aggregation: Aggregation) -> None:
    losses = [[2.0], [1.0, 3.0, 5.0, 7.0], [1.0, 1.0, 1.0, 1.0, 6.0]]  # row sums 2, 16, 10
    expected = {
        "token_mean": 28 / 10,
        "sequence_mean": (2 + 4 + 2) / 3,
        "sequence_sum": 28 / 3,
        "constant_length": 28 / (3 * 8),
        "prompt_mean": (18 / 5 + 10 / 5) / 2,
    }[aggregation]
    weights = weigh(LENGTHS, PROMPTS, aggregation)
    assert sum(w * sum(row) for w, row in zip(weights, losses, strict=True)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("aggregation", MEANS)
@given(rows)
def test_means_add_up_to_one(aggregation: Aggregation, step: list[tuple[int, int]]) -> None:
    lengths, prompts = [length for length, _ in step], [prompt for _, prompt in step]
    weights = weigh(lengths, prompts, aggregation)
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("aggregation", ALL)
@given(rows, st.data())
def test_row_order_and_prompt_names_do_not_matter(
    aggregation: Aggregation, step: list[tuple[int, int]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(step))))
    names = data.draw(st.permutations(range(10, 14)))
    before = weigh([n for n, _ in step], [p for _, p in step], aggregation)
    after = weigh([step[i][0] for i in order], [names[step[i][1]] for i in order], aggregation)
    assert after == pytest.approx([before[i] for i in order], abs=1e-15)


@pytest.mark.parametrize("aggregation", MEANS)
def test_a_split_step_needs_the_weights_of_the_whole(aggregation: Aggregation) -> None:
    lengths, prompts, values = [2, 3, 9, 1], [0, 0, 1, 1], [1.0, -2.0, 0.5, 4.0]
    weights = weigh(lengths, prompts, aggregation)
    parts = [sum(weights[i] * lengths[i] * values[i] for i in part) for part in ([0, 2], [1], [3])]
    whole = {
        "token_mean": (2 - 6 + 4.5 + 4) / 15,
        "sequence_mean": (1 - 2 + 0.5 + 4) / 4,
        "prompt_mean": (-4 / 5 + 8.5 / 10) / 2,
    }[aggregation]
    assert sum(parts) == pytest.approx(whole, abs=1e-12)
    of_parts = [
        w
        for part in ([0, 1], [2, 3])
        for w in weigh([lengths[i] for i in part], [prompts[i] for i in part], aggregation)
    ]
    assert of_parts != pytest.approx(weights)


def test_only_constant_length_reads_the_constant() -> None:
    for aggregation in ALL:
        other = aggregation_weights(LENGTHS, PROMPTS, aggregation=aggregation, constant_length=16)
        scale = 0.5 if aggregation == "constant_length" else 1.0
        assert other == pytest.approx([scale * w for w in weigh(LENGTHS, PROMPTS, aggregation)], abs=1e-15)


MASK = torch.tensor(
    [
        [True, True, True, True],
        [False, True, False, True],
        [True, False, False, False],
        [False, False, False, False],
    ]
)


def draw(seed: int, scale: float = 0.5) -> torch.Tensor:
    return scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def taken(row: int) -> list[int]:
    return [t for t in range(4) if MASK[row, t]]


OLD, SAMPLER = draw(0) - 1, draw(1) - 1


def test_no_level_gives_ones() -> None:
    assert torch.equal(importance_weight(OLD, SAMPLER, MASK, level="none"), torch.ones(4, 4, dtype=torch.float64))


def test_token_weights_equal_a_naive_loop() -> None:
    weight = importance_weight(OLD, SAMPLER, MASK, level="token")
    for b in range(4):
        for t in range(4):
            expected = math.exp(float(OLD[b, t]) - float(SAMPLER[b, t])) if MASK[b, t] else 1.0
            assert float(weight[b, t]) == pytest.approx(expected, abs=1e-12)


def test_sequence_weights_are_the_product_over_the_row() -> None:
    weight = importance_weight(OLD, SAMPLER, MASK, level="sequence")
    for b in range(4):
        product = math.prod(math.exp(float(OLD[b, t]) - float(SAMPLER[b, t])) for t in taken(b))
        for t in range(4):
            assert float(weight[b, t]) == pytest.approx(product if MASK[b, t] else 1.0, abs=1e-12)


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_weights_carry_no_gradient_and_read_nothing_off_the_mask(level: str) -> None:
    poison = torch.where(MASK, 0.0, float("nan"))
    leaf = (OLD + poison).requires_grad_()
    weight = importance_weight(leaf, SAMPLER + poison, MASK, level=level)
    assert not weight.requires_grad
    assert torch.equal(weight, importance_weight(OLD, SAMPLER, MASK, level=level))


def test_truncation_clamps_both_ends() -> None:
    weight = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0])
    assert bounded_weight(weight, mode="truncate", low=0.5, high=2.0).tolist() == [0.5, 0.5, 1.0, 2.0, 2.0]
    assert bounded_weight(weight, mode="truncate", low=0.0, high=1.5).tolist() == pytest.approx([0.1, 0.5, 1, 1.5, 1.5])


def test_masking_keeps_the_weight_within_the_band_ends_included() -> None:
    weight = torch.tensor([0.1, 0.5, 1.25, 2.0, 7.0])
    assert bounded_weight(weight, mode="mask", low=0.5, high=2.0).tolist() == [0.0, 0.5, 1.25, 2.0, 0.0]


def test_sequences_are_kept_by_their_geometric_mean() -> None:
    # means of exp over the row's tokens: sqrt(4 * 0.25) = 1, (8 * 1 * 1)^(1/3) = 2, 0.5
    sampler = torch.zeros(4, 3, dtype=torch.float64)
    old = torch.tensor([[4.0, 0.25, 99.0], [8.0, 1.0, 1.0], [99.0, 0.5, 99.0], [99.0, 99.0, 99.0]]).double().log()
    mask = torch.tensor([[True, True, False], [True, True, True], [False, True, False], [False, False, False]])

    def kept(low: float, high: float) -> list[bool]:
        result = kept_sequences(old, sampler, mask, low=low, high=high)
        assert result.shape == (4,)
        assert result.dtype == torch.bool
        return [bool(x) for x in result]

    assert kept(0.9, 1.1) == [True, False, False, True]
    assert kept(0.9, 2.1) == [True, True, False, True]
    assert kept(0.4, 1.1) == [True, False, True, True]
    assert kept(1.5, 3.0) == [False, True, False, False]
    assert kept(0.0, math.inf) == [True, True, True, True]


@pytest.mark.parametrize("seed", range(5))
def test_kept_sequences_equal_a_naive_loop(seed: int) -> None:
    old, sampler = draw(seed + 10), draw(seed + 20)
    result = kept_sequences(old.clone().requires_grad_(), sampler, MASK, low=0.8, high=1.25)
    for b in range(4):
        weights = [math.exp(float(old[b, t] - sampler[b, t])) for t in taken(b)]
        mean = math.prod(weights) ** (1 / len(weights)) if weights else 1.0
        assert bool(result[b]) == (0.8 <= mean <= 1.25)
    poison = torch.where(MASK, 0.0, float("nan"))
    assert torch.equal(kept_sequences(old + poison, sampler + poison, MASK, low=0.8, high=1.25), result)


def naive_value_loss(v: float, old: float, target: float, eps: float) -> tuple[float, float, bool]:
    """loss, d loss / d v, clipped."""
    plain = (v - target) ** 2 / 2
    if abs(v - old) <= eps:
        return plain, v - target, False
    bounded = (min(max(v, old - eps), old + eps) - target) ** 2 / 2
    return (bounded, 0.0, True) if bounded > plain else (plain, v - target, False)


@pytest.mark.parametrize("seed", range(4))
def test_value_loss_and_gradient_equal_a_naive_loop(seed: int) -> None:
    values, old, returns = draw(seed, 1.0).requires_grad_(), draw(seed + 30, 1.0), draw(seed + 40, 1.0)
    loss, clipped = clipped_value_loss(values, old, returns, eps=0.4)
    [grad] = torch.autograd.grad(loss.sum(), values)
    for b in range(4):
        for t in range(4):
            numbers = (float(x[b, t].detach()) for x in (values, old, returns))
            value, slope, stopped = naive_value_loss(*numbers, eps=0.4)
            assert float(loss[b, t].detach()) == pytest.approx(value, abs=1e-12)
            assert float(grad[b, t]) == pytest.approx(slope, abs=1e-12)
            assert bool(clipped[b, t]) == stopped


def test_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(4, dtype=torch.float64), torch.tensor([2.0, 0.5, -1.0, 3.0], dtype=torch.float64)
    loss, clipped = clipped_value_loss(values, old, returns, eps=0.25)
    # held at 0.25 it is 1.75 from 2: stopped; 0.25 from 0.5 and 1.25 from -1: not; 0.1 is inside the band
    assert loss.tolist() == pytest.approx([1.75**2 / 2, 0.125, 2.0, 2.9**2 / 2], abs=1e-12)
    assert clipped.tolist() == [True, False, False, False]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 0.5, 2.0, -2.9], abs=1e-12)


def test_without_eps_it_is_half_the_squared_error() -> None:
    values, old, returns = draw(50), draw(51), draw(52)
    loss, clipped = clipped_value_loss(values, old, returns, eps=None)
    for b in range(4):
        for t in range(4):
            assert float(loss[b, t]) == pytest.approx(float(values[b, t] - returns[b, t]) ** 2 / 2, abs=1e-12)
    assert clipped.shape == values.shape
    assert not clipped.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_within_its_band_is_never_called_clipped(dtype: torch.dtype) -> None:
    # near 0, as a new critic's: v_old + (v - v_old) is not always v in floating point
    generator = torch.Generator().manual_seed(0)
    old = 0.18 * torch.rand(10_000, generator=generator, dtype=dtype) - 0.09
    values = 0.18 * torch.rand(10_000, generator=generator, dtype=dtype) - 0.09
    returns = torch.rand(10_000, generator=generator, dtype=dtype)
    _, clipped = clipped_value_loss(values, old, returns, eps=0.2)
    assert int(clipped.sum()) == 0
