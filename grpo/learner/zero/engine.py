"""The learner: one rank of a DeepSpeed ZeRO group, with the policy, the frozen reference and the critic.

Verbs: `step` (a driver step's optimizer steps), `save` (a Hugging Face folder), `capture` and `restore` (a checkpoint).
Its parts: `models` (which may be offloaded), and `synced` (the policy as a weight sync uses it). Every verb is a
collective: all ranks call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.config import Config
from grpo.files import FileRecord
from grpo.learner.step import run_step
from grpo.learner.tally import merge
from grpo.learner.zero import model_folder, setup
from grpo.learner.zero.captures import Captures
from grpo.learner.zero.models import build, move_reference
from grpo.learner.zero.ranks import Ranks
from grpo.learner.zero.step_engine import ZeroStepEngine
from grpo.learner.zero.synced import SyncedPolicy
from grpo.types import RankStep, StepResult


class Learner:
    """One rank of the process group that `setup.init_process_group` joined; `device` is that function's result."""

    def __init__(self, config: Config, rank: int, device: torch.device, dumps: Path) -> None:
        """`dumps`: the folder for dumps of updates that were not finite."""
        self._config = config
        self.device = device
        self._ranks = Ranks(config, rank, device)
        torch.manual_seed(config.run.seed)
        setup.prove_gradient_scale(config)
        self.models = build(config, device)
        self.step_engine = ZeroStepEngine(config, self.models, self._ranks, dumps)
        self.synced = SyncedPolicy(self.models, self._ranks, config.learner.zero_stage)
        self._captures = Captures(config, self.models, rank, device)

    def gpus(self) -> tuple[str, ...]:
        """Return the UUID of this rank's GPU; empty on CPU."""
        return (str(torch.cuda.get_device_properties(self.device).uuid),) if self.device.type == "cuda" else ()

    def step(self, step: RankStep) -> StepResult:
        """Train on one driver step's minibatches; return the result over all ranks, which is the same on each."""
        config, engine = self._config, self.step_engine
        learning_rate = float(self.models.policy.optimizer.param_groups[0]["lr"])
        tally = run_step(step, engine, config.algorithm, config.critic, self.device)
        tally.add("optim/lr", learning_rate, 1)
        tallies = self._ranks.gathered(tally) if self._ranks.count > 1 else [tally]
        engine.steps += 1
        move_reference(self.models, config.algorithm, engine.steps, config.learner.zero_stage)
        return merge(tallies, engine.optimizer_steps)

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (model, config, tokenizer files), with the critic in `critic/`."""
        model_folder.save(self.models, folder, self._config, self._ranks)

    def capture(self, file: Path) -> dict[str, Any]:
        """Copy this rank's state to host memory and start to write it to `file`; `captured` waits until it is written.

        Returns the counters of the state, as plain JSON.
        """
        counters = self._captures.capture(file)
        return {**counters, "optimizer_steps": self.step_engine.optimizer_steps, "steps": self.step_engine.steps}

    def state_bytes(self) -> int:
        """Return the size of all ranks' captures in bytes."""
        return self._captures.state_bytes()

    def captured(self, *, wait: bool) -> FileRecord | None:
        """Return the record of the file that `capture` started to write, or None while it is not on the disk.

        `wait`: block until it is.
        """
        return self._captures.captured(wait=wait)

    def restore(self, files: Sequence[Path], counters: Mapping[str, Any]) -> None:
        """Restore the state that the ranks of an earlier learner captured to `files`."""
        self._captures.restore(files, counters)
        self.step_engine.optimizer_steps, self.step_engine.steps = counters["optimizer_steps"], counters["steps"]

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        for engine in self.models.trained().values():
            engine.destroy()
