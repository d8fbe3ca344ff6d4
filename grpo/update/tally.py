"""Metric sums of one learner rank. Nothing is divided here: sums and counts are added over ranks, then logged."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from grpo.metrics import MISMATCH_EDGES


@dataclass(slots=True)
class Tally:
    """Sums, counts and maxima by metric name."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    extremes: dict[str, float] = field(default_factory=dict)
    learner_logprob_sums: dict[int, float] = field(default_factory=dict)
    mismatch_counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(MISMATCH_EDGES) + 1, dtype=np.int64)
    )
    """Tokens by |learner - sampler| logprob, between MISMATCH_EDGES."""
    measured: Container[int] = ()
    """Rollouts whose mismatch has been measured before."""

    def add(self, name: str, total: float, count: float) -> None:
        """`count` 0: a share of a sum over the optimizer step, which is divided by the number of updates."""
        pair = self.sums.setdefault(name, [0.0, 0.0])
        pair[0] += total
        pair[1] += count

    def maximum(self, name: str, value: float) -> None:
        self.extremes[name] = max(value, self.extremes.get(name, value))

    def absorb(self, other: Tally) -> None:
        """Add what `other` has found."""
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)
        for name, value in other.extremes.items():
            self.maximum(name, value)
        self.learner_logprob_sums |= other.learner_logprob_sums
        self.mismatch_counts += other.mismatch_counts

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the seconds that the block takes to this rank's total; the logged value is the slowest rank's."""
        started = _clock(device)
        yield
        self.extremes[name] = self.extremes.get(name, 0.0) + _clock(device) - started


def _clock(device: torch.device) -> float:
    """Seconds, once everything that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
