"""Rewards of a step -> advantages of its rollouts. Pure; groups may be ragged, since failed rollouts have no reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group carries signal, by exact equality of the raw rewards and before any float statistic.

    A standard deviation of equal numbers is not always 0 in floating point; this is.
    """
    return any(reward != rewards[0] for reward in rewards[1:])


def group_normalized(rewards: Sequence[Sequence[float]], *, std_eps: float) -> list[list[float]]:
    """(r - mean) / (std + std_eps) within each group, the unbiased std (n - 1); GRPO, arXiv 2402.03300 sec. 4.1.

    Args:
        rewards: [P][n_p] rewards of the rollouts that were scored, n_p >= 2. Rollouts that failed are not in the list.
        std_eps: added to the standard deviation.

    Returns:
        [P][n_p] advantages; exactly 0 throughout a group without spread.

    Raises:
        ValueError: a group has fewer than two members or a reward is not finite.
    """
    out = []
    for group in rewards:
        values = torch.tensor(list(group), dtype=torch.float64)
        if len(group) < 2:
            raise ValueError(f"a group needs at least two scored rollouts, not {len(group)}")
        if not torch.isfinite(values).all():
            raise ValueError(f"rewards must be finite, not {list(group)}")
        if has_spread(group):
            out.append(((values - values.mean()) / (values.std(correction=1) + std_eps)).tolist())
        else:
            out.append([0.0] * len(group))
    return out
