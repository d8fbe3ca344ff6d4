"""Group-normalized advantages by hand, and the exact meaning of a group without spread."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.advantages import group_normalized, has_spread


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
