"""The critic's loss, per token."""

from __future__ import annotations

import torch


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max((v - R)^2, (clip(v, v_old - eps, v_old + eps) - R)^2) / 2, as in PPO's code (arXiv 2005.12729 sec. 3).

    Args:
        values: [N] with gradient; the other tensors have none.
        eps: None: no clipping.

    Returns:
        loss [N]; clipped [N] bool, true where the clipped square is the greater one and stops the gradient.
    """
    plain = (values - returns).square()
    if eps is None:
        return plain / 2, torch.zeros_like(values, dtype=torch.bool)
    # clamp the value, not its difference from the old value: a value within the bounds must stay equal bit for bit
    bounded = (torch.clamp(values, old_values - eps, old_values + eps) - returns).square()
    return torch.maximum(plain, bounded) / 2, bounded > plain
