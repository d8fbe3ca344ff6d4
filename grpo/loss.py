"""The objective as a dot product: `loss = (token_weights * token_loss).sum()`.

`token_weights` hold the mask, the aggregation and the denominator of the whole optimizer step, made once when the step
is batched. So no microbatch or rank computes a denominator, and splitting cannot change the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from grpo.kl import k3

Aggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """Per-token terms, all [B,T]; aggregate each with the same `token_weights`."""

    total: torch.Tensor
    """policy + kl_coef * kl_ref, with gradient."""
    policy: torch.Tensor
    """Clipped ratio term times the importance weight; detached."""
    kl_ref: torch.Tensor
    """k3 to the reference; detached, zeros where there is none."""
    ratio: torch.Tensor
    """exp(logprobs - old_logprobs); detached."""
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    """bool; the clip stopped the gradient on this side."""
    importance_weight: torch.Tensor
    """exp(old_logprobs - sampler_logprobs) before truncation."""


def aggregation_weights(
    lengths: list[int], *, aggregation: Aggregation, denominator_tokens: int, denominator_rows: int
) -> list[float]:
    """Weight of each token of each row.

    token_mean: 1 / (completion tokens of the optimizer step). sequence_mean: 1 / (rows x tokens of the row).
    Over all tokens of the step the weights add up to 1.

    Args:
        lengths: [R] completion tokens per row, each at least 1.
        denominator_tokens, denominator_rows: of the whole optimizer step, over all ranks and microbatches.
    """
    if aggregation == "token_mean":
        return [1.0 / denominator_tokens] * len(lengths)
    return [1.0 / (denominator_rows * length) for length in lengths]


def truncated_importance_weight(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """min(exp(old - sampler), cap), detached; corrects the policy term for sampling from a slightly other policy.

    Truncated importance sampling, fengyao.notion.site/off-policy-rl. `cap` 0 turns it off (all ones).
    """
    weight = torch.exp(old_logprobs.detach() - sampler_logprobs)
    return weight.clamp(max=cap) if cap > 0 else torch.ones_like(weight)


def grpo_token_loss(
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    completion_mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    eps_low: float,
    eps_high: float,
    kl_coef: float,
    importance_weight_cap: float,
) -> TokenLoss:
    """Clipped ratio loss with an optional k3 anchor, per token.

    -min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A) * importance_weight + kl_coef * k3(cur, ref)

    PPO's clip (arXiv 1707.06347) with DAPO's separate upper range (arXiv 2503.14476) and GRPO's anchor (arXiv
    2402.03300). With `old_logprobs = logprobs.detach()` the ratio is exactly 1 and the gradient is REINFORCE's.

    Args:
        logprobs: [B,T] with gradient; the others [B,T] without. Off `completion_mask` every value is ignored: it is
            replaced by a neutral one first, so that padding can produce neither NaN nor gradient.
        ref_logprobs: None exactly when kl_coef is 0.
    """
    current = torch.where(completion_mask, logprobs, 0.0)
    old = torch.where(completion_mask, old_logprobs.detach(), 0.0)
    sampler = torch.where(completion_mask, sampler_logprobs, 0.0)
    advantages = torch.where(completion_mask, advantages, 0.0)
    ratio = torch.exp(current - old)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    weight = truncated_importance_weight(old, sampler, cap=importance_weight_cap)
    policy = -torch.minimum(unclipped, clipped) * weight
    if ref_logprobs is None:
        kl_ref = torch.zeros_like(policy)
        total = policy
    else:
        kl_ref = k3(current, torch.where(completion_mask, ref_logprobs, 0.0))
        total = policy + kl_coef * kl_ref
    with torch.no_grad():
        stopped = completion_mask & (clipped < unclipped)
        return TokenLoss(
            total=total,
            policy=policy.detach(),
            kl_ref=kl_ref.detach(),
            ratio=ratio.detach(),
            clipped_low=stopped & (ratio < 1),
            clipped_high=stopped & (ratio > 1),
            importance_weight=torch.exp(old - sampler),
        )
