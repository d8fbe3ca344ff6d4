"""Per-token KL estimators. `kl_ref` is the anchor to the frozen reference; it is never called plain "kl"."""

from __future__ import annotations

import torch


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(ref - cur) - (ref - cur) - 1, elementwise; non-negative, 0 where they agree.

    Schulman's k3 (joschu.net/blog/kl-approx.html), the estimator in GRPO's loss (arXiv 2402.03300 eq. 4). Its value is
    an unbiased estimate of KL(current || reference) for tokens sampled from the current policy; its autodiff gradient
    is that of the *reverse* direction and is what the published recipes use.

    Args:
        logprobs, ref_logprobs: [B,T] log probabilities of the same tokens, any float dtype.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio
