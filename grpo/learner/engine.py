"""The learner: one rank of a DeepSpeed ZeRO group, with the frozen reference beside the policy.

Verbs: `step` (a driver step's optimizer steps), `weights` (named tensors for a sync, gathered at ZeRO-3),
`perturbed` (for the full sync check), `probe_logprobs`, `save` (a Hugging Face folder). Every verb is a collective:
all ranks call it together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GenerationConfig

from grpo.config import Config
from grpo.learner import setup
from grpo.logprobs import selected_logprobs
from grpo.types import RankStep, StepResult, UserError
from grpo.update import Objective, Tally, run_step
from grpo.weight_sync import Probe, buckets_of, torch_dtype

OTHER_FILES = (".json", ".jinja", ".model", ".txt")


class Learner:
    """One rank of the process group that `setup.init_process_group` has joined, on its `device`."""

    def __init__(self, config: Config, rank: int, device: torch.device) -> None:
        self._config = config
        self.rank = rank
        self.world_size = config.learner.ranks
        self.device = device
        self._dtype = torch_dtype(config.model.dtype)
        torch.manual_seed(config.run.seed)
        setup.prove_gradient_scale(config)
        model = self._load()
        if config.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = setup.make_optimizer(config, model)
        self._engine, _, _, self._schedule = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=setup.deepspeed_config(config),
            lr_scheduler=lambda o: setup.make_schedule(config, o),
            dist_init_required=False,
        )
        self._engine.train()
        self._reference = self._make_reference() if config.algorithm.kl_coef > 0 else None
        self._optimizer_steps = 0
        algorithm = config.algorithm
        self._objective = Objective(
            temperature=config.sampling.temperature,
            eps_low=algorithm.eps_low,
            eps_high=algorithm.eps_high,
            kl_coef=algorithm.kl_coef,
            importance_weight_cap=algorithm.importance_weight_cap,
        )

    def _load(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            self._config.model.path,
            dtype=self._dtype,
            attn_implementation=self._config.model.attention,
            trust_remote_code=self._config.model.trust_remote_code,
        )
        refuse_dropout(model.config)
        return model

    def _make_reference(self) -> Any:
        model = self._load().eval().requires_grad_(False)
        if self._config.learner.zero_stage == 3:
            engine, *_ = deepspeed.initialize(
                model=model, config=setup.reference_config(self._config), dist_init_required=False
            )
            return engine
        return model.to("cpu" if self._config.learner.reference_offload else self.device)

    # --- grpo.update.PolicyEngine ------------------------------------------------------------------------------------

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Right padding needs no attention mask: causal attention keeps it from every real position."""
        return self._engine(input_ids=input_ids, use_cache=False).logits

    def ref_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert self._reference is not None
        return self._reference(input_ids=input_ids, use_cache=False).logits

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """DeepSpeed averages gradients over ranks; the losses are shares of one sum, so the average is undone."""
        setup.backward(self._engine, loss, last=last, world_size=self.world_size)

    def optimizer_step(self) -> float:
        if self._config.learner.zero_stage == 0 and self._dtype == torch.float32:
            norm = setup.plain_grad_norm(self._engine.module)
        else:
            norm = None
        self._engine.step()
        self._optimizer_steps += 1
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def any_rank(self, flag: bool) -> bool:
        if self.world_size == 1:
            return flag
        vote = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(vote)
        return bool(vote > 0)

    # --- verbs -------------------------------------------------------------------------------------------------------

    def step(self, step: RankStep) -> StepResult:
        """Train on one driver step's minibatches. The result covers all ranks and is the same on each."""
        learning_rate = float(self._engine.optimizer.param_groups[0]["lr"])
        with self._reference_in_place():
            tally, _ = run_step(step, self, self._objective, self.device)
        tally.add("optim/lr", learning_rate, 1)
        tally.add("policy/updates", len(step.minibatches) / self.world_size, 1)
        tallies: list[Tally | None] = [tally]
        if self.world_size > 1:
            tallies = [None] * self.world_size
            dist.all_gather_object(tallies, tally)
        return merge(tallies, self._optimizer_steps)

    @contextmanager
    def _reference_in_place(self) -> Iterator[None]:
        """Bring an offloaded reference to the device for one step."""
        if not self._config.learner.reference_offload:
            yield
            return
        assert self._reference is not None
        self._reference.to(self.device)
        yield
        self._reference.to("cpu")

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter under its Hugging Face name, tied ones once; gathered at ZeRO-3.

        A yielded tensor stays valid as long as it is held: at ZeRO-3 the gathered storage is its own.
        """
        parameters = list(self._engine.module.named_parameters())
        if self._config.learner.zero_stage < 3:
            yield from ((name, p.detach()) for name, p in parameters)
            return
        # ds_tensor is this rank's share: buckets go by the logical size, which is ds_numel
        logical = ((name, torch.empty(p.ds_shape, dtype=p.dtype, device="meta")) for name, p in parameters)
        by_name = dict(parameters)
        for bucket in buckets_of(logical):
            gathered = [by_name[name] for name, _ in bucket]
            with deepspeed.zero.GatheredParameters(gathered):
                yield from ((name, by_name[name].detach()) for name, _ in bucket)

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Every parameter changed by a few percent, then restored bit for bit; at ZeRO-3 on this rank's shards."""
        parameters = list(self._engine.module.parameters())
        shards = [getattr(p, "ds_tensor", p).data for p in parameters]
        saved = [shard.clone() for shard in shards]
        for i, shard in enumerate(shards):
            shard.mul_(1.03 + 0.01 * (i % 3)).add_(0.002 * (1 + i % 2))
        self._drop_gathered(parameters)
        try:
            yield
        finally:
            for shard, copy in zip(shards, saved, strict=True):
                shard.copy_(copy)
            self._drop_gathered(parameters)

    def _drop_gathered(self, parameters: Sequence[Any]) -> None:
        """ZeRO-3 keeps small parameters gathered between forwards; make it gather the changed shards anew."""
        if self._config.learner.zero_stage == 3:
            for p in parameters:
                if p.ds_status == ZeroParamStatus.AVAILABLE:
                    p.partition()

    @torch.no_grad()
    def probe_logprobs(self, probe: Probe) -> tuple[NDArray[np.float32], ...]:
        """[N][L_n - 1] logprobs of the probe tokens after the first, at temperature 1, under the weights of now."""
        out = []
        for ids in probe.token_ids:
            tokens = torch.tensor([ids], device=self.device)
            logits = self.logits(tokens[:, :-1])
            logprobs, _ = selected_logprobs(logits, tokens[:, 1:], temperature=1.0)
            out.append(logprobs[0].float().cpu().numpy())
        return tuple(out)

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (model, config, tokenizer files): aside first, then renamed."""
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.weights():
            if self.rank == 0:
                state[name] = tensor.to("cpu", copy=True)
        if self.rank == 0:
            aside = folder.with_name(folder.name + ".partial")
            shutil.rmtree(aside, ignore_errors=True)
            # a model's own sampling settings need not pass transformers' checks to be kept: the file is copied as it is
            self._engine.module.generation_config = GenerationConfig()
            self._engine.module.save_pretrained(aside, state_dict=state)
            (aside / "generation_config.json").unlink(missing_ok=True)
            copy_other_files(self._config.model.path, aside)
            os.replace(aside, folder)
        if self.world_size > 1:
            dist.barrier()

    def destroy(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def merge(tallies: Sequence[Tally | None], optimizer_steps: int) -> StepResult:
    """Add the ranks' sums. Quantities that every rank holds in full (norm, lr) divide out through their counts."""
    sums: dict[str, tuple[float, float]] = {}
    extremes: dict[str, float] = {}
    logprob_sums: dict[int, float] = {}
    for tally in tallies:
        assert tally is not None
        for name, (total, count) in tally.sums.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
        for name, value in tally.extremes.items():
            extremes[name] = max(value, extremes.get(name, value))
        logprob_sums |= tally.learner_logprob_sums
    return StepResult(
        optimizer_steps=optimizer_steps, metrics=sums, extremes=extremes, learner_logprob_sums=logprob_sums
    )


def refuse_dropout(config: Any) -> None:
    """Dropout would make the learner's logprobs differ from the sampler's and from one pass to the next.

    Raises UserError naming the model's setting.
    """
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float) and value > 0:
            raise UserError(f"model.path: the model's config has {name}={value}; train with dropout 0 (set it to 0.0)")


def copy_other_files(source: str, target: Path) -> None:
    """Everything beside the weights that a folder needs to be used: tokenizer, chat template, generation config.

    `source`: the model's folder or hub id.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[f"*{suffix}" for suffix in OTHER_FILES]))
    for file in folder.iterdir():
        wanted = file.suffix in OTHER_FILES and "index" not in file.name
        if file.is_file() and wanted and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
