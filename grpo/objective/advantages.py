"""Advantages: of a rollout from the rewards of its group, and of a token from rewards, KL and values.

Advantages of rollouts are pure functions of a step's rewards, in float64. Groups may be ragged: a failed rollout has no
reward and is not in the list, so n_p is the number of scored rollouts of group p. A group without spread (all raw
rewards exactly equal) gets exactly 0 from every group-relative method.

Advantages of tokens (KL in the reward, returns-to-go, GAE, whitening over the step's tokens) are computed by the
learner. Their tensors are [N], the trained tokens of a microbatch, unless noted. A token inside a completion that the
policy did not sample is not among them: rewards and values continue at the next trained token of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from grpo.objective.losses import Rows
from grpo.objective.spread import has_spread

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


def rewards_to_go(token_rewards: torch.Tensor, rows: Rows, *, gamma: float) -> torch.Tensor:
    """Return the sum over s >= t of gamma^(s - t) r_s within each row, [N].

    Each pass doubles the number of tokens that a sum covers, so there are log2(N) passes over the whole axis instead of
    one small operation per token.

    Args:
        token_rewards: [N] reward received with each token.
    """
    returns, covered = token_rewards, 1
    while covered < len(returns):
        same_row = rows.ids[:-covered] == rows.ids[covered:]
        later = torch.where(same_row, gamma**covered * returns[covered:], 0.0)
        returns = torch.cat([returns[:-covered] + later, returns[-covered:]])
        covered *= 2
    return returns


def generalized_advantages(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    *,
    gamma: float,
    lam: float,
    final_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GAE advantages and the critic's returns; GAE, arXiv 1506.02438 eq. 16.

    A_t = sum of (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t

    Args:
        token_rewards: [N].
        values: [N] V of the state in which each token was sampled.
        final_values: [B] V of the state after each row's last token: 0 for a completion that ended by itself; 0 or the
            critic's estimate for a truncated one, as the recipe chooses.

    Returns:
        advantages [N] and returns [N] (advantages + values, the critic's targets).
    """
    following = torch.where(rows.last_tokens(), final_values[rows.ids], values.roll(-1))
    advantages = rewards_to_go(token_rewards + gamma * following - values, rows, gamma=gamma * lam)
    return advantages, advantages + values


def at_last_token(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return [N] with each row's value, [B], at its last token and 0 elsewhere."""
    return torch.where(rows.last_tokens(), values[rows.ids], 0.0)


def whiten(
    advantages: Sequence[torch.Tensor], *, eps: float, all_sum: Callable[[Sequence[float]], list[float]]
) -> list[torch.Tensor]:
    """Return (a - mean) / sqrt(var + eps), with the unbiased variance, over all trained tokens of a step.

    REINFORCE++, arXiv 2501.03262 sec. 3.

    Args:
        advantages: [N] each, this rank's microbatches.
        all_sum: sums each number over the learner's ranks; a collective.

    Returns:
        The whitened advantages. They are unchanged if the step has fewer than two tokens.
    """
    wide = [values.double() for values in advantages]
    total, count = all_sum([sum(float(v.sum()) for v in wide), float(sum(v.numel() for v in wide))])
    mean = total / count if count else 0.0
    [squares] = all_sum([sum(float(((v - mean) ** 2).sum()) for v in wide)])
    if count < 2:
        return list(advantages)
    scale = (squares / (count - 1) + eps) ** -0.5
    return [(values - mean) * scale for values in advantages]
