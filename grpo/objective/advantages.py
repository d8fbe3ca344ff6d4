"""Rewards of a step -> one advantage for each of its rollouts. The reward-only family; pure, in float64.

Groups may be ragged: a failed rollout has no reward and is not in the list, so every G below is the number of
survivors. A group without spread (all raw rewards exactly equal) gets exactly 0 from every group-relative method.
What needs logprobs, values or whitening over tokens is in `grpo.objective.token_advantages`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Rewards = Sequence[Sequence[float]]
"""[P][n_p] rewards of the scored rollouts of each group."""


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group carries signal, by exact equality of the raw rewards and before any float statistic.

    A standard deviation of equal numbers is not always 0 in floating point; this is.
    """
    return any(reward != rewards[0] for reward in rewards[1:])


def group_normalized(rewards: Rewards, *, std_eps: float) -> list[list[float]]:
    """(r - mean) / (std + std_eps) within each group, the unbiased std (n - 1); GRPO, arXiv 2402.03300 sec. 4.1.

    Args:
        rewards: [P][n_p], n_p >= 2.
        std_eps: added to the standard deviation.

    Returns:
        [P][n_p] advantages.

    Raises:
        ValueError: a group has fewer than two members or a reward is not finite.
    """
    return [_relative(group, lambda r: (r - r.mean()) / (r.std(correction=1) + std_eps)) for group in _checked(rewards)]


def group_centered(rewards: Rewards) -> list[list[float]]:
    """r - mean within each group: no division, so that easy and hard prompts keep their weight; Dr.GRPO, arXiv
    2503.20783 eq. 3. Raises as `group_normalized`."""
    return [_relative(group, lambda r: r - r.mean()) for group in _checked(rewards)]


def leave_one_out(rewards: Rewards) -> list[list[float]]:
    """r_i - mean of the group's other rewards; RLOO, arXiv 2402.14740 eq. 9. Raises as `group_normalized`."""
    return [_relative(group, lambda r: r - (r.sum() - r) / (len(r) - 1)) for group in _checked(rewards)]


def batch_normalized(rewards: Rewards, *, std_eps: float) -> list[list[float]]:
    """r - mean of its group, over (std of all rewards of the step + std_eps), unbiased; arXiv 2508.08221 sec. 4.2.

    Raises as `group_normalized`.
    """
    checked = _checked(rewards)
    if not checked:
        return []
    std = torch.tensor([r for group in checked for r in group], dtype=torch.float64).std(correction=1)
    return [_relative(group, lambda r: (r - r.mean()) / (std + std_eps)) for group in checked]


def optimal_baseline(rewards: Rewards, lengths: Sequence[Sequence[int]]) -> list[list[float]]:
    """r - the group's mean reward weighted by completion length, the baseline of least variance when a rollout's
    squared gradient grows with its length; OPO, arXiv 2505.23585 eq. 8.

    Args:
        lengths: [P][n_p] trained tokens of the same rollouts.

    Raises as `group_normalized`.
    """
    out = []
    for group, tokens in zip(_checked(rewards), lengths, strict=True):
        if len(group) != len(tokens):
            raise ValueError(f"a group of {len(group)} rewards came with {len(tokens)} lengths")
        weight = torch.tensor(list(tokens), dtype=torch.float64)
        out.append(_relative(group, lambda r, w=weight: r - (w * r).sum() / w.sum()))  # type: ignore[misc]
    return out


def pass_at_k(rewards: Rewards, *, k: int) -> list[list[float]]:
    """Advantages whose policy gradient is that of E[max reward of k completions], for any rewards.

    A_i = n / C(n,k) * sum over the k-subsets S with i of (max of S - max of S without i)

    The leave-one-out-minus-one estimator of PKPO, arXiv 2505.15201 sec. 4, scaled by n so that a mean over the group
    gives the gradient; for k = 1 it is the reward itself. Computed over the sorted rewards in O(n^2).

    Raises ValueError when a group is smaller than k or k < 2, and as `group_normalized`.
    """
    if k < 2:
        raise ValueError(f"pass@k needs k of at least 2, not {k}")
    out = []
    for group in _checked(rewards):
        n = len(group)
        if n < k:
            raise ValueError(f"pass@{k} needs groups of at least {k} scored rollouts, not {n}")
        if not has_spread(group):
            out.append([0.0] * n)
            continue
        order = sorted(range(n), key=lambda i: group[i])
        advantages = [0.0] * n
        for rank, i in enumerate(order):
            # i is the maximum only of subsets whose other members stand below it; with the best of those at `below`,
            # the remaining k - 2 members come from the `below` that stand lower still
            gain = sum(math.comb(below, k - 2) * (group[i] - group[order[below]]) for below in range(k - 2, rank))
            advantages[i] = n * gain / math.comb(n, k)
        out.append(advantages)
    return out


def _checked(rewards: Rewards) -> list[list[float]]:
    for group in rewards:
        if len(group) < 2:
            raise ValueError(f"a group needs at least two scored rollouts, not {len(group)}")
        if not all(math.isfinite(r) for r in group):
            raise ValueError(f"rewards must be finite, not {list(group)}")
    return [list(group) for group in rewards]


def _relative(group: list[float], formula: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    """`formula` of a group's rewards; exactly 0 throughout a group without spread."""
    if not has_spread(group):
        return [0.0] * len(group)
    values: list[float] = formula(torch.tensor(group, dtype=torch.float64)).tolist()
    return values
