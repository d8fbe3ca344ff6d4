"""Checkpoints of one learner rank: copy the state of its models, write it in the background, restore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from grpo.config import Config
from grpo.files import FileRecord
from grpo.learner.zero import state
from grpo.learner.zero.models import Models, reference_moves
from grpo.learner.zero.weights import drop_gathered, whole_numel


class Captures:
    """Writer and reader of one rank's part of a checkpoint."""

    def __init__(self, config: Config, models: Models, rank: int, device: torch.device) -> None:
        self._config, self._models, self._rank, self._device = config, models, rank, device
        self._zero_stage = config.learner.zero_stage
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[FileRecord] | None = None

    def capture(self, file: Path) -> dict[str, Any]:
        """Copy this rank's state to host memory and start to write it to `file`; `captured` waits until it is written.

        Returns the counters of the state, as plain JSON.
        """
        zero_stage, tensors, counters = self._zero_stage, dict[str, torch.Tensor](), {}
        for section, engine in self._models.trained().items():
            captured, counters[section] = state.capture(engine, section, zero_stage=zero_stage, rank=self._rank)
            tensors |= captured
        if reference_moves(self._models, self._config.algorithm):
            module = self._models.reference_module
            tensors |= state.capture_frozen(module, "reference", zero_stage=zero_stage, rank=self._rank)
        generators = {"random": state.random_states(self._device)}
        self._writing = self._writer.submit(state.write, file, tensors, generators)
        return counters

    def state_bytes(self) -> int:
        """Return the size of all ranks' captures in bytes: float32 parameters, and AdamW's two moments of each."""
        kinds = {"adamw": 3, "sgd": 1}
        optimizers = {"policy": self._config.optimizer, "critic": self._config.critic.optimizer}
        total = sum(
            kinds[optimizers[section].name] * sum(whole_numel(p) for p in engine.module.parameters())
            for section, engine in self._models.trained().items()
        )
        if reference_moves(self._models, self._config.algorithm):
            total += sum(whole_numel(p) for p in self._models.policy.module.parameters())
        return 4 * total

    def captured(self, *, wait: bool) -> FileRecord | None:
        """Return the record of the file that `capture` started to write, or None while it is not on the disk.

        `wait`: block until it is.
        """
        assert self._writing is not None
        return self._writing.result() if wait or self._writing.done() else None

    def restore(self, files: Sequence[Path], counters: Mapping[str, Any]) -> None:
        """Restore the state that the ranks of an earlier learner captured to `files`."""
        zero_stage = self._zero_stage
        with state.Reader(files) as reader:
            for section, engine in self._models.trained().items():
                state.restore(engine, section, reader, counters[section], zero_stage=zero_stage, rank=self._rank)
                drop_gathered(list(engine.module.parameters()), zero_stage)
            if reference_moves(self._models, self._config.algorithm):
                module = self._models.reference_module
                state.restore_frozen(module, "reference", reader, zero_stage=zero_stage, rank=self._rank)
                drop_gathered(list(module.parameters()), zero_stage)
            if self._rank < len(files):
                state.restore_random_states(reader.metadata(self._rank)["random"], self._device)
