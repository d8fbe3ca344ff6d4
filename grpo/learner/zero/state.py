"""Capture a rank's share of the training state as named flat tensors, at any ZeRO stage, and restore it.

Every parameter is treated as one flat float32 tensor. A rank owns a range of it, a *fragment*, and the same range of
the optimizer's moments. At ZeRO 0, rank 0 owns the whole parameter. At ZeRO 1 and 2, a fragment is the range that the
rank's partition covers; at ZeRO 3, it is the rank's shard. `capture` returns a rank's fragments under keys
`section/kind/name@start`. Each rank writes its fragments to one safetensors file, and `Reader` assembles any parameter
from the files of all ranks. So a checkpoint depends neither on the number of ranks nor on the stage, and it contains
no pickle.

`Captures` writes and reads the part of one rank, of all its models. `grpo.run.checkpoints` handles the location of the
files, their checksums and the rest of a run's state.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from grpo.config import Config
from grpo.files import FileRecord, seal
from grpo.learner.zero.models import Models, reference_moves
from grpo.learner.zero.weights import drop_gathered, whole_numel
from grpo.types import UserError

PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A rank's range of one parameter."""

    name: str
    start: int
    tensors: Mapping[str, torch.Tensor]
    """PARAMETER and the optimizer's moments -> float32 [numel], flat; views of the optimizer's own tensors."""


def fragments(engine: Any, *, zero_stage: int, rank: int) -> Iterator[Fragment]:
    """Yield this rank's fragments of a DeepSpeed engine's float32 parameters and moments."""
    for name, p in engine.module.named_parameters():
        if zero_stage == 0:
            if rank == 0:
                start, parameter, state = 0, p.data.view(-1), engine.basic_optimizer.state.get(p, {})
                moments = {key: state[key].view(-1) for key in MOMENTS if key in state}
            else:
                continue
        elif zero_stage < 3:
            mapping = p._hp_mapping
            if mapping is None:  # the parameter is on other ranks
                continue
            [flat] = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
            start, parameter, where = (
                mapping.lp_fragment_address.start,
                mapping.hp_fragment,
                mapping.hp_fragment_address,
            )
            state = engine.basic_optimizer.state.get(flat, {})
            moments = {key: state[key].narrow(0, where.start, where.numel) for key in MOMENTS if key in state}
        else:
            shard = p.ds_tensor.ds_numel
            start, optimizer = shard * rank, engine.optimizer
            here = min(shard, p.ds_numel - start)  # the last shards are padded
            if here <= 0:
                continue
            parameter = optimizer.get_local_fp32_param(p)[:here]
            known = optimizer.optimizer.state.get(_flats(engine, zero_stage)[0], {})
            moments = {key: optimizer.get_local_fp32_param(p, key)[:here] for key in MOMENTS if key in known}
        yield Fragment(name=name, start=start, tensors={PARAMETER: parameter, **moments})


