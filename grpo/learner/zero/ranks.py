"""The process group of the learner's ranks: sums, barriers and objects of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from grpo.config import Config


class Ranks:
    """One rank's view of the group that `setup.init_process_group` joined; `device` is that function's result.

    Every method is a collective.
    """

    def __init__(self, config: Config, rank: int, device: torch.device) -> None:
        self.rank, self.count, self._device = rank, config.cluster.learner_ranks, device
        patience = timedelta(seconds=config.cluster.step_timeout_s)
        self._control = dist.new_group(backend="gloo", timeout=patience) if config.on_gpu else dist.group.WORLD

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Return each of `values` summed over the ranks."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def barrier(self) -> None:
        """Wait for every rank. The barrier runs on the CPU: a kernel that waits would occupy the sampler's GPU."""
        dist.barrier(group=self._control)

    def gathered(self, ours: Any) -> list[Any]:
        """Return the object `ours` of every rank, in the order of the ranks. The exchange runs on the CPU."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, ours, group=self._control)
        return found
