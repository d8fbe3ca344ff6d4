"""The parameters of DeepSpeed engines, gathered from their shards at ZeRO 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from grpo.sync.weights import buckets_of


def weights_of(engine: Any, zero_stage: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every parameter of an engine, gathered at ZeRO 3. A collective."""
    parameters = list(engine.module.named_parameters())
    if zero_stage < 3:
        yield from ((name, p.detach()) for name, p in parameters)
        return
    # ds_tensor is this rank's shard only: buckets are made by the full shape
    logical = ((name, torch.empty(p.ds_shape, dtype=p.dtype, device="meta")) for name, p in parameters)
    by_name = dict(parameters)
    for bucket in buckets_of(logical):
        gathered = [by_name[name] for name, _ in bucket]
        with deepspeed.zero.GatheredParameters(gathered):
            yield from ((name, by_name[name].detach()) for name, _ in bucket)


def drop_gathered(parameters: Sequence[Any], zero_stage: int) -> None:
    """Make ZeRO 3 gather changed shards again: it keeps small parameters gathered between forwards."""
    if zero_stage == 3:
        for p in parameters:
            if p.ds_status == ZeroParamStatus.AVAILABLE:
                p.partition()


def whole_numel(parameter: Any) -> int:
    """Return the number of elements of a parameter, also if ZeRO 3 keeps only a shard of it on this rank."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
