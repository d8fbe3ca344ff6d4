"""Token-level advantages: KL in the reward, returns-to-go, GAE, whitening over the step's tokens.

All tensors are [N], the trained tokens of a microbatch, unless noted. A token inside a completion that the policy did
not sample is not among them: rewards and values continue at the next trained token of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from grpo.objective.rows import Rows


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
