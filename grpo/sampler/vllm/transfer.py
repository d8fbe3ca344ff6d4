"""The receiving ends of a weight sync, as engines of vLLM's weight transfer; the sending ends: `grpo.sync.transport`.

GPUs use our own engines, too. vLLM 0.32's `ipc` engine rebuilds one mapping for each tensor and keeps views of the
sender's memory in layers that it has not fully received. Its `nccl` engine cannot be interrupted.

Each engine runs vLLM's layerwise reload. On CPU, where weights are packed at load, that reload misses two things:

- With tied embeddings, `lm_head` computes with a packed copy that is made once from the embedding's weight and not
  updated. `repack_lm_head` makes it again.
- The weights of experts are packed only when their kernel is set up. `forget_expert_kernels` makes each reload set the
  kernel up again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from grpo.sync.transport import (
    IpcReceiver,
    broadcast,
    broadcast_group,
    finish,
    join_store,
    read_shared_memory,
    tensor_view,
)
from grpo.sync.weights import TensorSpec

BACKENDS = {
    "shared_memory": "grpo_shared_memory", "ipc": "grpo_ipc", "gloo": "grpo_broadcast", "nccl": "grpo_broadcast",
}  # fmt: skip
"""Transport -> name of its receiving engine in vLLM."""


class Reloading(WeightTransferEngine[Any, Any]):
    """Base of the engines: a sync is one layerwise reload, and resources are freed when the process ends."""

    def start_weight_update(self) -> None:
        self._kernels = forget_expert_kernels(self.model) if self.device.type == "cpu" else []
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._kernels:
            if method.moe_kernel is None:  # no weights were loaded; the sync's verification reports that better
                method.moe_kernel = kernel
        repack_lm_head(self.model)

    def shutdown(self) -> None:
        """Do nothing."""


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """The node, by which a worker selects its file of a bucket."""

    node: str


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Location and contents of one bucket."""

    files: Mapping[str, str]
    nbytes: int
    tensors: Sequence[TensorSpec]


class SharedMemoryEngine(Reloading):
    """Receiver over shared memory. vLLM's worker creates and calls it."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self._node = init_info.node

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        file = update_info.files[self._node]
        self.model.load_weights(read_shared_memory(file, update_info.nbytes, update_info.tensors))


@dataclass
class IpcInitInfo(WeightTransferInitInfo):
    """Empty: handles come with the buckets."""


@dataclass
class IpcUpdateInfo(WeightTransferUpdateInfo):
    """Handles of the buffers that hold one bucket, and its contents."""

    handles: Mapping[str, tuple[Any, ...]]
    """UUID of a GPU -> arguments of torch's `rebuild_cuda_tensor`."""
    tensors: Sequence[TensorSpec]


class IpcEngine(Reloading):
    """Receiver over CUDA IPC. vLLM's worker creates and calls it."""

    init_info_cls = IpcInitInfo
    update_info_cls = IpcUpdateInfo

    def init_transfer_engine(self, init_info: IpcInitInfo) -> None:
        self._receiver = IpcReceiver(self.device.index)
        self._gpu = str(torch.cuda.get_device_properties(self.device).uuid)

    def receive_weights(self, update_info: IpcUpdateInfo) -> None:
        self.model.load_weights(self._receiver.read(update_info.handles[self._gpu], update_info.tensors))


@dataclass
class BroadcastInitInfo(WeightTransferInitInfo):
    """The process group of learner rank 0 and all workers of all samplers."""

    host: str
    port: int
    rank_offset: int
    """Rank of this sampler's first worker."""
    world_size: int
    timeout_s: float


@dataclass
class BroadcastUpdateInfo(WeightTransferUpdateInfo):
    """Contents of the next broadcast."""

    nbytes: int
    tensors: Sequence[TensorSpec]


class BroadcastEngine(Reloading):
    """Receiver over gloo or NCCL, by device. vLLM's worker creates and calls it."""

    init_info_cls = BroadcastInitInfo
    update_info_cls = BroadcastUpdateInfo

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        store = join_store(init_info.host, init_info.port, init_info.world_size, init_info.timeout_s)
        self._group = broadcast_group(self.device, store, rank, init_info.world_size, init_info.timeout_s)
        self._timeout = init_info.timeout_s

    def receive_weights(self, update_info: BroadcastUpdateInfo) -> None:
        flat = torch.empty(update_info.nbytes, dtype=torch.uint8, device=self.device)
        finish(broadcast(self._group, flat), self._timeout)
        self.model.load_weights([(spec.name, tensor_view(flat, spec)) for spec in update_info.tensors])


def repack_lm_head(model: Any) -> None:
    """Pack the current weight of `lm_head` again."""
    lm_head = getattr(model, "lm_head", None)
    quant_method = getattr(lm_head, "quant_method", None)
    if isinstance(lm_head, torch.nn.Module) and quant_method is not None:
        quant_method.process_weights_after_loading(lm_head)


def forget_expert_kernels(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Drop the kernels of expert layers, so that the next load sets them up again and thereby packs the weights.

    Returns (quantization method, its kernel) of each.
    """
    methods: set[Any] = {getattr(layer, "quant_method", None) for layer in model.modules()}
    found = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method, _ in found:
        method.moe_kernel = None
    return found


def register() -> None:
    """Register the backends in vLLM, once per process."""
    engines = {"shared_memory": SharedMemoryEngine, "ipc": IpcEngine, "gloo": BroadcastEngine}
    for backend, engine in ((BACKENDS[transport], engine) for transport, engine in engines.items()):
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, engine)
