"""Returns-to-go, GAE and whitening against loops written from their definitions, holes in the mask included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo.objective.token_advantages import at_last_token, generalized_advantages, rewards_to_go, whiten

MASK = torch.tensor(
    [[False, True, True, True, False], [True, False, True, True, True], [False] * 5, [False, False, True, False, False]]
)
GENERATOR = torch.Generator().manual_seed(2)
REWARDS = torch.randn(MASK.shape, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.randn(MASK.shape, generator=GENERATOR, dtype=torch.float64)


def masked(values: Tensor, row: int) -> list[float]:
    return [float(x) for x, keep in zip(values[row], MASK[row], strict=True) if keep]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_rewards_to_go_step_over_tokens_off_the_mask(gamma: float) -> None:
    found = rewards_to_go(REWARDS, MASK, gamma=gamma)
    assert (found[~MASK] == 0).all()
    for row in range(4):
        rewards = masked(REWARDS, row)
        expected = [sum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]
        assert masked(found, row) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_equals_its_sum_over_temporal_differences(gamma: float, lam: float) -> None:
    final = torch.tensor([0.0, 0.7, 5.0, -0.3], dtype=torch.float64)
    advantages, returns = generalized_advantages(REWARDS, VALUES, MASK, gamma=gamma, lam=lam, final_values=final)
    assert (advantages[~MASK] == 0).all()
    assert (returns[~MASK] == 0).all()
    for row in range(4):
        rewards, values = masked(REWARDS, row), [*masked(VALUES, row), float(final[row])]
        deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
        expected = [
            sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))
        ]
        assert masked(advantages, row) == pytest.approx(expected, abs=1e-12)
        assert masked(returns, row) == pytest.approx([a + v for a, v in zip(expected, values, strict=False)])


def test_gae_without_discount_is_return_minus_value() -> None:
    """gamma = lambda = 1: whatever the values in between, A_t = sum of later rewards - V_t."""
    none = torch.zeros(4, dtype=torch.float64)
    advantages, returns = generalized_advantages(REWARDS, VALUES, MASK, gamma=1.0, lam=1.0, final_values=none)
    to_go = rewards_to_go(REWARDS, MASK, gamma=1.0)
    torch.testing.assert_close(advantages[MASK], (to_go - VALUES)[MASK])
    torch.testing.assert_close(returns, to_go)


def test_the_reward_stands_at_the_last_token() -> None:
    found = at_last_token(torch.tensor([1.0, 2.0, 3.0, 4.0]), MASK)
    assert found.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 4, 0, 0]]


def one_rank(values: list[float]) -> list[float]:
    return list(values)


def test_whitening_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    [found] = whiten([values], [mask], eps=0.5, all_sum=one_rank)
    mean, variance = 7 / 3, ((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2
    scale = math.sqrt(variance + 0.5)
    assert found[mask].tolist() == pytest.approx([(x - mean) / scale for x in (1.0, 2.0, 4.0)])
    assert (found[~mask] == 0).all()


def test_whitening_is_the_same_over_microbatches_and_ranks() -> None:
    [whole] = whiten([REWARDS], [MASK], eps=1e-8, all_sum=one_rank)
    parts = whiten([REWARDS[:1], REWARDS[1:]], [MASK[:1], MASK[1:]], eps=1e-8, all_sum=one_rank)
    torch.testing.assert_close(torch.cat(parts), whole)
    other = REWARDS[2:][MASK[2:]]  # what the other rank holds
    sums = iter([[float(other.sum()), float(other.numel())], [float(((other - REWARDS[MASK].mean()) ** 2).sum())]])
    [ours] = whiten(
        [REWARDS[:2]], [MASK[:2]], eps=1e-8,
        all_sum=lambda values: [a + b for a, b in zip(values, next(sums), strict=True)],
    )  # fmt: skip
    torch.testing.assert_close(ours, whole[:2])


def test_a_single_token_is_not_whitened() -> None:
    value, mask = torch.tensor([[3.0]]), torch.tensor([[True]])
    assert whiten([value], [mask], eps=1e-8, all_sum=one_rank)[0].tolist() == [[3.0]]
