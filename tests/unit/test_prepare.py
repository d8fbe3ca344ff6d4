"""The trained tokens of padded microbatches, by hand."""

from __future__ import annotations

import numpy as np
import torch

from grpo.batching import TrainingRow, rank_steps
from grpo.learner.prepare import trained_tokens
from grpo.types import Batch

CPU = torch.device("cpu")


def row(index: int, prompt: list[int], completion: list[int], sampled: list[bool]) -> TrainingRow:
    return TrainingRow(
        rollout_index=index, prompt_ids=prompt, completion_ids=np.asarray(completion, dtype=np.int32),
        sampler_logprobs=-np.arange(1, len(completion) + 1, dtype=np.float32) - 10 * index,
        sampled_mask=np.asarray(sampled), prompt=0, advantage=1.0 + index, reward=0.0, has_spread=True, truncated=False,
    )  # fmt: skip


def batches() -> list[Batch]:
    rows = [row(0, [5, 6], [7, 8, 9], [True, False, True]), row(1, [4], [3, 2], [True, True])]
    steps = rank_steps(
        [rows], ranks=1, tokens_per_microbatch=100, aggregation="sequence_mean", constant_length=8,
        epochs=1, kl_coef=0.0,
    )  # fmt: skip
    return [batch for step in steps for minibatch in step.minibatches for batch in minibatch]


def test_tokens_on_the_mask_row_after_row() -> None:
    [batch] = batches()
    tokens = trained_tokens(batch, CPU)
    assert tokens.select(batch.target_ids).tolist() == [7, 9, 3, 2]  # 8 was not sampled by the policy
    assert tokens.rows.ids.tolist() == [0, 0, 1, 1]
    assert tokens.rows.count == 2
    assert tokens.sampler_logprobs.tolist() == [-1.0, -3.0, -11.0, -12.0]
    assert tokens.weights.tolist() == [0.25, 0.25, 0.25, 0.25]
    assert tokens.select(batch.advantages).tolist() == [1.0, 1.0, 2.0, 2.0]


def test_padding_is_not_read_and_has_no_gradient() -> None:
    [batch] = batches()
    padded = torch.where(batch.completion_mask, 2.0, float("nan")).requires_grad_()
    tokens = trained_tokens(batch, CPU)
    (tokens.weights * tokens.select(padded).square()).sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad, batch.completion_mask.float())  # 0.25 * 2 * 2 on the mask, 0 elsewhere


def test_a_filler_microbatch_has_no_token_but_its_loss_has_a_gradient() -> None:
    rows = [row(0, [5], [7], [True])]
    _, [[filler]] = (
        step.minibatches
        for step in rank_steps(
            [rows], ranks=2, tokens_per_microbatch=100, aggregation="token_mean", constant_length=8, epochs=1,
            kl_coef=0.0,
        )
    )  # fmt: skip
    tokens = trained_tokens(filler, CPU)
    assert tokens.rows.ids.tolist() == []
    assert tokens.rows.count == 1
    padded = torch.ones(filler.input_ids.shape, requires_grad=True)
    (tokens.weights * tokens.select(padded)).sum().backward()
    assert padded.grad is not None
    assert (padded.grad == 0).all()
