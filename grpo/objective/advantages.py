"""Reward-only advantages: the rewards of a step -> one advantage per rollout. Pure functions, in float64.

Groups may be ragged: a failed rollout has no reward and is not in the list, so n_p is the number of scored rollouts of
group p. A group without spread (all raw rewards exactly equal) gets exactly 0 from every group-relative method.
Advantages that need logprobs, values or whitening over tokens are in `grpo.objective.token_advantages`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from grpo.objective.spread import has_spread as has_spread

Rewards = Sequence[Sequence[float]]
"""[P][n_p] rewards of the scored rollouts of each group."""


def group_normalized(rewards: Rewards, *, std_eps: float) -> list[list[float]]:
    """Return (r - mean) / (std + std_eps) within each group, with the unbiased std (n - 1).

    GRPO, arXiv 2402.03300 sec. 4.1.

    Args:
        rewards: [P][n_p], n_p >= 2.
        std_eps: added to the standard deviation.

    Returns:
        [P][n_p] advantages.

    Raises:
        ValueError: a group has fewer than two rewards, or a reward is not finite.
    """
    return [_relative(group, lambda r: (r - r.mean()) / (r.std(correction=1) + std_eps)) for group in _checked(rewards)]


def group_centered(rewards: Rewards) -> list[list[float]]:
    """Return r - mean within each group; Dr.GRPO, arXiv 2503.20783 eq. 3.

    Without the division by the std, easy and hard prompts keep their weight. Raises like `group_normalized`.
    """
    return [_relative(group, lambda r: r - r.mean()) for group in _checked(rewards)]


def leave_one_out(rewards: Rewards) -> list[list[float]]:
    """Return r_i - mean of the group's other rewards; RLOO, arXiv 2402.14740 eq. 9. Raises like `group_normalized`."""
    return [_relative(group, lambda r: r - (r.sum() - r) / (len(r) - 1)) for group in _checked(rewards)]


def batch_normalized(rewards: Rewards, *, std_eps: float) -> list[list[float]]:
    """Return (r - mean of its group) / (std of all rewards of the step + std_eps), with the unbiased std.

    arXiv 2508.08221 sec. 4.2. Raises like `group_normalized`.
    """
    checked = _checked(rewards)
    if not checked:
        return []
    std = torch.tensor([r for group in checked for r in group], dtype=torch.float64).std(correction=1)
    return [_relative(group, lambda r: (r - r.mean()) / (std + std_eps)) for group in checked]


def optimal_baseline(rewards: Rewards, lengths: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return r - the group's mean reward weighted by completion length; OPO, arXiv 2505.23585 eq. 8.

    This baseline has the least variance if a rollout's squared gradient grows with its length.

    Args:
        lengths: [P][n_p] trained tokens of the same rollouts.

    Raises like `group_normalized`.
    """
    out = []
    for group, tokens in zip(_checked(rewards), lengths, strict=True):
        if len(group) != len(tokens):
            raise ValueError(f"a group of {len(group)} rewards came with {len(tokens)} lengths")
        weight = torch.tensor(list(tokens), dtype=torch.float64)
        out.append(_relative(group, lambda r, w=weight: r - (w * r).sum() / w.sum()))  # type: ignore[misc]
    return out


def pass_at_k(rewards: Rewards, *, k: int) -> list[list[float]]:
    """Return advantages whose policy gradient is the gradient of E[max reward of k completions], for any rewards.

    A_i = n / C(n,k) * sum over the k-subsets S with i of (max of S - max of S without i)

    This is the leave-one-out-minus-one estimator of PKPO, arXiv 2505.15201 sec. 4, scaled by n so that a mean over the
    group gives the gradient. For k = 1 it would be the reward itself. It is computed over the sorted rewards in O(n^2).

    Raises ValueError if k < 2 or a group is smaller than k, and like `group_normalized`.
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
            # i is the maximum of a subset only if all other members rank lower; if the best of them has rank `below`,
            # the remaining k - 2 members come from the `below` rewards that rank lower still
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
    """Return `formula` of a group's rewards, or exactly 0 for every member of a group without spread."""
    if not has_spread(group):
        return [0.0] * len(group)
    values: list[float] = formula(torch.tensor(group, dtype=torch.float64)).tolist()
    return values
