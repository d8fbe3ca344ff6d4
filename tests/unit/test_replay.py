"""Reading the dumps of updates that were not finite."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_batching import lay_out, row

from grpo.learner.prepare import Prepared
from grpo.learner.replay import read, write_dump
from grpo.types import Batch, UserError


def write(file: Path, advantages: torch.Tensor) -> None:
    tensors = {f"0/{field.name}": torch.zeros(2, 3) for field in dataclasses.fields(Batch)}
    tensors["0/advantages"] = advantages
    save_file(tensors, file, {"microbatches": "1", "kl_coef": "0.5"})


def test_what_was_prepared_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "rank-0.safetensors", torch.tensor([1.0, 2.0]))
    [(_, prepared, kl_coef)] = read(tmp_path / "rank-0.safetensors")
    assert prepared.advantages.tolist() == [1.0, 2.0]
    assert [getattr(prepared, f.name) for f in dataclasses.fields(Prepared) if f.name != "advantages"] == [None] * 4
    assert kl_coef == 0.5


def test_a_dump_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Its tensors were padded."""
    write(tmp_path / "rank-0.safetensors", torch.zeros(2, 3))
    with pytest.raises(UserError, match="earlier version of grpo; replay it with that version"):
        read(tmp_path / "rank-0.safetensors")


def test_the_dump_of_a_rank_without_a_row_comes_back(tmp_path: Path) -> None:
    """Its microbatch is a filler, whose fields share tensors; an update that is not finite must not end there."""
    steps = lay_out([[row(0, [1, 2], [3, 4])]], ranks=2)
    for rank, tokens in ((0, 2), (1, 0)):
        [[batch]] = steps[rank].minibatches
        advantages = torch.arange(tokens, dtype=torch.float32)
        prepared = Prepared(advantages=advantages, old_logprobs=None, ref_logprobs=None, old_values=None, returns=None)
        write_dump(tmp_path, [batch], [prepared], rank=rank, step=3, kl_coef=0.5)
        [(read_batch, read_prepared, _)] = read(tmp_path / f"rank-{rank}.safetensors")
        assert torch.equal(read_prepared.advantages, advantages)
        assert torch.equal(read_batch.target_ids, batch.target_ids)
        assert int(read_batch.completion_mask.sum()) == tokens
