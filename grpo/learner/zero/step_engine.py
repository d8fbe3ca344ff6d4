"""Forward and backward passes and optimizer steps on one rank's DeepSpeed engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.config import Config, dump
from grpo.learner import heads
from grpo.learner.prepare import Prepared
from grpo.learner.protocol import Model
from grpo.learner.zero import model_folder, setup
from grpo.learner.zero.dumps import MAX_DUMPS, write_dump
from grpo.learner.zero.models import Models
from grpo.learner.zero.ranks import Ranks
from grpo.types import Batch


class ZeroStepEngine:
    """The `grpo.learner.protocol.StepEngine` of DeepSpeed."""

    def __init__(self, config: Config, models: Models, ranks: Ranks, dumps: Path) -> None:
        """`dumps`: the folder for dumps of updates that were not finite."""
        self._config, self._models, self._ranks, self._dumps = config, models, ranks, dumps
        self.steps = self.optimizer_steps = self._set_aside = 0
        """`steps`: complete driver steps of the run; `optimizer_steps`: of the policy, in the run."""

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logprobs of the targets and entropy, [B,T] each, 0 off the completion mask.

        Right padding needs no attention mask: under causal attention no real position sees it.
        """
        if self._config.learner.reference_offload and torch.is_grad_enabled():
            self._models.reference.to("cpu")  # frees memory for the activations
        return self._forward(self._models.policy, self._models.head, batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: Batch) -> torch.Tensor:
        assert self._models.reference_head is not None
        if self._config.learner.reference_offload:
            self._models.reference.to(self._models.device)
        return self._forward(self._models.reference, self._models.reference_head, batch)[0]

    def _forward(self, model: Any, head: heads.LogprobHead, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._models.device
        targets, wanted = batch.target_ids.to(device), batch.completion_mask.to(device)
        with head.targets(targets, self._config.sampling.temperature, wanted):
            return heads.unpack(model(input_ids=batch.input_ids.to(device), use_cache=False).logits)

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self._models.critic is not None
        values: torch.Tensor = self._models.critic(input_ids=token_ids, use_cache=False).logits[..., 0]
        return values

    def backward(self, model: Model, loss: torch.Tensor, *, last: bool) -> None:
        setup.backward(self._models.engine(model), loss, last=last, world_size=self._ranks.count)

    def optimizer_step(self, model: Model) -> float:
        engine = self._models.engine(model)
        if self._config.learner.zero_stage == 0:  # DeepSpeed checks no norm there
            norm = setup.plain_grad_norm(engine.module)
            if not math.isfinite(norm):
                engine.zero_grad()
                return norm
            engine.step()
        else:
            engine.step()
            norm = float(engine.get_global_grad_norm())
        if model == "policy" and math.isfinite(norm):
            self.optimizer_steps += 1
        return norm

    def all_sum(self, values: Sequence[float]) -> list[float]:
        return self._ranks.all_sum(values)

    def set_aside(self, minibatch: Sequence[Batch], prepared: Sequence[Prepared], kl_coef: float) -> None:
        """Write the dump for `grpo replay`, for the first MAX_DUMPS updates of this process that were not finite."""
        self._set_aside += 1
        if self._set_aside > MAX_DUMPS:
            return
        step, rank = self.steps + 1, self._ranks.rank
        folder = self._dumps / f"step-{step:06d}-{self._set_aside}"
        write_dump(folder, minibatch, prepared, rank=rank, step=step, kl_coef=kl_coef)
        model_folder.save(self._models, folder / "model", self._config, self._ranks)
        if rank == 0:
            (folder / "config.yaml").write_text(dump(self._config), encoding="utf-8")
