"""Dumps of updates that were not finite, for `grpo replay`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from grpo.learner.prepare import Prepared
from grpo.types import Batch

MAX_DUMPS = 3
"""Maximum number of dumps of a process; each dump holds the weights."""


def write_dump(
    folder: Path, minibatch: Sequence[Batch], prepared: Sequence[Prepared], *, rank: int, step: int, kl_coef: float
) -> None:
    """Write one rank's inputs of an update to `folder`, which is created."""
    tensors = {
        f"{i}/{field.name}": getattr(part, field.name)
        .contiguous()
        .cpu()
        .clone()  # a filler shares tensors, which safetensors refuses
        for i, parts in enumerate(zip(minibatch, prepared, strict=True))
        for part in parts
        for field in dataclasses.fields(part)
        if getattr(part, field.name) is not None and not (part is parts[0] and field.name == "advantages")
    }
    about = {"step": str(step), "kl_coef": repr(kl_coef), "microbatches": str(len(minibatch))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"rank-{rank}.safetensors", about)
