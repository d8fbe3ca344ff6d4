"""The trained tokens of a microbatch on one axis. Only this module derives a token's row from the layout of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo.objective.rows import Rows
from grpo.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTokens:
    """The N tokens of a microbatch's completion mask, row after row and in order, on the learner's device."""

    positions: torch.Tensor
    """[N] int64; index of each token in a flattened [B,T] tensor."""
    rows: Rows
    """Its ids index the [B] tensors of the batch."""
    weights: torch.Tensor
    """[N] float32; the batch's token weights."""
    sampler_logprobs: torch.Tensor
    """[N] float32"""

    def select(self, padded: torch.Tensor) -> torch.Tensor:
        """Return the elements of a [B,T] tensor at these tokens, [N]. All others get no gradient."""
        return padded.flatten().index_select(0, self.positions)


def trained_tokens(batch: Batch, device: torch.device) -> TrainedTokens:
    """Return the trained tokens of `batch`. A filler microbatch has none."""
    mask = batch.completion_mask
    return TrainedTokens(
        positions=mask.flatten().nonzero()[:, 0].to(device),
        rows=Rows(mask.nonzero()[:, 0].to(device), len(mask)),
        weights=batch.token_weights[mask].to(device),
        sampler_logprobs=batch.sampler_logprobs[mask].to(device),
    )
