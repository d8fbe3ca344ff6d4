"""The spread of the rewards of a group. Without torch, which readers of runs do not need."""

from __future__ import annotations

from collections.abc import Sequence


def has_spread(rewards: Sequence[float]) -> bool:
    """Return whether the raw rewards of a group differ, by exact comparison.

    The standard deviation of equal numbers is not always 0 in floating point, so no statistic is used.
    """
    return any(reward != rewards[0] for reward in rewards[1:])
