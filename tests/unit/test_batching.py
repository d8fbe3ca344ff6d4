"""The shift, the masks and the split over ranks and microbatches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.batching.steps import TrainingRow, rank_steps
from grpo.types import Batch


def row(
    index: int, prompt: list[int], completion: list[int], advantage: float = 1.0, sampled: list[bool] | None = None,
    of: int = 0, reward: float = 0.5, has_spread: bool = True, truncated: bool = False,
):  # fmt: skip
    return TrainingRow(
        rollout_index=index,
        prompt_ids=prompt,
        completion_ids=np.asarray(completion, dtype=np.int32),
        sampler_logprobs=-np.arange(1, len(completion) + 1, dtype=np.float32),
        sampled_mask=np.asarray(sampled if sampled is not None else [True] * len(completion)),
        prompt=of,
        advantage=advantage,
        reward=reward,
        has_spread=has_spread,
        truncated=truncated,
    )


def lay_out(minibatches, *, ranks=1, budget=10**6, aggregation="token_mean", epochs=1):
    return rank_steps(
        minibatches, ranks=ranks, tokens_per_microbatch=budget, aggregation=aggregation, constant_length=8,
        epochs=epochs, kl_coef=0.25,
    )  # fmt: skip


def batches_of(steps) -> list[Batch]:
    return [batch for step in steps for minibatch in step.minibatches for batch in minibatch]


def test_shift_and_mask_by_hand() -> None:
    # pad id 0, end token 0 and a 0 inside the prompt: none of them may matter
    [step] = lay_out([[row(0, [7, 8], [9, 0], advantage=2.0), row(1, [5, 0, 6], [3, 4])]])
    [[batch]] = step.minibatches
    assert batch.rollout_index.tolist() == [1, 0]  # longest first
    assert batch.input_ids.tolist() == [[5, 0, 6, 3], [7, 8, 9, 0]]
    assert batch.target_ids.tolist() == [[0, 6, 3, 4], [8, 9, 0, 0]]
    assert batch.completion_mask.tolist() == [[False, False, True, True], [False, True, True, False]]
    assert batch.advantages.tolist() == [[0, 0, 1, 1], [0, 2, 2, 0]]
    assert batch.sampler_logprobs.tolist() == [[0, 0, -1, -2], [0, -1, -2, 0]]
    assert batch.token_weights.tolist() == [[0, 0, 0.25, 0.25], [0, 0.25, 0.25, 0]]


def test_what_belongs_to_a_row_stays_with_it() -> None:
    [step] = lay_out(
        [[row(0, [7], [9], reward=3.0, truncated=True), row(1, [5, 6], [3, 4], reward=-1.0, has_spread=False)]]
    )
    [[batch]] = step.minibatches
    assert batch.rewards.tolist() == [-1.0, 3.0]
    assert batch.has_spread.tolist() == [False, True]
    assert batch.truncated.tolist() == [False, True]
    assert step.kl_coef == 0.25


def test_prompt_mean_counts_every_prompt_the_same_over_all_microbatches() -> None:
    rows = [row(0, [7], [9, 9, 9]), row(1, [7], [9]), row(2, [8], [9, 9], of=1)]
    steps = lay_out([rows], ranks=2, budget=3, aggregation="prompt_mean")
    weights = {int(b.rollout_index[0]): b.token_weights[b.completion_mask].tolist() for b in batches_of(steps)}
    assert weights == {0: [0.125] * 3, 1: [0.125], 2: [0.25] * 2, -1: []}  # and a filler on the other rank


def test_tokens_that_the_policy_did_not_sample_are_context() -> None:
    [step] = lay_out([[row(0, [1], [2, 3, 4], sampled=[True, False, True])]])
    [[batch]] = step.minibatches
    assert batch.completion_mask.tolist() == [[True, False, True]]
    assert batch.token_weights.tolist() == [[0.5, 0, 0.5]]
    assert batch.input_ids.tolist() == [[1, 2, 3]]


def test_the_sampled_end_token_is_a_target() -> None:
    [step] = lay_out([[row(0, [1, 2], [0])]])
    [[batch]] = step.minibatches
    assert batch.target_ids[batch.completion_mask].tolist() == [0]
    assert batch.token_weights[batch.completion_mask].tolist() == [1.0]


def test_epochs_are_passes_over_the_same_minibatches() -> None:
    [step] = lay_out([[row(0, [1], [2])], [row(1, [1], [3])]], epochs=3)
    assert [[int(batch.rollout_index) for batch in minibatch] for minibatch in step.minibatches] == [[0], [1]]
    assert step.epochs == 3
    assert step.multiple_updates
    [once] = lay_out([[row(0, [1], [2])]], epochs=2)
    assert once.multiple_updates


def test_one_minibatch_and_one_epoch_is_a_single_update() -> None:
    [step] = lay_out([[row(0, [1], [2])]])
    assert not step.multiple_updates


def test_an_empty_minibatch_is_left_out_on_every_rank() -> None:
    steps = lay_out([[], [row(0, [1], [2])]], ranks=2)
    assert [len(step.minibatches) for step in steps] == [1, 1]


def test_rows_without_a_trained_token_are_in_no_minibatch() -> None:
    empty = row(0, [1], [2], sampled=[False])
    [step] = lay_out([[empty], [empty, row(1, [1], [2])]])
    [[batch]] = step.minibatches
    assert batch.rollout_index.tolist() == [1]


rows = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(1, 4), st.sampled_from([1, 16, 40, 10**6]), st.sampled_from(["token_mean", "sequence_mean"]))
def test_any_split_holds_every_token_once_with_its_weight(sizes, ranks, budget, aggregation) -> None:
    made = [
        row(i, list(range(1, prompt + 1)), list(range(10, 10 + completion)), advantage=float(i))
        for i, (prompt, completion) in enumerate(sizes)
    ]
    steps = lay_out([made], ranks=ranks, budget=budget, aggregation=aggregation)
    assert len({len(step.minibatches[0]) for step in steps}) == 1  # the same number of microbatches everywhere
    seen = {}
    for batch in batches_of(steps):
        real = batch.rollout_index >= 0
        if len(batch.rollout_index) > 1:
            assert batch.input_ids.numel() <= budget
        assert (batch.token_weights[~batch.completion_mask] == 0).all()
        assert (batch.token_weights[~real] == 0).all()
        for i in torch.nonzero(real)[:, 0].tolist():
            index = int(batch.rollout_index[i])
            assert index not in seen
            mask = batch.completion_mask[i]
            seen[index] = (batch.target_ids[i][mask].tolist(), batch.token_weights[i][mask].tolist())
    tokens = sum(completion for _, completion in sizes)
    for index, (_, completion) in enumerate(sizes):
        targets, weights = seen[index]
        expected = 1 / tokens if aggregation == "token_mean" else 1 / (len(sizes) * completion)
        assert targets == list(range(10, 10 + completion))
        assert weights == pytest.approx([expected] * completion, rel=1e-6)
