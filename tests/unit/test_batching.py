"""Groups to rows: advantages and the account of tokens. Rows to microbatches: shift, masks, split over the ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_driver import group_of, make_config, make_loop

from grpo.batching import TrainingRow, account, members_needed, rank_steps, training_rows
from grpo.driver import solved, train
from grpo.types import Batch, Group, RankStep, StepResult


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


def test_survivors_get_the_advantages_of_a_group_that_never_had_the_others(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.group_size=4")
    groups = [
        group_of(r, i) for i, r in enumerate([[1.0, None, 0.0, 0.0], [None, None, None, 1.0], [1.0] * 4, [0.0] * 4])
    ]
    credit = training_rows(groups, [], config, 0)
    [[*rows]], advantages = credit.minibatches, credit.advantages
    mean, std = 1 / 3, (3 / 9) ** 0.5
    assert advantages[:3] == pytest.approx([(1 - mean) / std, -mean / std, -mean / std], rel=1e-5)
    assert [row.rollout_index for row in rows] == [0, 2, 3, *range(8, 16)]  # the second group is dropped whole
    assert advantages[3:] == (0.0,) * 8
    assert credit.uses == {"sampled": 16, "failed": 1 + 4, "truncated": 0, "no_spread": 8, "stale": 0}


def test_rows_stay_in_the_minibatch_of_their_prompt(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.minibatches_per_step=2", "algorithm.group_size=2")
    groups = [group_of([1.0, 0.0], i) for i in range(4)]
    minibatches = training_rows(groups, [], config, 0).minibatches
    assert [[row.rollout_index for row in rows] for rows in minibatches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_truncated_completions_are_compared_with_but_not_trained_on(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.group_size=4", "algorithm.mask_truncated=true")
    group = group_of([1.0, 0.0, 0.0, 0.0], 0)
    cut = dataclasses.replace(group.rollouts[3].completion, finish_reason="length")
    cut_rollout = dataclasses.replace(group.rollouts[3], completion=cut)
    group = dataclasses.replace(group, rollouts=(*group.rollouts[:3], cut_rollout))
    credit = training_rows([group], [], config, 0)
    assert [row.rollout_index for row in credit.minibatches[0]] == [0, 1, 2]
    assert credit.advantages == pytest.approx([1.5, -0.5, -0.5], rel=1e-4)  # still one of four
    assert credit.uses["truncated"] == 1


def test_the_length_penalty_shapes_rewards_and_never_makes_spread(tmp_path: Path) -> None:
    """max_tokens 6, the last 4 of which cost up to 0.5: 2 tokens cost 0, 4 cost 0.25, 6 cost 0.5."""
    config = make_config(
        tmp_path, "algorithm.group_size=3", "algorithm.length_penalty_tokens=4", "algorithm.length_penalty=0.5",
        "algorithm.advantage=group_centered",
    )  # fmt: skip

    credit = training_rows(
        [long_group([1.0, 1.0, 0.0], [2, 4, 6]), long_group([1.0, 1.0, 1.0], [2, 4, 6], 1)], [], config, 0
    )
    mean = (1.0 + 0.75 - 0.5) / 3
    assert credit.advantages[:3] == pytest.approx([1.0 - mean, 0.75 - mean, -0.5 - mean])
    assert credit.advantages[3:] == (0.0, 0.0, 0.0)
    assert credit.uses["no_spread"] == 12


def test_a_stale_row_is_left_out_and_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.group_size=2")
    credit = training_rows([group_of([1.0, 0.0], 0)], [], config, policy_version=1)
    assert credit.minibatches[0] == ()
    assert credit.uses["stale"] == 2
    dull = training_rows([group_of([1.0, 1.0], 0)], [], config, policy_version=1)
    assert dull.minibatches[0] == ()  # stale rows of a dull group are in no denominator, either
    assert dull.uses["no_spread"] == 2


def test_the_account_of_replaced_groups_takes_the_first_reason(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.group_size=3", "algorithm.mask_truncated=true", "algorithm.max_refills=1")
    group = group_of([1.0, 1.0, None], 0)
    cut = dataclasses.replace(group.rollouts[0].completion, finish_reason="length")
    group = dataclasses.replace(
        group, rollouts=(dataclasses.replace(group.rollouts[0], completion=cut), *group.rollouts[1:])
    )
    small = group_of([1.0, None, None], 1)
    credit = training_rows([], [group, small], config, 0)
    assert credit.uses == {"sampled": 6, "failed": 1 + 3, "truncated": 1, "no_spread": 1, "stale": 0}


def test_an_account_that_does_not_add_up_stops_the_run() -> None:
    uses = {"sampled": 10, "failed": 1, "truncated": 0, "no_spread": 2, "stale": 0}
    assert account(uses, {"gradient/contributing": 7.0})["gradient/contributing"] == 7
    with pytest.raises(RuntimeError, match="does not add up"):
        account(uses, {"gradient/contributing": 6.0})


def long_group(rewards: list[float | None], lengths: list[int], index: int = 0) -> Group:
    """`group_of` with completions of these lengths."""
    group = group_of(rewards, index)
    rollouts = []
    for rollout, tokens in zip(group.rollouts, lengths, strict=True):
        completion = dataclasses.replace(
            rollout.completion, token_ids=np.zeros(tokens, dtype=np.int32), sampled_mask=np.ones(tokens, dtype=bool),
            sampler_logprobs=np.zeros(tokens, dtype=np.float32), policy_versions=np.zeros(tokens, dtype=np.int32),
        )  # fmt: skip
        rollouts.append(dataclasses.replace(rollout, completion=completion))
    return dataclasses.replace(group, rollouts=tuple(rollouts))


@pytest.mark.parametrize(
    ("options", "rewards", "lengths", "expected"),
    [
        (["advantage=group_normalized", "std_eps=1.0"], [1.0, 0.0], [1, 1], [0.5 / (0.5**0.5 + 1)] * 2),
        (["advantage=batch_normalized", "std_eps=1.0"], [1.0, 0.0], [1, 1], [0.5 / (0.5**0.5 + 1)] * 2),
        (["advantage=optimal_baseline"], [1.0, 0.0], [3, 1], [0.25, 0.75]),  # baseline 3 / 4
        (["advantage=leave_one_out"], [1.0, 0.0], [3, 1], [1.0, 1.0]),
        (["advantage=reinforce_pp_baseline", "kl_coef=0.1", "kl_place=reward", "kl_estimator=k1"], [1.0, 0.0], [3, 1],
         [0.5, 0.5]),
    ],
)  # fmt: skip
def test_options_reach_the_advantages(
    tmp_path: Path, options: list[str], rewards: list[float | None], lengths: list[int], expected: list[float]
) -> None:
    """`expected`: of the better row, and minus that of the worse."""
    config = make_config(tmp_path, "algorithm.group_size=2", *[f"algorithm.{option}" for option in options])
    credit = training_rows([long_group(rewards, lengths)], [], config, 0)
    assert credit.advantages == pytest.approx([expected[0], -expected[1]], rel=1e-6)


def test_pass_at_k_takes_its_own_k_and_needs_as_many_members(tmp_path: Path) -> None:
    """Of rewards 1, 0, 0, 0 the 1 is in 3 of the 4 subsets of three, and in 3 of the 6 of two, and better by 1 in each:
    its advantage is 4 (members) times 3 / 4 and 3 / 6.
    """
    at_three, at_two = (
        make_config(tmp_path, "algorithm.group_size=4", "algorithm.advantage=pass_at_k", f"algorithm.pass_k={k}")
        for k in (3, 2)
    )
    whole, small = group_of([1.0, 0.0, 0.0, 0.0], 0), group_of([1.0, 0.0, None, None], 0)
    assert training_rows([whole], [], at_three, 0).advantages == pytest.approx([3.0, 0.0, 0.0, 0.0])
    assert training_rows([whole], [], at_two, 0).advantages == pytest.approx([2.0, 0.0, 0.0, 0.0])
    assert training_rows([small], [], at_three, 0).minibatches == ((),)
    assert training_rows([small], [], at_three, 0).uses["failed"] == 4
    assert training_rows([small], [], at_two, 0).uses["failed"] == 2


@pytest.mark.parametrize(
    ("advantage", "needed"),
    [("group_normalized", 2), ("reinforce_pp_baseline", 2), ("reinforce_pp", 1), ("gae", 1)],
)
def test_members_that_a_method_needs(tmp_path: Path, advantage: str, needed: int) -> None:
    config = make_config(tmp_path).algorithm
    assert members_needed(dataclasses.replace(config, advantage=advantage)) == needed  # type: ignore[arg-type]


def test_token_level_methods_are_given_rewards(tmp_path: Path) -> None:
    plain = make_config(tmp_path, "algorithm.group_size=2", "algorithm.advantage=reinforce_pp")
    [rows] = training_rows([group_of([1.0, 0.25], 0)], [], plain, 0).minibatches
    assert [row.reward for row in rows] == [1.0, 0.25]
    centered = make_config(tmp_path, "algorithm.group_size=2", "algorithm.advantage=reinforce_pp_baseline")
    [rows] = training_rows([group_of([1.0, 0.25], 0)], [], centered, 0).minibatches
    assert [row.reward for row in rows] == [0.375, -0.375]


def test_a_dull_group_contributes_where_its_zero_is_not_final(tmp_path: Path) -> None:
    dull = [group_of([1.0, 1.0], 0)]
    final = make_config(tmp_path, "algorithm.group_size=2")
    moved = make_config(
        tmp_path, "algorithm.group_size=2", "algorithm.kl_coef=0.1", "algorithm.kl_place=reward",
        "algorithm.kl_estimator=k1",
    )  # fmt: skip
    in_loss = make_config(tmp_path, "algorithm.group_size=2", "algorithm.kl_coef=0.1")
    whitened = make_config(tmp_path, "algorithm.group_size=2", "algorithm.advantage=reinforce_pp")
    for config, no_spread in ((final, 2), (moved, 0), (in_loss, 2), (whitened, 0)):
        credit = training_rows(dull, [], config, 0)
        assert credit.uses["no_spread"] == no_spread
        assert [row.has_spread for row in credit.minibatches[0]] == [no_spread == 0] * 2


def test_a_token_is_used_once_an_epoch(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.group_size=2", "algorithm.epochs_per_step=3")
    credit = training_rows([group_of([1.0, None], 0), group_of([1.0, 1.0], 1)], [], config, 0)
    assert credit.uses == {"sampled": 12, "failed": 6, "truncated": 0, "no_spread": 6, "stale": 0}


@pytest.mark.parametrize(("options", "length"), [([], 6), (["algorithm.constant_length=10"], 10)])
def test_the_constant_length_is_max_tokens_unless_given(tmp_path: Path, options: list[str], length: int) -> None:
    config = make_config(tmp_path, "run.steps=1", "algorithm.aggregation=constant_length", *options)
    loop, policy = make_loop(tmp_path, config)
    seen: list[RankStep] = []
    step = policy.step

    def kept(steps: list[RankStep]) -> StepResult:
        seen.extend(steps)
        return step(steps)

    policy.step = kept  # type: ignore[method-assign, assignment]
    train(loop)
    loop.folder.close()
    [minibatch] = seen[0].minibatches
    weights = {float(w) for batch in minibatch for w in batch.token_weights[batch.completion_mask]}
    assert list(weights) == [pytest.approx(1 / (32 * length))]


def test_a_prompt_is_solved_when_its_worst_completion_is(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.retire_reward=0.5", "algorithm.group_size=2")
    loop, _ = make_loop(tmp_path, config)
    rewards: list[list[float | None]] = [[1.0, 0.5], [1.0, 0.25], [0.0, 0.0], [1.0, None]]
    groups = [dataclasses.replace(group_of(r, 0), prompt=loop.prompts[i]) for i, r in enumerate(rewards)]
    assert solved(loop, groups) == {0}
    loop.folder.close()
