"""Policy losses, aggregations and mismatch weights against naive loops in float64, and how they may be split."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.objective.aggregation import aggregation_weights
from grpo.objective.legal import LEGAL_AGGREGATIONS
from grpo.objective.mismatch import bounded_weight, importance_weight, kept_sequences
from grpo.objective.policy import PolicyTerm, policy_term
from grpo.objective.values import clipped_value_loss

LOW, HIGH, TAU_P, TAU_N = 0.2, 0.3, 1.0, 1.3
LOSSES = tuple(LEGAL_AGGREGATIONS)
PAIRS = [(loss, aggregation) for loss, legal in LEGAL_AGGREGATIONS.items() for aggregation in legal]


def example(seed: int, rows: int = 5, positions: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new = -2 * torch.rand(rows, positions, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, positions, (rows,), generator=generator)
    mask = torch.arange(positions)[None] < lengths[:, None]
    return {
        "logprobs": torch.where(mask, new, 0.0),
        "old_logprobs": torch.where(mask, new + 0.4 * torch.randn(new.shape, generator=generator).double(), 0.0),
        "advantages": torch.where(mask, torch.randn(rows, 1, generator=generator).double(), 0.0),
        "mask": mask,
    }


def term(loss: str, inputs: dict[str, Tensor], dual_clip: float | None = None) -> PolicyTerm:
    return policy_term(
        loss, **inputs, eps_low=LOW, eps_high=HIGH, dual_clip=dual_clip, tau_positive=TAU_P, tau_negative=TAU_N
    )


def naive(loss: str, new: list[float], old: list[float], advantage: float) -> tuple[list[float], list[float]]:
    """(values, coefficients of each token's grad log pi when every token weighs the same) of one row."""
    ratios = [math.exp(n - o) for n, o in zip(new, old, strict=True)]
    size = len(new)
    if loss == "reinforce":
        return [-advantage * n for n in new], [-advantage] * size
    if loss == "cispo":
        weights = [min(max(r, 1 - LOW), 1 + HIGH) for r in ratios]
        return [-w * advantage * n for w, n in zip(weights, new, strict=True)], [-w * advantage for w in weights]
    if loss == "sapo":
        tau = TAU_P if advantage > 0 else TAU_N
        gates = [1 / (1 + math.exp(-tau * (r - 1))) for r in ratios]
        values = [-4 / tau * g * advantage for g in gates]
        return values, [-4 * g * (1 - g) * r * advantage for g, r in zip(gates, ratios, strict=True)]
    if loss == "gmpo":
        logs = [math.log(r) for r in ratios]
        keep = [x <= HIGH if advantage > 0 else x >= -LOW for x in logs]
        bounded = [x if k else (HIGH if advantage > 0 else -LOW) for x, k in zip(logs, keep, strict=True)]
        mean = math.exp(sum(bounded) / size)
        return [-mean * advantage] * size, [-mean * advantage * k for k in keep]
    if loss == "gspo":
        ratios = [math.exp(sum(math.log(r) for r in ratios) / size)] * size
    out, grad = [], []
    for r in ratios:
        clipped = min(max(r, 1 - LOW), 1 + HIGH)
        stopped = clipped * advantage < r * advantage
        out.append(-min(r * advantage, clipped * advantage))
        grad.append(0.0 if stopped else -r * advantage)
    return out, grad


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_equal_a_naive_loop(loss: str, seed: int) -> None:
    inputs = example(seed)
    new = inputs["logprobs"].clone().requires_grad_()
    found = term(loss, inputs | {"logprobs": new})
    found.loss.sum().backward()
    assert new.grad is not None
    for i, length in enumerate(inputs["mask"].sum(1).tolist()):
        values, gradient = naive(
            loss, inputs["logprobs"][i, :length].tolist(), inputs["old_logprobs"][i, :length].tolist(),
            float(inputs["advantages"][i, 0]),
        )  # fmt: skip
        assert found.loss[i, :length].tolist() == pytest.approx(values, abs=1e-12)
        assert new.grad[i, :length].tolist() == pytest.approx(gradient, abs=1e-12)
        assert (new.grad[i, length:] == 0).all()
        assert (found.loss[i, length:] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_at_ratio_one_every_loss_has_reinforces_gradient_and_clips_nothing(loss: str) -> None:
    inputs = example(0)
    new = inputs["logprobs"].clone().requires_grad_()
    found = term(loss, inputs | {"logprobs": new, "old_logprobs": new.detach()})
    found.loss.sum().backward()
    torch.testing.assert_close(new.grad, -inputs["advantages"], atol=1e-12, rtol=0)
    assert not (found.clipped_low | found.clipped_high).any()


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_advantage_is_exactly_no_gradient(loss: str) -> None:
    inputs = example(1)
    new = inputs["logprobs"].clone().requires_grad_()
    term(loss, inputs | {"logprobs": new, "advantages": 0 * inputs["advantages"]}).loss.sum().backward()
    assert new.grad is not None
    assert (new.grad == 0).all()


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "cispo", "gmpo"])
def test_clips_are_told_apart_by_side(loss: str) -> None:
    """Ratio 0.5 or 2 throughout a row; a clip acts where the objective would go further the same way."""
    logs = torch.tensor([0.5, 0.5, 2.0, 2.0], dtype=torch.float64).log()[:, None].expand(4, 3)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None].expand(4, 3)
    mask = torch.ones(4, 3, dtype=torch.bool)
    found = term(loss, {"logprobs": logs, "old_logprobs": 0 * logs, "advantages": advantages, "mask": mask})
    both = [True, True] if loss == "cispo" else [False, True]  # CISPO bounds its weight whatever the sign
    assert found.clipped_low.all(1).tolist() == [*both, False, False]
    assert found.clipped_high.all(1).tolist() == [False, False, *([True, True] if loss == "cispo" else [True, False])]


