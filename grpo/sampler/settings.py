"""The sampling settings of training and of evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.config import Config
from grpo.types import SamplingSettings


def train_settings(config: Config, end_token_ids: Sequence[int]) -> SamplingSettings:
    """Return the sampling settings of training. The learner uses the same temperature in its replay."""
    return SamplingSettings(
        temperature=config.sampling.temperature,
        max_tokens=config.sampling.max_tokens,
        end_token_ids=tuple(end_token_ids),
        stop=config.sampling.stop,
    )


def eval_settings(config: Config, end_token_ids: Sequence[int]) -> SamplingSettings:
    """Return the sampling settings of evaluation."""
    e = config.data.eval
    return SamplingSettings(
        temperature=e.temperature,
        max_tokens=e.max_tokens or config.sampling.max_tokens,
        end_token_ids=tuple(end_token_ids),
        stop=config.sampling.stop,
        top_p=e.top_p,
        top_k=e.top_k,
        min_p=e.min_p,
    )