def _flats(engine: Any, zero_stage: int) -> list[torch.Tensor]:
    """Return the tensors that are the keys of the optimizer's state."""
    if zero_stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def capture(engine: Any, section: str, *, zero_stage: int, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return copies of this rank's fragments in host memory, and the engine's counters as plain JSON."""
    tensors = {
        f"{section}/{kind}/{fragment.name}@{fragment.start}": tensor.detach().to("cpu", torch.float32, copy=True)
        for fragment in fragments(engine, zero_stage=zero_stage, rank=rank)
        for kind, tensor in fragment.tensors.items()
    }
    steps = {float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state}
    if len(steps) > 1:
        raise RuntimeError(f"the optimizer's states of {section} have taken different numbers of steps: {steps}")
    counters = {
        "optimizer_steps": int(steps.pop()) if steps else 0,
        "schedule": {key: engine.lr_scheduler.state_dict()[key] for key in ("last_epoch", "_step_count", "_last_lr")},
    }
    return tensors, counters


@torch.no_grad()
def restore(
    engine: Any, section: str, reader: Reader, counters: Mapping[str, Any], *, zero_stage: int, rank: int
) -> None:
    """Restore the parameters, moments and schedule of `section` to an engine that has made no step.

    Raises UserError if the checkpoint's parameters are not those of the engine.
    """
    kinds = reader.kinds(section)
    names = [name for name, _ in engine.module.named_parameters()]
    if set(names) != reader.names(section):
        strange = sorted(set(names) ^ reader.names(section))
        raise UserError(f"the checkpoint's {section} has other parameters than the model: {', '.join(strange[:4])}")
    if kinds != {PARAMETER}:
        for flat in _flats(engine, zero_stage):
            engine.basic_optimizer.state[flat] = {
                "step": _step(engine.basic_optimizer, counters["optimizer_steps"]),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
    ranges = {fragment.name: fragment for fragment in fragments(engine, zero_stage=zero_stage, rank=rank)}
    for name, p in engine.module.named_parameters():
        numel = p.ds_numel if zero_stage == 3 else p.numel()
        for kind in sorted(kinds):
            whole = reader.whole(section, kind, name, numel)
            if zero_stage == 3:
                shard = torch.zeros(p.ds_tensor.ds_numel, device=p.ds_tensor.device)
                here = whole[shard.numel() * rank : shard.numel() * (rank + 1)]
                shard[: here.numel()] = here
                engine.optimizer.set_local_hp_param(shard, p, None if kind == PARAMETER else kind)
                if kind == PARAMETER:
                    p.ds_tensor.data.copy_(shard)
                continue
            if kind == PARAMETER:
                p.data.view(-1).copy_(whole)
            if zero_stage == 0 and kind != PARAMETER:
                engine.basic_optimizer.state[p][kind].view(-1).copy_(whole)
            elif zero_stage > 0 and name in ranges:
                target = ranges[name].tensors[kind]
                target.copy_(whole[ranges[name].start : ranges[name].start + target.numel()])
    schedule = engine.lr_scheduler
    schedule.load_state_dict({**schedule.state_dict(), **counters["schedule"]})
    # the rates come from this run's schedule at the restored step: a changed optimizer.lr takes effect from here on
    rates = [base * at(schedule.last_epoch) for base, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _step(optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor | int:
    """Return a number of steps in the type that the optimizer's state uses."""
    return steps if isinstance(optimizer, DeepSpeedCPUAdam) else torch.tensor(float(steps))


def capture_frozen(module: Any, section: str, *, zero_stage: int, rank: int) -> dict[str, torch.Tensor]:
    """Return copies of this rank's share of a module without optimizer.

    The share is the rank's shards at ZeRO 3; otherwise rank 0 has the whole module.
    """
    tensors = {}
    for name, p in module.named_parameters():
        if zero_stage == 3:
            start, share = p.ds_tensor.ds_numel * rank, p.ds_tensor.data
            share = share[: max(0, min(share.numel(), p.ds_numel - start))]
        else:
            start, share = 0, p.data.view(-1)[: p.numel() if rank == 0 else 0]
        if share.numel():
            tensors[f"{section}/{PARAMETER}/{name}@{start}"] = share.to("cpu", torch.float32, copy=True)
    return tensors


@torch.no_grad()
def restore_frozen(module: Any, section: str, reader: Reader, *, zero_stage: int, rank: int) -> None:
    """Restore the parameters of `section`, as `capture_frozen` captured them, to `module`."""
    for name, p in module.named_parameters():
        whole = reader.whole(section, PARAMETER, name, p.ds_numel if zero_stage == 3 else p.numel())
        if zero_stage == 3:
            here = whole[p.ds_tensor.ds_numel * rank : p.ds_tensor.ds_numel * (rank + 1)]
            p.ds_tensor.data[: here.numel()].copy_(here)
        else:
            p.data.view(-1).copy_(whole)


class Reader:
    """Reads whole parameters from the files of all ranks. Use as a context manager."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = ExitStack()
        self._files: list[Any] = []
        self._parts: dict[str, list[tuple[int, Any, str]]] = {}
        for file in files:
            opened = self._stack.enter_context(safe_open(file, "pt"))
            self._files.append(opened)
            for key in opened.keys():  # noqa: SIM118 - no dict
                name, _, start = key.rpartition("@")
                self._parts.setdefault(name, []).append((int(start), opened, key))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def metadata(self, rank: int) -> dict[str, str]:
        """Return the metadata of a rank's file."""
        found: dict[str, str] = self._files[rank].metadata()
        return found

    def kinds(self, section: str) -> set[str]:
        """Return the kinds of tensors that are kept for a section's parameters: PARAMETER, and MOMENTS if any."""
        return {key.split("/")[1] for key in self._parts if key.startswith(f"{section}/")}

    def names(self, section: str) -> set[str]:
        """Return the names of a section's parameters."""
        prefix = f"{section}/{PARAMETER}/"
        return {key.removeprefix(prefix) for key in self._parts if key.startswith(prefix)}

    def whole(self, section: str, kind: str, name: str, numel: int) -> torch.Tensor:
        """Return one kind of tensor of a parameter, float32 [numel].

        Raises UserError if the fragments do not cover it exactly.
        """
        parts = sorted(self._parts.get(f"{section}/{kind}/{name}", []), key=lambda part: part[0])
        tensors, end = [], 0
        for start, opened, key in parts:
            tensors.append(opened.get_tensor(key))
            if start != end:
                break
            end += tensors[-1].numel()
        else:
            if end == numel:
                return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        raise UserError(f"the checkpoint does not hold all of {section}/{kind}/{name} ({numel} numbers)")


def write(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write one rank's file, flush it to the disk and read it back. Raises OSError if it cannot be written."""
    try:
        save_file(dict(tensors), file, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    return seal(file)


def random_states(device: torch.device) -> str:
    """Return the states of this process's random generators, as JSON."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return json.dumps(
        {
            "python": random.getstate(),
            "numpy": [name, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
            "torch": torch.get_rng_state().tolist(),
            "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
        }
    )


def restore_random_states(text: str, device: torch.device) -> None:
    """Set this process's random generators to the states that `random_states` returned."""
    states = json.loads(text)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8), device)


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
            captured, counters[section] = capture(engine, section, zero_stage=zero_stage, rank=self._rank)
            tensors |= captured
        if reference_moves(self._models, self._config.algorithm):
            module = self._models.reference_module
            tensors |= capture_frozen(module, "reference", zero_stage=zero_stage, rank=self._rank)
        generators = {"random": random_states(self._device)}
        self._writing = self._writer.submit(write, file, tensors, generators)
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
        with Reader(files) as reader:
            for section, engine in self._models.trained().items():
                restore(engine, section, reader, counters[section], zero_stage=zero_stage, rank=self._rank)
                drop_gathered(list(engine.module.parameters()), zero_stage)
            if reference_moves(self._models, self._config.algorithm):
                module = self._models.reference_module
                restore_frozen(module, "reference", reader, zero_stage=zero_stage, rank=self._rank)
                drop_gathered(list(module.parameters()), zero_stage)
            if self._rank < len(files):
                restore_random_states(reader.metadata(self._rank)["random"], self._device)
