"""The learner's end of vLLM's NCCL weight transfer, for samplers that do not share the learner's GPU.

Speaks the unpacked form, one broadcast per tensor in the announced order, over vLLM's own communicator, since both
ends must be of the same kind. Lives here because it needs vllm; the learner's actor makes it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_common import trainer_init

from grpo.transport import Place, vllm_fields
from grpo.weight_sync import Bucket, describe


class NcclSender:
    """Rank 0 of a group of 1 + all workers of all samplers."""

    def __init__(self, host: str, workers: int, samplers: int) -> None:
        """`workers`: GPUs of one sampler."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
        self._host, self._port, self._workers = host, port, workers
        self._world_size = 1 + workers * samplers
        self._group: Any = None

    def init_info(self, sampler: int, place: Place) -> dict[str, Any]:
        """What sampler number `sampler` needs to join."""
        return {
            "master_address": self._host,
            "master_port": self._port,
            "rank_offset": 1 + sampler * self._workers,
            "world_size": self._world_size,
        }

    def connect(self) -> None:
        """Join as rank 0; returns when every sampler has joined."""
        self._group = trainer_init(
            {"master_address": self._host, "master_port": self._port, "world_size": self._world_size}
        )

    def pack(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Announce the tensors; the bytes follow in `transmit`."""
        return describe(bucket, vllm_fields(bucket))

    def transmit(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Broadcast the tensors while the samplers receive them."""
        for _, tensor in bucket:
            self._group.broadcast(tensor.detach().contiguous(), src=0, stream=torch.cuda.current_stream())
        torch.cuda.current_stream().synchronize()
