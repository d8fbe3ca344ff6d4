"""Scored groups -> training rows with their advantages -> the microbatches of each learner rank in a step.

The account of sampled tokens counts *uses*: a token that is trained on in two epochs counts twice. Each use is in the
first column that applies, so the columns add up:

    sampled = failed + truncated + no_spread + stale                                        (counted here)
              + zero_advantage + stopped + mismatch_masked + clipped + contributing         (counted by the learner)

Scored members of a group that is too small count as failed.

This is the only module that shifts the token axis. A row of L prompt and C completion tokens becomes T = L + C - 1
positions: `input_ids = tokens[:-1]`, `target_ids = tokens[1:]`, and every other [B,T] tensor is aligned to the target.
The completion's first target is at position L - 1. Masks are built from lengths, never from a pad id.

Example: prompt [7, 8], completion [9, 0], a microbatch of T = 4:
    input_ids        7 8 9 0      target_ids  8 9 0 0      completion_mask  0 1 1 0

The rows of one optimizer step are dealt to the ranks, longest first, and packed into microbatches under the token
budget. Microbatches of weight zero are added until every rank has the same number: ZeRO 3 hangs otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grpo.config import AlgorithmConfig, Config
from grpo.objective import advantages as family
from grpo.objective.compatibility import GROUP_RELATIVE, NEEDS_GROUPS, Aggregation
from grpo.objective.losses import aggregation_weights
from grpo.objective.spread import has_spread
from grpo.types import Batch, Group, RankStep, Rollout, Scored

LEARNER_COLUMNS = ("zero_advantage", "stopped", "mismatch_masked", "clipped", "contributing")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRow:
    """One rollout that is trained on."""

    rollout_index: int
    """Position in the step's list of rollouts."""
    prompt_ids: Sequence[int]
    """[L]"""
    completion_ids: np.ndarray
    """[C] int32, C >= 1."""
    sampler_logprobs: np.ndarray
    """[C] float32"""
    sampled_mask: np.ndarray
    """[C] bool; tokens that the policy did not sample are context, not targets."""
    prompt: int
    """Position of the row's prompt in the step."""
    advantage: float
    reward: float
    """Input of token-level advantages."""
    has_spread: bool
    truncated: bool

    @property
    def positions(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids) - 1

    @property
    def trained_tokens(self) -> int:
        return int(self.sampled_mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The training rows of a step, and the driver's part of the account."""

    minibatches: tuple[tuple[TrainingRow, ...], ...]
    advantages: tuple[float, ...]
    """The rows' advantages, in order; for token-level methods, the rewards from which they are computed."""
    uses: Mapping[str, int]
    """The account's columns up to `stale`, and `sampled`."""


def training_rows(groups: Sequence[Group], unused: Sequence[Group], config: Config, policy_version: int) -> Credit:
    """Return the rows of each minibatch, with advantages over the scored members of each group.

    Failed rollouts are in no row and no statistic. A group with fewer scored members than the method needs is dropped.
    Rollouts of a group without spread stay, even if their advantage is 0: they count in the denominator. Truncated
    completions that `mask_truncated` excludes count in their group's statistics but are not trained on.

    Args:
        groups: groups of the step's prompts, in order.
        unused: groups that were sampled and replaced; used for the account only.
        policy_version: version of the learner; a rollout with an older token is left out as stale.
    """
    a = config.algorithm
    least = members_needed(a)
    usable = [(p, group) for p, group in enumerate(groups) if len(group.rewards) >= least]
    shaped = [[shaped_reward(r, config) for r in scored(group)] for _, group in usable]
    spread = [has_spread(group.rewards) for _, group in usable]
    lengths = [[tokens_of(r) for r in scored(group)] for _, group in usable]
    values = row_values(shaped, spread, lengths, a)
    # if the KL in the reward or the whitening can change an advantage of 0, a row without spread counts like any other
    judged = a.advantage in GROUP_RELATIVE and not (a.kl_coef > 0 and a.kl_place == "reward")
    uses = dict.fromkeys(("sampled", "failed", "truncated", "no_spread", "stale"), 0)
    minibatches: list[list[TrainingRow]] = [[] for _ in range(a.minibatches_per_step)]
    for (p, group), group_values, group_shaped, differ in zip(usable, values, shaped, spread, strict=True):
        members = [(i, r) for i, r in enumerate(group.rollouts) if isinstance(r.outcome, Scored)]
        for (i, rollout), value, reward in zip(members, group_values, group_shaped, strict=True):
            reason = left_out(rollout, policy_version, differ or not judged, a)
            if reason is not None:
                uses[reason] += tokens_of(rollout)
            if reason != "truncated" and not is_stale(rollout, policy_version):
                returned = value if a.advantage == "reinforce_pp_baseline" else reward
                row = training_row(rollout, p, p * a.group_size + i, value, returned, differ or not judged)
                minibatches[p * a.minibatches_per_step // a.prompts_per_step].append(row)
    for group in (*groups, *unused):
        lost = group.rollouts if len(group.rewards) < least else group.failed
        uses["sampled"] += sum(tokens_of(r) for r in group.rollouts)
        uses["failed"] += sum(tokens_of(r) for r in lost)
    for rollout in (r for group in unused if len(group.rewards) >= least for r in scored(group)):
        reason = left_out(rollout, policy_version, False, a)
        assert reason is not None
        uses[reason] += tokens_of(rollout)
    return Credit(
        minibatches=tuple(tuple(rows) for rows in minibatches),
        advantages=tuple(row.advantage for rows in minibatches for row in rows),
        uses={name: count * a.epochs_per_step for name, count in uses.items()},
    )


def advantages_of(credit: Credit, config: Config) -> dict[int, float]:
    """Return position in the step -> advantage of each trained completion; empty for token-level advantages."""
    if config.algorithm.advantage not in GROUP_RELATIVE:
        return {}
    return {row.rollout_index: row.advantage for rows in credit.minibatches for row in rows}


def training_row(
    rollout: Rollout, prompt: int, index: int, advantage: float, reward: float, has_spread: bool
) -> TrainingRow:
    """Return the row of a rollout.

    Args:
        prompt: position of its group in the step.
        index: position of the rollout among all rollouts of the step.
    """
    return TrainingRow(
        rollout_index=index,
        prompt=prompt,
        prompt_ids=rollout.prompt.token_ids,
        completion_ids=rollout.completion.token_ids,
        sampler_logprobs=rollout.completion.sampler_logprobs,
        sampled_mask=rollout.completion.sampled_mask,
        advantage=advantage,
        reward=reward,
        has_spread=has_spread,
        truncated=rollout.completion.finish_reason == "length",
    )


def members_needed(a: AlgorithmConfig) -> int:
    """Return the number of scored members that a group needs to be trained on."""
    if a.advantage == "pass_at_k":
        return a.pass_k
    return 2 if a.advantage in NEEDS_GROUPS else 1


def row_values(
    shaped: Sequence[Sequence[float]], spread: Sequence[bool], lengths: Sequence[Sequence[int]], a: AlgorithmConfig
) -> list[list[float]]:
    """Return the value of each row of each group: its advantage, or the reward for token-level advantages.

    Args:
        shaped: [P][n_p] rewards, length penalty included.
        spread: [P] true if the raw rewards differ. If they are equal, the length penalty alone gives no advantage.
        lengths: [P][n_p] trained tokens.
    """
    match a.advantage:
        case "group_normalized":
            values = family.group_normalized(shaped, std_eps=a.std_eps)
        case "group_centered" | "reinforce_pp_baseline":
            values = family.group_centered(shaped)
        case "leave_one_out":
            values = family.leave_one_out(shaped)
        case "batch_normalized":
            values = family.batch_normalized(shaped, std_eps=a.std_eps)
        case "optimal_baseline":
            values = family.optimal_baseline(shaped, lengths)
        case "pass_at_k":
            values = family.pass_at_k(shaped, k=a.pass_k)
        case "reinforce_pp" | "gae":
            return [list(group) for group in shaped]
    return [group if has_spread else [0.0] * len(group) for group, has_spread in zip(values, spread, strict=True)]


def shaped_reward(rollout: Rollout, config: Config) -> float:
    """Return the reward with the soft length penalty (DAPO, arXiv 2503.14476 eq. 13).

    The penalty grows linearly from 0, at `length_penalty_tokens` before `max_tokens`, to `length_penalty` at
    `max_tokens`.
    """
    assert isinstance(rollout.outcome, Scored)
    buffer = config.algorithm.length_penalty_tokens
    if not buffer:
        return rollout.outcome.value
    over = len(rollout.completion.token_ids) - (config.sampling.max_tokens - buffer)
    return rollout.outcome.value - config.algorithm.length_penalty * max(0.0, min(1.0, over / buffer))


def left_out(rollout: Rollout, policy_version: int, has_spread: bool, a: AlgorithmConfig) -> str | None:
    """Return the column that counts a scored rollout's tokens here, or None if the learner counts them."""
    if a.mask_truncated and rollout.completion.finish_reason == "length":
        return "truncated"
    if not has_spread:
        return "no_spread"
    return "stale" if is_stale(rollout, policy_version) else None


def is_stale(rollout: Rollout, policy_version: int) -> bool:
    """Return whether any token was sampled by a policy older than the learner's."""
    return int(rollout.completion.policy_versions.min()) < policy_version


def tokens_of(rollout: Rollout) -> int:
    """Return the number of sampled tokens of a rollout."""
    return int(rollout.completion.sampled_mask.sum())


def scored(group: Group) -> list[Rollout]:
    return [r for r in group.rollouts if isinstance(r.outcome, Scored)]


def account(uses: Mapping[str, int], learner: Mapping[str, float]) -> dict[str, float]:
    """Return the whole account as `gradient/<column>`.

    Raises RuntimeError if the columns do not add up: tokens were lost between the sampler and the loss.
    """
    table = {f"gradient/{name}": float(count) for name, count in uses.items()}
    table |= {f"gradient/{name}": learner.get(f"gradient/{name}", 0.0) for name in LEARNER_COLUMNS}
    total = sum(value for name, value in table.items() if name != "gradient/sampled")
    if total != table["gradient/sampled"]:
        raise RuntimeError(f"the account of sampled tokens does not add up: {table}")
    return table


def rank_steps(
    minibatches: Sequence[Sequence[TrainingRow]],
    *,
    ranks: int,
    tokens_per_microbatch: int,
    aggregation: Aggregation,
    constant_length: int,
    epochs: int,
    kl_coef: float,
) -> list[RankStep]:
    """Return the `RankStep` of every rank.

    Args:
        minibatches: rows of each optimizer step of one epoch; rows without a trained token are left out.
        tokens_per_microbatch: bound on B*T; a longer row gets a separate microbatch.
        epochs: number of passes over the minibatches.

    Returns:
        [ranks] RankSteps with the same numbers of minibatches and microbatches.
    """
    per_rank: list[list[tuple[Batch, ...]]] = [[] for _ in range(ranks)]
    for given in minibatches:
        rows = [row for row in given if row.trained_tokens > 0]
        if rows:
            for rank, batches in enumerate(
                _minibatch(rows, ranks, tokens_per_microbatch, aggregation, constant_length)
            ):
                per_rank[rank].append(batches)
    return [RankStep(minibatches=tuple(batches), epochs=epochs, kl_coef=kl_coef) for batches in per_rank]


def _minibatch(
    rows: Sequence[TrainingRow], ranks: int, budget: int, aggregation: Aggregation, constant_length: int
) -> list[tuple[Batch, ...]]:
    """Return one optimizer step's microbatches, [ranks][microbatches], the same number for every rank."""
    weights = aggregation_weights(
        [row.trained_tokens for row in rows],
        [row.prompt for row in rows],
        aggregation=aggregation,
        constant_length=constant_length,
    )
    weighted = sorted(zip(rows, weights, strict=True), key=lambda pair: (-pair[0].positions, pair[0].rollout_index))
    packed = [_pack(weighted[rank::ranks], budget) for rank in range(ranks)]
    count = max(len(microbatches) for microbatches in packed)
    return [tuple(microbatches + [_filler()] * (count - len(microbatches))) for microbatches in packed]


def _pack(rows: Sequence[tuple[TrainingRow, float]], budget: int) -> list[Batch]:
    """Pack rows, which come longest first, into microbatches. The order keeps padding small."""
    microbatches: list[list[tuple[TrainingRow, float]]] = []
    for pair in rows:
        if not microbatches or (len(microbatches[-1]) + 1) * microbatches[-1][0][0].positions > budget:
            microbatches.append([])
        microbatches[-1].append(pair)
    return [_batch(microbatch) for microbatch in microbatches]


def _batch(rows: Sequence[tuple[TrainingRow, float]]) -> Batch:
    """Return the rows of one microbatch, shifted, padded and masked."""
    shape = (len(rows), max(row.positions for row, _ in rows))
    prompt = np.asarray([len(row.prompt_ids) for row, _ in rows])
    length = np.asarray([len(row.completion_ids) for row, _ in rows])
    position = np.arange(shape[1] + 1)
    real = position < (prompt + length)[:, None]  # [B,T+1] true at tokens, false at padding
    tokens = np.zeros(real.shape, dtype=np.int64)
    tokens[real] = np.concatenate([part for row, _ in rows for part in (row.prompt_ids, row.completion_ids)])
    input_ids = np.where(real[:, 1:], tokens[:, :-1], 0)
    target_ids = tokens[:, 1:]
    place = real[:, 1:] & (position[1:] >= prompt[:, None])  # [B,T] true where the target belongs to the completion
    mask = np.zeros(shape, dtype=np.bool_)
    mask[place] = np.concatenate([row.sampled_mask for row, _ in rows])
    sampler_logprobs = np.zeros(shape, dtype=np.float32)
    sampler_logprobs[place] = np.concatenate([row.sampler_logprobs for row, _ in rows])
    sampler_logprobs[~mask] = 0.0
    advantages = mask * np.asarray([row.advantage for row, _ in rows], dtype=np.float32)[:, None]
    token_weights = mask * np.asarray([weight for _, weight in rows], dtype=np.float32)[:, None]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        target_ids=torch.from_numpy(np.ascontiguousarray(target_ids)),
        completion_mask=torch.from_numpy(mask),
        advantages=torch.from_numpy(advantages),
        rewards=torch.tensor([row.reward for row, _ in rows], dtype=torch.float32),
        has_spread=torch.tensor([row.has_spread for row, _ in rows]),
        truncated=torch.tensor([row.truncated for row, _ in rows]),
        sampler_logprobs=torch.from_numpy(sampler_logprobs),
        token_weights=torch.from_numpy(token_weights),
        rollout_index=torch.tensor([row.rollout_index for row, _ in rows]),
    )


def _filler() -> Batch:
    """Return a microbatch of one position of weight zero: it runs through every layer and adds 0 to every gradient."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    zeros = torch.zeros(1, 1)
    return Batch(
        input_ids=ids,
        target_ids=ids,
        completion_mask=torch.zeros(1, 1, dtype=torch.bool),
        advantages=zeros,
        rewards=torch.zeros(1),
        has_spread=torch.zeros(1, dtype=torch.bool),
        truncated=torch.zeros(1, dtype=torch.bool),
        sampler_logprobs=zeros,
        token_weights=zeros,
        rollout_index=torch.tensor([-1]),
    )