def test_dual_clip_holds_negative_advantages() -> None:
    logs = torch.tensor([[5.0, 2.0, 5.0]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[-1.0, -1.0, 1.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    inputs = {"logprobs": logs, "old_logprobs": 0 * logs.detach(), "advantages": advantages, "mask": mask}
    found = term("ppo_clip", inputs, dual_clip=3.0)
    assert found.loss.tolist() == [pytest.approx([3.0, 2.0, -1.3])]
    assert found.clipped_high.tolist() == [[True, False, True]]
    found.loss.sum().backward()
    assert logs.grad is not None
    assert logs.grad.tolist() == [pytest.approx([0.0, 2.0, 0.0])]


def whole_step(loss: str, aggregation: str, inputs: dict[str, Tensor], prompts: list[int]) -> tuple[Tensor, Tensor]:
    """Weights [B,T] and the whole step's loss."""
    lengths = inputs["mask"].sum(1).tolist()
    weights = torch.tensor(
        aggregation_weights(lengths, prompts, aggregation=aggregation, constant_length=9), dtype=torch.float64
    )
    token_weights = inputs["mask"] * weights[:, None]
    return token_weights, (token_weights * term(loss, inputs).loss).sum()


@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 5), padding=st.integers(0, 3), shuffle=st.randoms())
def test_no_split_padding_or_order_changes_loss_or_gradient(
    loss: str, aggregation: str, seed: int, cut: int, padding: int, shuffle: object
) -> None:
    """Microbatches and ranks are parts of one sum; the weights are made once for all of them."""
    inputs = example(seed, rows=6)
    prompts = [0, 0, 1, 1, 1, 2]
    new = inputs["logprobs"].clone().requires_grad_()
    weights, total = whole_step(loss, aggregation, inputs | {"logprobs": new}, prompts)
    [gradient] = torch.autograd.grad(total, new)
    order = list(range(6))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    moved = {name: value[order] for name, value in inputs.items()}
    moved_weights, _ = whole_step(loss, aggregation, moved, [prompts[i] for i in order])
    torch.testing.assert_close(moved_weights, weights[order])
    parts = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, cut), slice(cut, 6)):
        part = {name: torch.nn.functional.pad(value[rows], (0, padding)) for name, value in moved.items()}
        part["logprobs"].requires_grad_()
        part_loss = (torch.nn.functional.pad(moved_weights[rows], (0, padding)) * term(loss, part).loss).sum()
        [part_gradient] = torch.autograd.grad(part_loss, part["logprobs"])
        parts = parts + part_loss.detach()
        torch.testing.assert_close(part_gradient[:, : new.shape[1]], gradient[order][rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(parts, total.detach(), atol=1e-12, rtol=0)


def test_aggregations_by_hand() -> None:
    def weights(aggregation: str) -> list[float]:
        return aggregation_weights([1, 4, 3], [7, 7, 2], aggregation=aggregation, constant_length=10)

    assert weights("token_mean") == [1 / 8] * 3
    assert weights("sequence_mean") == [1 / 3, 1 / 12, 1 / 9]
    assert weights("sequence_sum") == [1 / 3] * 3
    assert weights("constant_length") == [1 / 30] * 3
    assert weights("prompt_mean") == [1 / 10, 1 / 10, 1 / 6]
    for name in ("token_mean", "sequence_mean", "prompt_mean"):
        assert sum(w * n for w, n in zip(weights(name), [1, 4, 3], strict=True)) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("loss", "numeric"), [("ppo_clip", True), ("sapo", True), ("gmpo", True)])
def test_autograd_equals_finite_differences(loss: str, numeric: bool) -> None:
    inputs = example(3)
    value: Callable[[Tensor], Tensor] = lambda new: term(loss, inputs | {"logprobs": new}).loss.sum()  # noqa: E731
    new = inputs["logprobs"].clone().requires_grad_()
    [gradient] = torch.autograd.grad(value(new), new)
    for i, t in torch.nonzero(inputs["mask"]).tolist():
        shift = torch.zeros_like(new)
        shift[i, t] = 1e-6
        slope = (value(new.detach() + shift) - value(new.detach() - shift)) / 2e-6
        assert float(gradient[i, t]) == pytest.approx(float(slope), abs=1e-6)


OLD = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
SAMPLER = torch.tensor([[-1.0, 0.0, 2.0, 5.0], [-0.5, -0.5, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def test_importance_weights_by_hand() -> None:
    e = math.e
    token = importance_weight(OLD, SAMPLER, MASK, level="token")
    assert token.tolist() == [pytest.approx([e, 1, e**-2, 1]), pytest.approx([e**0.5, e**0.5, 1, 1])]
    sequence = importance_weight(OLD, SAMPLER, MASK, level="sequence")
    assert sequence.tolist() == [pytest.approx([e**-1] * 3 + [1]), pytest.approx([e, e, 1, 1])]
    assert (importance_weight(OLD, SAMPLER, MASK, level="none") == 1).all()
    assert bounded_weight(token, mode="truncate", low=0.5, high=2).tolist() == [
        pytest.approx([2, 1, 0.5, 1]), pytest.approx([e**0.5, e**0.5, 1, 1]),
    ]  # fmt: skip
    assert bounded_weight(token, mode="mask", low=0.5, high=2).tolist() == [
        pytest.approx([0, 1, 0, 1]), pytest.approx([e**0.5, e**0.5, 1, 1]),
    ]  # fmt: skip


def test_rejection_is_by_the_geometric_mean_of_the_row() -> None:
    """Means of the log weights: (1 + 0 - 2) / 3 and 0.5."""
    low, high = math.exp(-1 / 3), math.exp(0.5)
    assert kept_sequences(OLD, SAMPLER, MASK, low=low - 1e-9, high=high + 1e-9).tolist() == [[True], [True]]
    assert kept_sequences(OLD, SAMPLER, MASK, low=low + 1e-9, high=9).tolist() == [[False], [True]]
    assert kept_sequences(OLD, SAMPLER, MASK, low=0.1, high=high - 1e-9).tolist() == [[True], [False]]


def test_corrections_are_constants_to_the_gradient() -> None:
    old = OLD.clone().requires_grad_()
    assert not importance_weight(old, SAMPLER, MASK, level="token").requires_grad
    assert not importance_weight(old, SAMPLER, MASK, level="sequence").requires_grad


def test_the_value_loss_is_the_worse_of_two_squares() -> None:
    values = torch.tensor([[1.0, 1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, 3, dtype=torch.float64)
    returns = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)
    loss, clipped = clipped_value_loss(values, old, returns, eps=0.2)
    # clipped values 0.2, 0.2, 0.1: squares 3.24, 0.04, 0.81 against 1, 1, 0.81
    assert loss.tolist() == [pytest.approx([1.62, 0.5, 0.405])]
    assert clipped.tolist() == [[True, False, False]]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [pytest.approx([0.0, 1.0, -0.9])]
    plain, none = clipped_value_loss(values, old, returns, eps=None)
    assert plain.tolist() == [pytest.approx([0.5, 0.5, 0.405])]
    assert not none.any()
