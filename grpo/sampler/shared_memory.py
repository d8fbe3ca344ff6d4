"""vLLM's weight-transfer engine over shared memory, for its CPU build, which ships none.

The CPU build packs linear weights at load, so they can only be replaced through vLLM's layerwise reload, which its
weight-transfer interface runs. One thing the reload misses: with tied embeddings the packed copy that `lm_head`
computes with is made from the embedding's weight once and stays as it was. `repack_lm_head` makes it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from grpo.weight_sync import TensorSpec, read_shared_memory

BACKEND = "grpo_shared_memory"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: where it is and what is in it."""

    file: str
    nbytes: int
    tensors: Sequence[TensorSpec]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Receiving side; vLLM's worker makes it and calls it."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Shared memory needs no rendezvous."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        self.model.load_weights(read_shared_memory(update_info.file, update_info.nbytes, update_info.tensors))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_lm_head(self.model)

    def shutdown(self) -> None:
        """Every mapping was closed when it had been read."""


def repack_lm_head(model: Any) -> None:
    """Re-derive what `lm_head` computes with from the weight it holds now."""
    lm_head = getattr(model, "lm_head", None)
    quant_method = getattr(lm_head, "quant_method", None)
    if isinstance(lm_head, torch.nn.Module) and quant_method is not None:
        quant_method.process_weights_after_loading(lm_head)


def register() -> None:
    """Make the backend known to vLLM; once per process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
