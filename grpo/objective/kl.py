"""Per-token KL estimators from single samples, and the gradients that they can be given.

`kl_ref` is the anchor to the frozen reference; `kl_old` the trust region. Neither is ever called plain "kl".

With d = logprobs - ref_logprobs of a token that the current policy sampled (joschu.net/blog/kl-approx.html):

    k1 = d                  unbiased, may be negative, much variance
    k2 = d^2 / 2            biased, low variance
    k3 = exp(-d) - 1 + d    unbiased, never negative

What an estimator's *gradient* estimates is another question (arXiv 2506.09477, 2510.01555):

    gradient of            autodiff                    k2                          ratio_weighted
    k1                     0 (refused)                 KL(policy to reference)     KL(policy to reference)
    k2                     KL(policy to reference)     the same thing              another quantity (refused)
    k3                     KL(reference to policy)     KL(policy to reference)     KL(policy to reference)

`k2` is straight-through: the value is the estimator's, the gradient is d * grad(logprobs). `ratio_weighted` multiplies
the estimator by the ratio to the policy that sampled, so that the sampling distribution is differentiated as well.
All of this is the KL of one token with its prefix held fixed. The KL of whole sequences also moves the prefixes: only
KL in the reward, with the sum of what follows as return, has its gradient.
"""

from __future__ import annotations

import torch

from grpo.objective.legal import Estimator, Gradient


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """logprobs - ref_logprobs, elementwise."""
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """(logprobs - ref_logprobs)^2 / 2, elementwise."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(ref - cur) - (ref - cur) - 1, elementwise; non-negative, 0 where they agree.

    The estimator in GRPO's loss (arXiv 2402.03300 eq. 4).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *, estimator: Estimator) -> torch.Tensor:
    """The named estimator, [B,T], differentiable as it stands."""
    return {"k1": k1, "k2": k2, "k3": k3}[estimator](logprobs, ref_logprobs)


def anchor_kl(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    *,
    estimator: Estimator,
    gradient: Gradient,
    clamp: float | None,
) -> torch.Tensor:
    """The anchor's term for the loss, [B,T]: the estimator's value (times the ratio, where `ratio_weighted`) with the
    named gradient.

    Args:
        logprobs: with gradient.
        old_logprobs: [B,T] of the policy that sampled, for the ratio.
        clamp: the log ratio to the reference is held within +-clamp first; beyond it the estimator has no gradient,
            while the ratio of `ratio_weighted` keeps its own. None: off.
    """
    difference = logprobs - ref_logprobs
    if clamp is not None:
        difference = difference.clamp(-clamp, clamp)
    value = estimate(difference, torch.zeros_like(difference), estimator=estimator)
    if gradient == "k2":
        straight = difference.square() / 2
        return value.detach() + straight - straight.detach()
    if gradient == "ratio_weighted":
        return (logprobs - old_logprobs).exp() * value
    return value


def adapted_coefficient(coefficient: float, measured: float, *, target: float, horizon: float) -> float:
    """The next step's kl_coef: raised where the measured KL is above target, lowered where it is below, by at most a
    fifth of its size per `horizon` steps; arXiv 1909.08593 sec. 2.2."""
    error = max(-0.2, min(0.2, measured / target - 1))
    return coefficient * (1 + error / horizon)
