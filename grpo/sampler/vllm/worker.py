"""Extension of vLLM's workers: a recorder of the tensors that a weight sync loads, and of the slots they fill.

vLLM mixes `WorkerExtension` into its worker class and imports this module in every worker's process. The import
registers our transfer engines there. A sampler has tensor_parallel x pipeline_parallel workers; a single worker runs
in the sampler's own process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from grpo.sampler.vllm import transfer
from grpo.sync.weights import WeightSyncError, checksum

transfer.register()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One worker's report of a sync."""

    consumed: dict[str, int]
    """Tensor name -> checksum of the data that the worker received."""
    unfilled: tuple[str, ...]
    unmapped: tuple[str, ...]
    """Tensors for which this worker has no slot. With pipeline parallelism another worker may hold their layer."""


class WorkerExtension:
    """Methods that the sampler calls by name on every worker."""

    model_runner: Any

    def recorder_install(self) -> None:
        if not torch.cuda.is_available() and self.model_runner.parallel_config.pipeline_parallel_size > 1:
            self.model_runner.profile_run()  # allocates a stage's receive buffers, which vLLM 0.32 omits on CPU
        self._recorder = LoadRecorder(self.model_runner.get_model())

    def recorder_start(self) -> None:
        self._recorder.start()

    def recorder_report(self) -> Loaded:
        recorder = self._recorder
        return Loaded(consumed=recorder.consumed, unfilled=recorder.unfilled(), unmapped=tuple(recorder.unmapped))

    def recorder_perturb(self, substring: str, factor: float) -> None:
        """Scale parameters in place, bypassing the protocol. Tests use this to make the checks fail."""
        for name, parameter in self.model_runner.get_model().named_parameters():
            if substring in name:
                parameter.data.mul_(factor)

    def memory_used(self) -> tuple[int, int]:
        """Return (used, total) bytes of this worker's GPU; (0, 1) on CPU."""
        if not torch.cuda.is_available():
            return 0, 1
        free, total = torch.cuda.mem_get_info()
        return total - free, total

    def gpu_uuid(self) -> str:
        """Return the UUID of the GPU that this worker computes on; "" on CPU."""
        if not torch.cuda.is_available():
            return ""
        return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def merge_reports(reports: Sequence[Loaded]) -> Loaded:
    """Merge the reports of one sampler's workers.

    Raises WeightSyncError if the workers received different data.
    """
    first = reports[0]
    for i, other in enumerate(reports):
        differing = [name for name in first.consumed if other.consumed.get(name) != first.consumed[name]]
        if differing or other.consumed.keys() != first.consumed.keys():
            raise WeightSyncError(f"worker {i} was given other weights than worker 0: {differing[:3]}")
    return Loaded(
        consumed=first.consumed,
        unfilled=tuple(f"{name} of worker {i}" for i, one in enumerate(reports) for name in one.unfilled)
        if len(reports) > 1
        else first.unfilled,
        unmapped=tuple(name for name in first.unmapped if all(name in one.unmapped for one in reports)),
    )


class LoadRecorder:
    """Wraps the model's `load_weights` and records which tensor fills which slots.

    vLLM's engines discard the result of `load_weights`. The recorder keeps it, so that a tensor without a slot or a
    slot without a tensor is detected with every transport. The first sync loads tensors one by one, which shows the
    slots of each. Later syncs must fill the same slots.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._load = model.load_weights
        self._names = [name for name, _ in model.named_parameters()]  # a tied weight appears once
        self._slots: dict[str, int] = {}
        self._loaded: dict[str, int] = {}
        self._slots_of: dict[str, tuple[str, ...]] = {}
        self.consumed: dict[str, int] = {}
        self.unmapped: list[str] = []
        model.load_weights = self.load

    def start(self) -> None:
        """Clear the records of the previous sync.

        Must be called after the reload has begun: only then do the parameters have the checkpoint's shapes instead of
        packed ones.
        """
        parameters = dict(self._model.named_parameters())
        self._slots = {name: slot_size(self._model, name, parameters[name]) for name in self._names}
        self._loaded = dict.fromkeys(self._slots, 0)
        self.consumed = {}
        self.unmapped = []

    def load(self, weights: Any) -> set[str]:
        """Load `weights` and record them. Called by vLLM's transfer engine instead of the model's `load_weights`."""
        pairs: list[tuple[str, torch.Tensor]] = list(weights)
        unknown = [pair for pair in pairs if pair[0] not in self._slots_of]
        known = [pair for pair in pairs if pair[0] in self._slots_of]
        loaded: set[str] = set()
        for name, tensor in unknown:
            try:
                slots = set(self._load([(name, tensor)]))
            except ValueError:  # some of vLLM's loaders raise for an unknown name, others skip it
                slots = set()
            self._slots_of[name] = tuple(slots)
            loaded |= slots
        if known:
            expected = {slot for name, _ in known for slot in self._slots_of[name]}
            slots = set(self._load(known))
            if slots != expected:
                raise RuntimeError(f"vLLM loaded {sorted(slots ^ expected)} differently from the first sync")
            loaded |= slots
        for name, tensor in pairs:
            if not self._slots_of[name]:
                self.unmapped.append(name)
            if name in self.consumed:
                raise RuntimeError(f"{name} was sent twice in one sync")
            self.consumed[name] = checksum(tensor)
            for slot in self._slots_of[name]:
                self._loaded[slot] += tensor.numel()
        return loaded

    def unfilled(self) -> tuple[str, ...]:
        """Return the slots that received fewer or more elements than they hold."""
        return tuple(name for name, size in self._slots.items() if self._loaded[name] != size)


def slot_size(model: Any, name: str, parameter: torch.Tensor) -> int:
    """Return how many elements a checkpoint must supply for a worker's parameter.

    Checkpoint tensors are whole, and the worker keeps its share. Vocabulary padding is added by vLLM and not counted.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    rows = getattr(owner, "org_vocab_size", None)
    if rows is not None and leaf in ("weight", "bias"):
        return int(rows) * math.prod(parameter.shape[1:])
    if isinstance(owner, LinearBase) and leaf in ("weight", "bias"):
        out = owner.output_size
        if isinstance(owner, QKVParallelLinear):  # `output_size` repeats key-value heads that several workers share
            out = owner.total_num_heads * owner.head_size
            out += owner.total_num_kv_heads * (owner.head_size + owner.v_head_size)
        return int(out * owner.input_size) if leaf == "weight" else int(out)
    return parameter.numel()
