"""Per-token KL estimators from single samples, and the gradients that they can have.

`kl_ref` is the KL to the frozen reference (the anchor); `kl_old` is the KL to the old policy (the trust region).
Neither is ever called plain "kl".

With d = logprobs - ref_logprobs of a token that the current policy sampled (joschu.net/blog/kl-approx.html):

    k1 = d                  unbiased, may be negative, high variance
    k2 = d^2 / 2            biased, low variance
    k3 = exp(-d) - 1 + d    unbiased, never negative

The *gradient* of an estimator can estimate another quantity than its value does (arXiv 2506.09477, 2510.01555):

    gradient of            autodiff                    k2                          ratio_weighted
    k1                     0 (refused)                 KL(policy to reference)     KL(policy to reference)
    k2                     KL(policy to reference)     KL(policy to reference)     another quantity (refused)
    k3                     KL(reference to policy)     KL(policy to reference)     KL(policy to reference)

`k2` is straight-through: it keeps the value of the estimator and replaces the gradient by d * grad(logprobs).
`ratio_weighted` multiplies the estimator by the ratio to the policy that sampled, so that the sampling distribution is
differentiated as well.

All of these treat the KL of one token with a fixed prefix. The KL of whole sequences also changes the distribution of
prefixes. Only KL in the reward has that gradient: its return sums the KL of the tokens that follow.
"""

from __future__ import annotations

import torch

from grpo.objective.compatibility import Estimator, Gradient


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return logprobs - ref_logprobs, elementwise."""
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return (logprobs - ref_logprobs)^2 / 2, elementwise."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return exp(ref - cur) - (ref - cur) - 1, elementwise; non-negative, and 0 where the logprobs are equal.

    This is the estimator in GRPO's loss (arXiv 2402.03300 eq. 4).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *, estimator: Estimator) -> torch.Tensor:
    """Return the named estimator, elementwise, with autodiff's gradient."""
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
    """Return the KL term of the loss, elementwise: the estimator's value with the named gradient.

    `ratio_weighted` also multiplies the value by the ratio.

    Args:
        logprobs: with gradient.
        old_logprobs: of the policy that sampled, for the ratio.
        clamp: the log ratio to the reference is clamped to +-clamp first. Beyond the bounds the estimator has no
            gradient; the ratio of `ratio_weighted` keeps its gradient. None: off.
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
    """Return the next step's kl_coef: raised if the measured KL is above the target, lowered if it is below.

    It changes by at most a fifth of its size per `horizon` steps; arXiv 1909.08593 sec. 2.2.
    """
    error = max(-0.2, min(0.2, measured / target - 1))
    return coefficient * (1 + error / horizon)
