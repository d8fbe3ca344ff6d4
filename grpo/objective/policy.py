"""The policy term of each objective, per token. Token weights aggregate them.

Every function takes and returns [N], the trained tokens of a microbatch.

`log_ratio` is logprobs - old_logprobs, with gradient through logprobs. With one update per batch, old_logprobs are
logprobs.detach(). Then every ratio is exactly 1, nothing is clipped, and each objective has the gradient of REINFORCE
(GMPO with the row's mean advantage).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo.objective.compatibility import PolicyLoss
from grpo.objective.rows import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerm:
    """A policy term, [N] each."""

    loss: torch.Tensor
    """With gradient."""
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    """bool: the ratio left its range on the low or the high side, and the clip acted. Under CISPO such a token has a
    bounded weight and keeps its gradient; under every other objective it has no gradient."""


def ppo_clip(
    log_ratio: torch.Tensor, advantages: torch.Tensor, *, eps_low: float, eps_high: float, dual_clip: float | None
) -> PolicyTerm:
    """Return -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A); PPO arXiv 1707.06347, two ranges as in DAPO 2503.14476.

    Args:
        dual_clip: with a negative advantage the loss is at most -dual_clip * A. This stops the gradient of a token
            whose ratio is large; arXiv 1912.09729 eq. 5. None: off.
    """
    ratio = torch.where(advantages == 0, 0.0, log_ratio).exp()  # an overflowed ratio times 0 would be NaN
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    stopped = clipped < unclipped
    if dual_clip is not None:
        floor = dual_clip * advantages
        bounded = (advantages < 0) & (objective < floor)
        objective = torch.where(bounded, floor, objective)
        stopped = stopped | bounded
    return PolicyTerm(loss=-objective, clipped_low=stopped & (ratio < 1), clipped_high=stopped & (ratio > 1))


def gspo(
    log_ratio: torch.Tensor, advantages: torch.Tensor, rows: Rows, *, eps_low: float, eps_high: float
) -> PolicyTerm:
    """Return PPO's clip on the sequence ratio, the geometric mean of the token ratios; GSPO, arXiv 2507.18071 eq. 5.

    This is the token form (eq. 14): each token has the sequence's ratio, with gradient through its own logprob.
    Advantages may therefore differ between tokens.
    """
    mean = rows.mean(log_ratio.detach())[rows.ids]
    return ppo_clip(
        mean + log_ratio - log_ratio.detach(), advantages, eps_low=eps_low, eps_high=eps_high, dual_clip=None
    )


def cispo(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, *, eps_low: float, eps_high: float
) -> PolicyTerm:
    """Return -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi; CISPO, arXiv 2506.13585 eq. 4.

    The clip bounds the weight and does not stop the gradient.
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - eps_low, 1 + eps_high)
    acted = advantages != 0
    return PolicyTerm(
        loss=-weight * advantages * logprobs,
        clipped_low=acted & (ratio < 1 - eps_low),
        clipped_high=acted & (ratio > 1 + eps_high),
    )


def sapo(log_ratio: torch.Tensor, advantages: torch.Tensor, *, tau_positive: float, tau_negative: float) -> PolicyTerm:
    """Return -(4 / tau) sigmoid(tau (r - 1)) A, with tau by the sign of the advantage; SAPO, arXiv 2511.20347 eq. 5.

    The gate is soft and has slope 1 at r = 1. Nothing is clipped.
    """
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_positive), advantages.new_tensor(tau_negative))
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau
    nothing = torch.zeros_like(advantages, dtype=torch.bool)
    return PolicyTerm(loss=-gate * advantages, clipped_low=nothing, clipped_high=nothing)


def gmpo(
    log_ratio: torch.Tensor, advantages: torch.Tensor, rows: Rows, *, eps_low: float, eps_high: float
) -> PolicyTerm:
    """Return -(geometric mean of the clipped token ratios) * A; GMPO, arXiv 2507.20673 eq. 4.

    Each token's log ratio is clipped to [-eps_low, eps_high] on the side that its advantage would push it to, and then
    averaged. A is the row's mean advantage. The loss is the same at every token of the row.
    """
    sign = torch.sign(advantages)
    bounded = log_ratio.clamp(-eps_low, eps_high)
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * bounded)
    objective = rows.mean(pessimistic).exp() * rows.mean(advantages)
    stopped = sign * bounded < sign * log_ratio
    return PolicyTerm(
        loss=-objective[rows.ids], clipped_low=stopped & (log_ratio < 0), clipped_high=stopped & (log_ratio > 0)
    )


def reinforce(logprobs: torch.Tensor, advantages: torch.Tensor) -> PolicyTerm:
    """Return -A log pi. There is no ratio, so it is correct only for tokens that the current policy sampled."""
    nothing = torch.zeros_like(advantages, dtype=torch.bool)
    return PolicyTerm(loss=-advantages * logprobs, clipped_low=nothing, clipped_high=nothing)


def policy_term(
    loss: PolicyLoss,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    rows: Rows,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
    tau_positive: float,
    tau_negative: float,
) -> PolicyTerm:
    """Return the term of the named objective. All tensors are [N]; `logprobs` has gradient."""
    log_ratio = logprobs - old_logprobs.detach()
    match loss:
        case "ppo_clip":
            return ppo_clip(log_ratio, advantages, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
        case "gspo":
            return gspo(log_ratio, advantages, rows, eps_low=eps_low, eps_high=eps_high)
        case "cispo":
            return cispo(logprobs, log_ratio, advantages, eps_low=eps_low, eps_high=eps_high)
        case "sapo":
            return sapo(log_ratio, advantages, tau_positive=tau_positive, tau_negative=tau_negative)
        case "gmpo":
            return gmpo(log_ratio, advantages, rows, eps_low=eps_low, eps_high=eps_high)
        case "reinforce":
            return reinforce(logprobs, advantages)
