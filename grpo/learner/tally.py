"""Metric sums of one learner rank. Nothing is divided here: sums and counts are first added over the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from grpo.learner.token_columns import TokenColumns
from grpo.metrics.measures import MISMATCH_EDGES
from grpo.types import Mean, StepResult


@dataclass(slots=True)
class Tally:
    """Sums, counts, maxima and minima by metric name."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)
    mismatch_square: Mean = field(default_factory=Mean)
    kl_ref: Mean = field(default_factory=Mean)
    learner_logprob_sums: dict[int, float] = field(default_factory=dict)
    mismatch_counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(MISMATCH_EDGES) + 1, dtype=np.int64)
    )
    """Numbers of tokens by |learner - sampler| logprob, in the bins of MISMATCH_EDGES."""
    token_columns: TokenColumns | None = None
    """Values per token, if they are recorded. They stay on this rank."""
    skipped_updates: int = 0
    """Updates of policy and critic that were not finite; the same on every rank."""

    def add(self, name: str, total: float, count: float) -> None:
        """Add to a metric's sum and count.

        `count` is 0 for a share of a sum over the optimizer step, which is later divided by the number of updates.
        """
        pair = self.sums.setdefault(name, [0.0, 0.0])
        pair[0] += total
        pair[1] += count

    def maximum(self, name: str, value: float) -> None:
        self.maxima[name] = max(value, self.maxima.get(name, value))

    def minimum(self, name: str, value: float) -> None:
        self.minima[name] = min(value, self.minima.get(name, value))

    def absorb(self, other: Tally) -> None:
        """Merge `other` into this tally."""
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)
        for name, value in other.maxima.items():
            self.maximum(name, value)
        for name, value in other.minima.items():
            self.minimum(name, value)
        self.mismatch_square.add(other.mismatch_square.total, other.mismatch_square.count)
        self.kl_ref.add(other.kl_ref.total, other.kl_ref.count)
        self.learner_logprob_sums |= other.learner_logprob_sums
        self.mismatch_counts += other.mismatch_counts
        if self.token_columns is not None and other.token_columns is not None:
            self.token_columns.absorb(other.token_columns)
        self.skipped_updates = max(self.skipped_updates, other.skipped_updates)

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the block's duration, in seconds, to this rank's total. The logged value is the slowest rank's."""
        started = _clock(device)
        yield
        self.maxima[name] = self.maxima.get(name, 0.0) + _clock(device) - started


def merge(tallies: Sequence[Tally], optimizer_steps: int) -> StepResult:
    """Return the ranks' sums added up. A quantity that every rank has in full (norm, lr) is averaged by its count."""
    merged = Tally()
    for tally in tallies:
        merged.absorb(tally)
    return StepResult(
        optimizer_steps=optimizer_steps,
        skipped_updates=merged.skipped_updates,
        metrics={name: (total, count) for name, (total, count) in merged.sums.items()},
        maxima=merged.maxima,
        minima=merged.minima,
        mismatch_square=merged.mismatch_square,
        kl_ref=merged.kl_ref,
        learner_logprob_sums=merged.learner_logprob_sums,
        mismatch_counts=merged.mismatch_counts,
    )


def _clock(device: torch.device) -> float:
    """Wait until `device` has finished its queued work, then return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
