"""Corrections for samples from a policy that differs slightly from the learner's: numerics, quantization, staleness.

The functions take old_logprobs (the learner's at the step's start) and sampler_logprobs (as vLLM reported them), [N].
They return detached tensors that multiply the policy term and nothing else. They never renormalise: a token that is
masked here stays in every denominator. fengyao.notion.site/off-policy-rl; masked form arXiv 2510.18855 sec. 3 (IcePop).
"""

from __future__ import annotations

from typing import Literal

import torch

from grpo.objective.rows import Rows

Level = Literal["none", "token", "sequence"]
Mode = Literal["truncate", "mask"]


def importance_weight(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, rows: Rows, *, level: Level
) -> torch.Tensor:
    """Return exp(old - sampler) of each token, [N], or the product over the row at each of its tokens.

    Args:
        level: "token" ignores the weight of the prefix, so it is biased, and has low variance. "sequence" is exact, and
            its variance grows with length. "none": all ones.
    """
    if level == "none":
        return torch.ones_like(old_logprobs)
    difference = old_logprobs.detach() - sampler_logprobs
    if level == "sequence":
        difference = rows.sum(difference)[rows.ids]
    return difference.exp()


def bounded_weight(weight: torch.Tensor, *, mode: Mode, low: float, high: float) -> torch.Tensor:
    """Return the weight bounded by `mode`: "truncate" clamps to [low, high]; "mask" sets weights outside to 0."""
    if mode == "truncate":
        return weight.clamp(low, high)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def kept_sequences(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, rows: Rows, *, low: float, high: float
) -> torch.Tensor:
    """Return [B] bool: true if the geometric mean of a row's token weights lies within [low, high].

    The mean makes the bounds independent of length; arXiv 2510.18855 and verl's rollout correction use it.
    """
    mean = rows.mean(old_logprobs.detach() - sampler_logprobs).exp()
    return (mean >= low) & (mean <= high)
