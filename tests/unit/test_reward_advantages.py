"""The reward-only advantages by hand and by enumeration, and the exact meaning of a group without spread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.objective.advantages import (
    batch_normalized,
    group_centered,
    group_normalized,
    has_spread,
    leave_one_out,
    optimal_baseline,
    pass_at_k,
)


def test_by_hand() -> None:
    # mean 0.25, unbiased variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25, std 0.5
    [values] = group_normalized([[1.0, 0.0, 0.0, 0.0]], std_eps=0.0)
    assert values == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-12)
    [values] = group_normalized([[1.0, 0.0, 0.0, 0.0]], std_eps=0.5)
    assert values == pytest.approx([0.75, -0.25, -0.25, -0.25], abs=1e-12)


def test_groups_are_ragged_and_independent() -> None:
    alone = group_normalized([[1.0, 2.0, 4.0]], std_eps=1e-6)[0]
    both = group_normalized([[0.0, 1.0], [1.0, 2.0, 4.0]], std_eps=1e-6)
    assert both[1] == alone
    assert len(both[0]) == 2


@pytest.mark.parametrize("group", [[0.95] * 8, [0.1 + 0.2] * 3, [0.0, -0.0], [1e300, 1e300]])
def test_equal_rewards_are_no_signal(group: list[float]) -> None:
    assert not has_spread(group)
    assert group_normalized([group], std_eps=0.0) == [[0.0] * len(group)]


def test_the_smallest_difference_is_signal() -> None:
    assert has_spread([0.1 + 0.2, 0.3])
    assert has_spread([0.95] * 7 + [0.0])
    assert has_spread([0.0] + [0.95] * 7)


@pytest.mark.parametrize("group", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_what_has_no_statistics_is_refused(group: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scored rollouts|finite"):
        group_normalized([group], std_eps=1e-6)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12), st.floats(-5, 5))
def test_sum_is_zero_and_order_is_kept(rewards: list[float], shift: float) -> None:
    [values] = group_normalized([rewards], std_eps=1e-6)
    assert sum(values) == pytest.approx(0.0, abs=1e-6)
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(values[a] <= values[b] + 1e-9 for a, b in pairwise(order))
    [moved] = group_normalized([[r + shift for r in rewards]], std_eps=1e-1)
    [still] = group_normalized([rewards], std_eps=1e-1)
    if has_spread(rewards) and has_spread([r + shift for r in rewards]):
        assert moved == pytest.approx(still, abs=1e-6)


def test_the_other_baselines_by_hand() -> None:
    groups = [[1.0, 0.0, 0.5], [3.0, 1.0]]
    assert group_centered(groups) == [pytest.approx([0.5, -0.5, 0.0]), pytest.approx([1.0, -1.0])]
    assert leave_one_out(groups) == [pytest.approx([0.75, -0.75, 0.0]), pytest.approx([2.0, -2.0])]
    flat = [1.0, 0.0, 0.5, 3.0, 1.0]  # mean 1.1, squares 0.01 + 1.21 + 0.36 + 3.61 + 0.01 = 5.2, over 4 is 1.3
    assert sum((x - 1.1) ** 2 for x in flat) == pytest.approx(5.2)
    std = math.sqrt(1.3) + 0.1
    scaled = [pytest.approx([0.5 / std, -0.5 / std, 0.0]), pytest.approx([1 / std, -1 / std])]
    assert batch_normalized(groups, std_eps=0.1) == scaled
    # baseline (2 * 1 + 6 * 0 + 2 * 0.5) / 10 = 0.3; (1 * 3 + 3 * 1) / 4 = 1.5
    weighted = optimal_baseline(groups, [[2, 6, 2], [1, 3]])
    assert weighted == [pytest.approx([0.7, -0.3, 0.2]), pytest.approx([1.5, -0.5])]


METHODS: dict[str, Callable[[list[list[float]]], list[list[float]]]] = {
    "group_normalized": lambda groups: group_normalized(groups, std_eps=0.0),
    "group_centered": group_centered,
    "leave_one_out": leave_one_out,
    "batch_normalized": lambda groups: batch_normalized(groups, std_eps=0.0),
    "optimal_baseline": lambda groups: optimal_baseline(groups, [[3, 5, 7][: len(g)] for g in groups]),
    "pass_at_k": lambda groups: pass_at_k(groups, k=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_group_without_spread_gets_exactly_zero_and_leaves_the_others_alone(method: str) -> None:
    # (0.1 + 0.2) three times: sums and means of it are not exact in floating point
    values = METHODS[method]([[0.1 + 0.2] * 3, [1.0, 0.0]])
    assert values[0] == [0.0, 0.0, 0.0]
    assert values[1][0] > 0 > values[1][1] or method == "pass_at_k"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", [[1.0], [1.0, float("nan")]])
def test_every_method_refuses_what_has_no_statistics(method: str, group: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scored rollouts|finite"):
        METHODS[method]([group])


@pytest.mark.parametrize("rewards", [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 3.0], [0.3, -1.0, 2.0, 2.0, 0.3, 5.0]])
@pytest.mark.parametrize("k", [2, 3])
def test_pass_at_k_equals_the_sum_over_all_subsets(rewards: list[float], k: int) -> None:
    n = len(rewards)
    expected = [0.0] * n
    for subset in itertools.combinations(range(n), k):
        for i in subset:
            others = max(rewards[j] for j in subset if j != i)
            expected[i] += n / math.comb(n, k) * (max(rewards[j] for j in subset) - others)
    assert pass_at_k([rewards], k=k) == [pytest.approx(expected, abs=1e-12)]


def test_pass_at_k_has_the_gradient_of_the_expected_best_of_k() -> None:
    """Three possible answers, all 27 groups of three weighed by their probability."""
    rewards = [0.0, 1.0, 4.0]
    logits = torch.tensor([0.3, -0.2, -1.0], dtype=torch.float64, requires_grad=True)

    def best_of(k: int) -> torch.Tensor:
        p = torch.softmax(logits, 0)
        return sum(  # type: ignore[return-value]
            torch.stack([p[i] for i in draw]).prod() * max(rewards[i] for i in draw)
            for draw in itertools.product(range(3), repeat=k)
        )

    [exact] = torch.autograd.grad(best_of(2), logits)
    logprobs = torch.log_softmax(logits, 0)
    surrogate = torch.zeros((), dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=3):
        chance = torch.stack([logprobs[i] for i in draw]).sum().exp().detach()
        [advantages] = pass_at_k([[rewards[i] for i in draw]], k=2)
        surrogate = surrogate + chance * sum(a * logprobs[i] for a, i in zip(advantages, draw, strict=True)) / 3
    [estimated] = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(estimated, exact, atol=1e-12, rtol=0)


def test_pass_at_k_refuses_groups_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        pass_at_k([[1.0, 0.0]], k=3)
    with pytest.raises(ValueError, match="k of at least 2"):
        pass_at_k([[1.0, 0.0]], k=1)
