"""The learner: one rank of a DeepSpeed ZeRO group, with the policy, the frozen reference and the critic.

Verbs: `step` (a driver step's optimizer steps), `weights` (named tensors for a sync, gathered at ZeRO 3),
`perturbation` (for the full sync check), `read_probe`, `save` (a Hugging Face folder), `capture` and `restore` (a
checkpoint). Every verb is a collective: all ranks call it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from grpo.config import Config, dump
from grpo.files import FileRecord
from grpo.learner import heads
from grpo.learner.prepare import Prepared
from grpo.learner.probe import Perturbation, read_probe
from grpo.learner.protocol import Model
from grpo.learner.step import run_step
from grpo.learner.tally import merge
from grpo.learner.zero import model_folder, setup
from grpo.learner.zero.captures import Captures
from grpo.learner.zero.dumps import MAX_DUMPS, write_dump
from grpo.learner.zero.models import build, move_reference
from grpo.learner.zero.weights import drop_gathered, stored_alike, weights_of
from grpo.sync.probe import Probe, Reading, group_members
from grpo.types import Batch, RankStep, StepResult


class Learner:
    """One rank of the process group that `setup.init_process_group` joined; `device` is that function's result."""

    def __init__(self, config: Config, rank: int, device: torch.device, dumps: Path) -> None:
        """`dumps`: the folder for dumps of updates that were not finite."""
        self._config, self._dumps = config, dumps
        self.rank = rank
        self.world_size = config.cluster.learner_ranks
        self.device = device
        patience = timedelta(seconds=config.cluster.step_timeout_s)
        self._control = dist.new_group(backend="gloo", timeout=patience) if config.on_gpu else dist.group.WORLD
        torch.manual_seed(config.run.seed)
        setup.prove_gradient_scale(config)
        self.models = build(config, device)
        self._optimizer_steps = self._steps = self._set_aside = 0
        self._captures = Captures(config, self.models, rank, device)
        self._offloaded = False

    # --- grpo.learner.protocol.StepEngine ----------------------------------------------------------------------------

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logprobs of the targets and entropy, [B,T] each, 0 off the completion mask.

        Right padding needs no attention mask: under causal attention no real position sees it.
        """
        if self._config.learner.reference_offload and torch.is_grad_enabled():
            self.models.reference.to("cpu")  # frees memory for the activations
        return self._forward(self.models.policy, self.models.head, batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: Batch) -> torch.Tensor:
        assert self.models.reference_head is not None
        if self._config.learner.reference_offload:
            self.models.reference.to(self.device)
        return self._forward(self.models.reference, self.models.reference_head, batch)[0]

    def _forward(self, model: Any, head: heads.LogprobHead, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        targets, wanted = batch.target_ids.to(self.device), batch.completion_mask.to(self.device)
        with head.targets(targets, self._config.sampling.temperature, wanted):
            return heads.unpack(model(input_ids=batch.input_ids.to(self.device), use_cache=False).logits)

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self.models.critic is not None
        values: torch.Tensor = self.models.critic(input_ids=token_ids, use_cache=False).logits[..., 0]
        return values

    def backward(self, model: Model, loss: torch.Tensor, *, last: bool) -> None:
        setup.backward(self.models.engine(model), loss, last=last, world_size=self.world_size)

    def optimizer_step(self, model: Model) -> float:
        engine = self.models.engine(model)
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
            self._optimizer_steps += 1
        return norm

    def all_sum(self, values: Sequence[float]) -> list[float]:
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each of `values` over the ranks. A collective."""
        return [value / self.world_size for value in self.all_sum(values)]

    def barrier(self) -> None:
        """Wait for every rank. The barrier runs on the CPU: a kernel that waits would occupy the sampler's GPU."""
        dist.barrier(group=self._control)

    def gathered(self, ours: Any) -> list[Any]:
        """Return the object `ours` of every rank, in the order of the ranks. A collective on the CPU."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, ours, group=self._control)
        return found

    def drop_cache(self) -> None:
        """Release the GPU memory that torch caches for the next step's activations."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def offload(self) -> None:
        """Offload states and weights to host memory, which leaves the GPU memory to the sampler.

        A sharded reference stays. Pinned memory gains nothing on CPU and is used nevertheless: parameters then get new
        storage as they do on GPUs, so that tests on CPU find code that keeps the old storage.
        """
        if self._offloaded:
            return
        for engine in self.models.trained().values():
            engine.offload_states(pin_memory=True)
        if isinstance(self.models.reference, PreTrainedModel):
            self.models.reference.to("cpu")
        self._offloaded = True

    def reload(self) -> None:
        """Undo `offload`."""
        if not self._offloaded:
            return
        for engine in self.models.trained().values():
            engine.reload_states()
        if isinstance(self.models.reference, PreTrainedModel) and not self._config.learner.reference_offload:
            self.models.reference.to(self.device)
        self._offloaded = False

    def gpus(self) -> tuple[str, ...]:
        """Return the UUID of this rank's GPU; empty on CPU."""
        return (str(torch.cuda.get_device_properties(self.device).uuid),) if self.device.type == "cuda" else ()

    def set_aside(self, minibatch: Sequence[Batch], prepared: Sequence[Prepared], kl_coef: float) -> None:
        """Write the dump for `grpo replay`, for the first MAX_DUMPS updates of this process that were not finite."""
        self._set_aside += 1
        if self._set_aside > MAX_DUMPS:
            return
        folder = self._dumps / f"step-{self._steps + 1:06d}-{self._set_aside}"
        write_dump(folder, minibatch, prepared, rank=self.rank, step=self._steps + 1, kl_coef=kl_coef)
        self.save(folder / "model")
        if self.rank == 0:
            (folder / "config.yaml").write_text(dump(self._config), encoding="utf-8")

    # --- verbs -------------------------------------------------------------------------------------------------------

    def step(self, step: RankStep) -> StepResult:
        """Train on one driver step's minibatches; return the result over all ranks, which is the same on each."""
        learning_rate = float(self.models.policy.optimizer.param_groups[0]["lr"])
        tally = run_step(step, self, self._config.algorithm, self._config.critic, self.device)
        tally.add("optim/lr", learning_rate, 1)
        tallies = self.gathered(tally) if self.world_size > 1 else [tally]
        self._steps += 1
        move_reference(self.models, self._config.algorithm, self._steps, self._config.learner.zero_stage)
        return merge(tallies, self._optimizer_steps)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every weight as the model folder has it, tied ones once; gathered at ZeRO 3.

        A yielded tensor stays valid as long as it is referenced: at ZeRO 3 it keeps the gathered storage.
        """
        for name, tensor in weights_of(self.models.policy, self._config.learner.zero_stage):
            if name in self._stored_alike:
                yield name, tensor
            else:
                yield from heads.as_in_folder(self.models.policy.module, name, tensor).items()

    @functools.cached_property
    def _stored_alike(self) -> frozenset[str]:
        """Names of the parameters that the model folder has unchanged.

        They are cached: the conversion in transformers takes a millisecond per parameter, a third of a small model's
        sync.
        """
        return stored_alike(self.models.policy.module)

    def parameter_count(self) -> int:
        """Return the number of the policy's parameter tensors."""
        return sum(1 for _ in self.models.policy.module.parameters())

    @contextmanager
    def perturbation(self, group: int, groups: int) -> Iterator[Callable[[float], None]]:
        """Yield a function that perturbs a group of the parameters by a strength; each call replaces the previous one.

        The parameters are restored bit for bit at the end. At ZeRO 3 this rank's shards are perturbed.
        """
        parameters = list(self.models.policy.module.parameters())
        sharded = self._config.learner.zero_stage == 3
        vocabulary = self.models.policy.module.config.get_text_config().vocab_size
        chosen = group_members(group, groups, len(parameters))
        perturbation = Perturbation(parameters, chosen, vocabulary, self.rank if sharded else 0)

        def perturb(strength: float) -> None:
            perturbation.apply(strength)
            drop_gathered(parameters, self._config.learner.zero_stage)

        try:
            yield perturb
        finally:  # the parameters may have new storage: the learner may have been offloaded since
            perturbation.undo()
            drop_gathered(parameters, self._config.learner.zero_stage)

    def read_probe(self, probe: Probe) -> Reading:
        """Return the logprobs of the probe under the current weights, and their rounding noise."""
        assert not self._offloaded, "the learner's weights are in host memory"
        return read_probe(self.models.policy, self.models.policy.module, self.models.head, probe, self.device)

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (model, config, tokenizer files), with the critic in `critic/`.

        Rank 0 writes to a folder with the suffix `.partial`, and then renames it.
        """
        stage = self._config.learner.zero_stage
        model_folder.save(self.models, folder, source=self._config.model.path, zero_stage=stage, rank=self.rank)
        if self.world_size > 1:
            self.barrier()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def capture(self, file: Path) -> dict[str, Any]:
        """Copy this rank's state to host memory and start to write it to `file`; `captured` waits until it is written.

        Returns the counters of the state, as plain JSON.
        """
        counters = self._captures.capture(file)
        return {**counters, "optimizer_steps": self._optimizer_steps, "steps": self._steps}

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
        self._optimizer_steps, self._steps = counters["optimizer_steps"], counters["steps"]

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        for engine in self.models.trained().values():
            engine.destroy()
