"""Token-level advantages: KL in the reward, returns-to-go, GAE, whitening over the step's tokens.

All tensors are [B,T] in the alignment of `grpo.batching.steps`; off the mask they hold 0 and are ignored. A token off
the mask inside a completion (one that the policy did not sample) is skipped: rewards and values continue at the next
token on the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def rewards_to_go(token_rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Return the sum over s >= t of gamma^(s - t) r_s, [B,T], 0 off the mask. Only tokens on the mask count.

    Args:
        token_rewards: [B,T] reward received with each token.
    """
    out = torch.zeros_like(token_rewards)
    carried = torch.zeros_like(token_rewards[:, 0])
    for t in reversed(range(token_rewards.shape[1])):
        here = mask[:, t]
        carried = torch.where(here, token_rewards[:, t] + gamma * carried, carried)
        out[:, t] = torch.where(here, carried, 0.0)
    return out


def generalized_advantages(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    final_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GAE advantages and the critic's returns; GAE, arXiv 1506.02438 eq. 16.

    A_t = sum of (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t

    Args:
        token_rewards: [B,T].
        values: [B,T] V of the state in which each token was sampled.
        final_values: [B] V of the state after the last token: 0 for a completion that ended by itself; 0 or the
            critic's estimate for a truncated one, as the recipe chooses.

    Returns:
        advantages [B,T] and returns [B,T] (advantages + values, the critic's targets); 0 off the mask.
    """
    advantages = torch.zeros_like(values)
    carried = torch.zeros_like(final_values)
    following = final_values
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = token_rewards[:, t] + gamma * following - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        following = torch.where(here, values[:, t], following)
        advantages[:, t] = torch.where(here, carried, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def at_last_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return [B,T] with each row's value, [B], at its last token on the mask and 0 elsewhere.

    A row without tokens on the mask is all 0.
    """
    count = mask.sum(1, keepdim=True)
    last = mask & (mask.cumsum(1) == count)
    return torch.where(last, values[:, None], 0.0)


def whiten(
    advantages: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    *,
    eps: float,
    all_sum: Callable[[Sequence[float]], list[float]],
) -> list[torch.Tensor]:
    """Return (a - mean) / sqrt(var + eps), with the unbiased variance, over all tokens of a step that are on the mask.

    REINFORCE++, arXiv 2501.03262 sec. 3.

    Args:
        advantages, masks: [B,T] each, this rank's microbatches.
        all_sum: sums each number over the learner's ranks; a collective.

    Returns:
        The whitened advantages, 0 off the mask. They are unchanged if the step has fewer than two tokens.
    """
    taken = [values[mask].double() for values, mask in zip(advantages, masks, strict=True)]
    total, count = all_sum([sum(float(v.sum()) for v in taken), float(sum(v.numel() for v in taken))])
    mean = total / count if count else 0.0
    [squares] = all_sum([sum(float(((v - mean) ** 2).sum()) for v in taken)])
    if count < 2:
        return list(advantages)
    scale = (squares / (count - 1) + eps) ** -0.5
    return [torch.where(mask, (values - mean) * scale, 0.0) for values, mask in zip(advantages, masks, strict=True)]
