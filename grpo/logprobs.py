"""Logits -> log probability of the target tokens, under the sampling temperature."""

from __future__ import annotations

import torch

CHUNK_ELEMENTS = 1 << 26
"""Logits that are turned to float32 at once: 256 MiB."""


def selected_logprobs(
    logits: torch.Tensor, target_ids: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy of that distribution.

    The sampler reports its logprobs after the same division (`logprobs_mode=processed_logprobs`). Computed in float32
    at least, by chunks of tokens, so that no float32 copy of all logits is needed without gradient.

    Args:
        logits: [B,T,V], any float dtype.
        target_ids: [B,T] int64.

    Returns:
        logprobs [B,T] with gradient, entropy [B,T] in nats, detached.
    """
    flat, targets = logits.flatten(0, 1), target_ids.flatten()
    size = max(1, CHUNK_ELEMENTS // flat.shape[-1])
    logprobs, entropies = [], []
    for part, ids in zip(torch.split(flat, size), torch.split(targets, size), strict=True):
        scaled = (part if part.dtype == torch.float64 else part.float()) / temperature
        log_softmax = torch.log_softmax(scaled, dim=-1)
        logprobs.append(log_softmax.gather(-1, ids[:, None])[:, 0])
        with torch.no_grad():
            entropies.append(torch.special.entr(log_softmax.exp()).sum(-1))
    shape = target_ids.shape
    return torch.cat(logprobs).view(shape), torch.cat(entropies).view(shape)
