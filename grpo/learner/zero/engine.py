"""The learner: one rank of a DeepSpeed ZeRO group, with the policy, the frozen reference and the critic.

Verbs: `step` (a driver step's optimizer steps), `weights` (named tensors for a sync, gathered at ZeRO 3),
`perturbation` (for the full sync check), `read_probe`, `save` (a Hugging Face folder), `capture` and `restore` (a
checkpoint). Every verb is a collective: all ranks call it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel

from grpo.config import Config, dump
from grpo.files import FileRecord
from grpo.learner import heads
from grpo.learner.prepare import Prepared
from grpo.learner.probe import Perturbation, read_probe
from grpo.learner.protocol import Model
from grpo.learner.step import run_step
from grpo.learner.tally import merge
from grpo.learner.zero import setup, state
from grpo.sync.probe import Probe, Reading, group_members
from grpo.sync.weights import buckets_of
from grpo.types import Batch, RankStep, StepResult

MAX_DUMPS = 3
"""Maximum number of dumps of updates that were not finite; each dump holds the weights."""

OTHER_FILES = (".json", ".jinja", ".model", ".txt")


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
        model = heads.load_policy(config)
        if config.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._head = heads.install(model, config)
        self._engine = setup.train_engine(config, model, config.optimizer)
        self._critic = None
        if config.algorithm.advantage == "gae":
            critic = heads.load_critic(config)
            if config.learner.gradient_checkpointing:
                critic.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self._critic = setup.train_engine(config, critic, config.critic.optimizer)
        self._reference: Any = None
        if config.algorithm.kl_coef > 0:
            self._make_reference()
        self._optimizer_steps = self._steps = self._set_aside = 0
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[FileRecord] | None = None
        self._offloaded = False

    def _make_reference(self) -> None:
        """Load a frozen copy of the starting policy: sharded at ZeRO 3, else whole on every rank."""
        model = heads.load_policy(self._config).eval().requires_grad_(False)
        self._ref_head = heads.install(model, self._config)
        if self._config.learner.zero_stage == 3:
            self._reference, *_ = deepspeed.initialize(
                model=model, config=setup.reference_config(self._config), dist_init_required=False
            )
        else:
            self._reference = model.to("cpu" if self._config.learner.reference_offload else self.device)

    # --- grpo.learner.protocol.StepEngine ----------------------------------------------------------------------------

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logprobs of the targets and entropy, [B,T] each, 0 off the completion mask.

        Right padding needs no attention mask: under causal attention no real position sees it.
        """
        if self._config.learner.reference_offload and torch.is_grad_enabled():
            self._reference.to("cpu")  # frees memory for the activations
        return self._forward(self._engine, self._head, batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: Batch) -> torch.Tensor:
        if self._config.learner.reference_offload:
            self._reference.to(self.device)
        return self._forward(self._reference, self._ref_head, batch)[0]

    def _forward(self, model: Any, head: heads.LogprobHead, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        targets, wanted = batch.target_ids.to(self.device), batch.completion_mask.to(self.device)
        with head.targets(targets, self._config.sampling.temperature, wanted):
            return heads.unpack(model(input_ids=batch.input_ids.to(self.device), use_cache=False).logits)

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self._critic is not None
        values: torch.Tensor = self._critic(input_ids=token_ids, use_cache=False).logits[..., 0]
        return values

    def backward(self, model: Model, loss: torch.Tensor, *, last: bool) -> None:
        setup.backward(self._engine_of(model), loss, last=last, world_size=self.world_size)

    def optimizer_step(self, model: Model) -> float:
        engine = self._engine_of(model)
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
        for engine in self._engines().values():
            engine.offload_states(pin_memory=True)
        if isinstance(self._reference, PreTrainedModel):
            self._reference.to("cpu")
        self._offloaded = True

    def reload(self) -> None:
        """Undo `offload`."""
        if not self._offloaded:
            return
        for engine in self._engines().values():
            engine.reload_states()
        if isinstance(self._reference, PreTrainedModel) and not self._config.learner.reference_offload:
            self._reference.to(self.device)
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
        tensors = {
            f"{i}/{field.name}": getattr(part, field.name).contiguous().cpu()
            for i, parts in enumerate(zip(minibatch, prepared, strict=True))
            for part in parts
            for field in dataclasses.fields(part)
            if getattr(part, field.name) is not None and not (part is parts[0] and field.name == "advantages")
        }
        about = {"step": str(self._steps + 1), "kl_coef": repr(kl_coef), "microbatches": str(len(minibatch))}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"rank-{self.rank}.safetensors", about)
        self.save(folder / "model")
        if self.rank == 0:
            (folder / "config.yaml").write_text(dump(self._config), encoding="utf-8")

    def _engine_of(self, model: Model) -> Any:
        return self._engine if model == "policy" else self._critic

    # --- verbs -------------------------------------------------------------------------------------------------------

    def step(self, step: RankStep) -> StepResult:
        """Train on one driver step's minibatches; return the result over all ranks, which is the same on each."""
        learning_rate = float(self._engine.optimizer.param_groups[0]["lr"])
        tally = run_step(step, self, self._config.algorithm, self._config.critic, self.device)
        tally.add("optim/lr", learning_rate, 1)
        tallies = self.gathered(tally) if self.world_size > 1 else [tally]
        self._steps += 1
        self._move_reference()
        return merge(tallies, self._optimizer_steps)

    @torch.no_grad()
    def _move_reference(self) -> None:
        """Copy the policy to the reference if that is due, or move the reference towards it by `reference_average`.

        At ZeRO 3 each rank moves its own shards: policy and reference are sharded in the same way.
        """
        a = self._config.algorithm
        due = a.reference_refresh_every and self._steps % a.reference_refresh_every == 0
        share = 1.0 if due else a.reference_average
        if not share or self._reference is None:
            return
        ours, theirs = (
            self._engine.module.parameters(),
            getattr(self._reference, "module", self._reference).parameters(),
        )
        for p, r in zip(ours, theirs, strict=True):
            target, source = getattr(r, "ds_tensor", r).data, getattr(p, "ds_tensor", p).data
            target.lerp_(source.to(target.device), share)
        self._drop_gathered(list(getattr(self._reference, "module", self._reference).parameters()))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every weight as the model folder has it, tied ones once; gathered at ZeRO 3.

        A yielded tensor stays valid as long as it is referenced: at ZeRO 3 it keeps the gathered storage.
        """
        for name, tensor in self._weights_of(self._engine):
            if name in self._stored_alike:
                yield name, tensor
            else:
                yield from heads.as_in_folder(self._engine.module, name, tensor).items()

    @functools.cached_property
    def _stored_alike(self) -> frozenset[str]:
        """Names of the parameters that the model folder has unchanged.

        They are cached: the conversion in transformers takes a millisecond per parameter, a third of a small model's
        sync.
        """
        alike = []
        for name, parameter in self._engine.module.named_parameters():
            blank = torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
            if heads.as_in_folder(self._engine.module, name, blank).get(name) is blank:
                alike.append(name)
        return frozenset(alike)

    def _weights_of(self, engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = list(engine.module.named_parameters())
        if self._config.learner.zero_stage < 3:
            yield from ((name, p.detach()) for name, p in parameters)
            return
        # ds_tensor is this rank's shard only: buckets are made by the full shape
        logical = ((name, torch.empty(p.ds_shape, dtype=p.dtype, device="meta")) for name, p in parameters)
        by_name = dict(parameters)
        for bucket in buckets_of(logical):
            gathered = [by_name[name] for name, _ in bucket]
            with deepspeed.zero.GatheredParameters(gathered):
                yield from ((name, by_name[name].detach()) for name, _ in bucket)

    def parameter_count(self) -> int:
        """Return the number of the policy's parameter tensors."""
        return sum(1 for _ in self._engine.module.parameters())

    @contextmanager
    def perturbation(self, group: int, groups: int) -> Iterator[Callable[[float], None]]:
        """Yield a function that perturbs a group of the parameters by a strength; each call replaces the previous one.

        The parameters are restored bit for bit at the end. At ZeRO 3 this rank's shards are perturbed.
        """
        parameters = list(self._engine.module.parameters())
        sharded = self._config.learner.zero_stage == 3
        vocabulary = self._engine.module.config.get_text_config().vocab_size
        chosen = group_members(group, groups, len(parameters))
        perturbation = Perturbation(parameters, chosen, vocabulary, self.rank if sharded else 0)

        def perturb(strength: float) -> None:
            perturbation.apply(strength)
            self._drop_gathered(parameters)

        try:
            yield perturb
        finally:  # the parameters may have new storage: the learner may have been offloaded since
            perturbation.undo()
            self._drop_gathered(parameters)

    def _drop_gathered(self, parameters: Sequence[Any]) -> None:
        """Make ZeRO 3 gather changed shards again: it keeps small parameters gathered between forwards."""
        if self._config.learner.zero_stage == 3:
            for p in parameters:
                if p.ds_status == ZeroParamStatus.AVAILABLE:
                    p.partition()

    def read_probe(self, probe: Probe) -> Reading:
        """Return the logprobs of the probe under the current weights, and their rounding noise."""
        assert not self._offloaded, "the learner's weights are in host memory"
        return read_probe(self._engine, self._engine.module, self._head, probe, self.device)

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (model, config, tokenizer files), with the critic in `critic/`.

        Rank 0 writes to a folder with the suffix `.partial`, and then renames it.
        """
        policy = self._state_of(self._engine)
        critic = None if self._critic is None else self._state_of(self._critic)
        if self.rank == 0:
            aside = folder.with_name(folder.name + ".partial")
            shutil.rmtree(aside, ignore_errors=True)
            # a model's sampling settings may fail transformers' checks: generation_config.json is copied unchanged
            self._engine.module.generation_config = GenerationConfig()
            self._engine.module.save_pretrained(aside, state_dict=policy)
            (aside / "generation_config.json").unlink(missing_ok=True)
            copy_other_files(self._config.model.path, aside)
            if critic is not None:
                assert self._critic is not None
                self._critic.module.save_pretrained(aside / "critic", state_dict=critic)
            os.replace(aside, folder)
        if self.world_size > 1:
            self.barrier()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _engines(self) -> dict[str, Any]:
        return {"policy": self._engine} | ({} if self._critic is None else {"critic": self._critic})

    @property
    def _moving_reference(self) -> bool:
        a = self._config.algorithm
        return self._reference is not None and bool(a.reference_refresh_every or a.reference_average)

    def capture(self, file: Path) -> dict[str, Any]:
        """Copy this rank's state to host memory and start to write it to `file`; `captured` waits until it is written.

        Returns the counters of the state, as plain JSON.
        """
        zero_stage, tensors, counters = self._config.learner.zero_stage, dict[str, torch.Tensor](), {}
        for section, engine in self._engines().items():
            captured, counters[section] = state.capture(engine, section, zero_stage=zero_stage, rank=self.rank)
            tensors |= captured
        if self._moving_reference:
            module = getattr(self._reference, "module", self._reference)
            tensors |= state.capture_frozen(module, "reference", zero_stage=zero_stage, rank=self.rank)
        generators = {"random": state.random_states(self.device)}
        self._writing = self._writer.submit(state.write, file, tensors, generators)
        return {**counters, "optimizer_steps": self._optimizer_steps, "steps": self._steps}

    def state_bytes(self) -> int:
        """Return the size of all ranks' captures in bytes: float32 parameters, and AdamW's two moments of each."""
        kinds = {"adamw": 3, "sgd": 1}
        optimizers = {"policy": self._config.optimizer, "critic": self._config.critic.optimizer}
        total = sum(
            kinds[optimizers[section].name] * sum(whole_numel(p) for p in engine.module.parameters())
            for section, engine in self._engines().items()
        )
        if self._moving_reference:
            total += sum(whole_numel(p) for p in self._engine.module.parameters())
        return 4 * total

    def captured(self, *, wait: bool) -> FileRecord | None:
        """Return the record of the file that `capture` started to write, or None while it is not on the disk.

        `wait`: block until it is.
        """
        assert self._writing is not None
        return self._writing.result() if wait or self._writing.done() else None

    def restore(self, files: Sequence[Path], counters: Mapping[str, Any]) -> None:
        """Restore the state that the ranks of an earlier learner captured to `files`."""
        zero_stage = self._config.learner.zero_stage
        with state.Reader(files) as reader:
            for section, engine in self._engines().items():
                state.restore(engine, section, reader, counters[section], zero_stage=zero_stage, rank=self.rank)
                self._drop_gathered(list(engine.module.parameters()))
            if self._moving_reference:
                module = getattr(self._reference, "module", self._reference)
                state.restore_frozen(module, "reference", reader, zero_stage=zero_stage, rank=self.rank)
                self._drop_gathered(list(module.parameters()))
            if self.rank < len(files):
                state.restore_random_states(reader.metadata(self.rank)["random"], self.device)
        self._optimizer_steps, self._steps = counters["optimizer_steps"], counters["steps"]

    def _state_of(self, engine: Any) -> dict[str, torch.Tensor]:
        """Return the weights on the CPU at rank 0, and nothing on other ranks. A collective."""
        tensors = {}
        for name, tensor in self._weights_of(engine):
            if self.rank == 0:
                tensors[name] = tensor.to("cpu", copy=True)
        return tensors

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        for engine in (self._engine, self._critic):
            if engine is not None:
                engine.destroy()


def whole_numel(parameter: Any) -> int:
    """Return the number of elements of a parameter, also if ZeRO 3 keeps only a shard of it on this rank."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def copy_other_files(source: str, target: Path) -> None:
    """Copy the files besides the weights that a model folder needs: tokenizer, chat template, generation config.

    `source`: the model's folder or hub id.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[f"*{suffix}" for suffix in OTHER_FILES]))
    for file in folder.iterdir():
        wanted = file.suffix in OTHER_FILES and "index" not in file.name
        if file.is_file() and wanted and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
