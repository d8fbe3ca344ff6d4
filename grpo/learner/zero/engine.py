"""The learner: one rank of a DeepSpeed ZeRO group, with the policy, the frozen reference and the critic.

Verbs: `step` (a driver step's optimizer steps), `save` (a Hugging Face folder), `capture` and `restore` (a checkpoint).
Its parts: `models` (which may be offloaded), `step_engine` (their forward and backward passes and optimizer steps), and
`synced` (the policy as a weight sync uses it). Every verb is a collective: all ranks call it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from grpo.config import Config, dump
from grpo.files import FileRecord
from grpo.learner import heads
from grpo.learner.prepare import Prepared
from grpo.learner.protocol import Model
from grpo.learner.replay import MAX_DUMPS, write_dump
from grpo.learner.step import run_step
from grpo.learner.tally import merge
from grpo.learner.token_columns import TokenColumns
from grpo.learner.zero import model_folder, setup
from grpo.learner.zero.models import Models, build, move_reference
from grpo.learner.zero.setup import Ranks
from grpo.learner.zero.state import Captures
from grpo.learner.zero.synced import SyncedPolicy
from grpo.sync.weights import torch_dtype
from grpo.types import Batch, RankStep, StepResult


class Learner:
    """One rank of the process group that `setup.init_process_group` joined; `device` is that function's result."""

    def __init__(self, config: Config, rank: int, device: torch.device, run: Path) -> None:
        """`run`: the run folder, for dumps of updates that were not finite and for values per token."""
        self._config = config
        self._run = run
        self.device = device
        self._ranks = Ranks(config, rank, device)
        torch.manual_seed(config.run.seed)
        prove_gradient_scale(config)
        self.models = build(config, device)
        self.step_engine = ZeroStepEngine(config, self.models, self._ranks, run / "nonfinite")
        self.synced = SyncedPolicy(self.models, self._ranks, config.learner.zero_stage)
        self._captures = Captures(config, self.models, rank, device)

    def gpus(self) -> tuple[str, ...]:
        """Return the UUID of this rank's GPU; empty on CPU."""
        return (str(torch.cuda.get_device_properties(self.device).uuid),) if self.device.type == "cuda" else ()

    def step(self, step: RankStep) -> StepResult:
        """Train on one driver step's minibatches; return the result over all ranks, which is the same on each."""
        config, engine = self._config, self.step_engine
        learning_rate = float(self.models.policy.optimizer.param_groups[0]["lr"])
        columns = TokenColumns() if config.token_columns else None
        tally = run_step(step, engine, config.algorithm, config.critic, self.device, columns)
        tally.add("optim/lr", learning_rate, 1)
        if columns is not None:
            columns.write(self._run / "tokens" / f"step-{engine.steps + 1:06d}-rank-{self._ranks.rank}.parquet")
            tally.token_columns = None  # not sent to the other ranks
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
        backward(self._models.engine(model), loss, last=last, world_size=self._ranks.count)

    def optimizer_step(self, model: Model) -> float:
        engine = self._models.engine(model)
        if self._config.learner.zero_stage == 0:  # DeepSpeed checks no norm there
            norm = plain_grad_norm(engine.module)
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


def plain_grad_norm(module: torch.nn.Module) -> float:
    """Return the global gradient norm at ZeRO 0, where DeepSpeed computes none.

    ZeRO 0 trains in float32, and every rank has the complete gradients after the last `backward`.
    """
    norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm())


def backward(engine: Any, loss: torch.Tensor, *, last: bool, world_size: int) -> None:
    """Accumulate the gradient of `loss`, a share of the sum over the ranks; `last` ends the accumulation.

    DeepSpeed averages gradients over the ranks. The factor `world_size` turns the average into the sum.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * world_size)


def prove_gradient_scale(config: Config) -> None:
    """Check that `backward` on shares of a loss accumulates the gradient of their sum, and does so in float32.

    The check trains a temporary parameter w under the run's DeepSpeed config. Each rank contributes a microbatch of
    w/ranks and four of w/(512 ranks). One SGD step at lr 1 must then move w by exactly -(1 + 1/128). A sum in bfloat16,
    whose numbers above 1 differ by 1/128, would stay at 1.

    Raises RuntimeError, with the actual movement of w, if it does not.
    """
    world = config.cluster.learner_ranks

    class Scalar(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(8, dtype=torch_dtype(config.model.dtype)))

        def forward(self) -> torch.Tensor:
            return self.w.float().sum()

    model = Scalar()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config=setup.deepspeed_config(config),
        dist_init_required=False,
    )
    for share in (1.0, 1 / 512, 1 / 512, 1 / 512):
        backward(engine, engine() * share / world, last=False, world_size=world)
    backward(engine, engine() / (512 * world), last=True, world_size=world)
    engine.step()
    with deepspeed.zero.GatheredParameters([engine.module.w], enabled=config.learner.zero_stage == 3):
        moved = engine.module.w.detach().float().cpu()
    engine.destroy()
    if not torch.equal(moved, torch.full((8,), -1 - 1 / 128)):
        raise RuntimeError(
            f"DeepSpeed made {-float(moved[0]):g} of gradients that add up to {1 + 1 / 128:g} at ZeRO "
            f"{config.learner.zero_stage} with {world} ranks; the learner's steps would be wrong by that factor"
        )
