"""Importance weights, their bounds, sequence rejection and the critic's clipped loss against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from padded import importance_weight, kept_sequences

from grpo.objective.mismatch import bounded_weight
from grpo.objective.values import clipped_value_loss

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
