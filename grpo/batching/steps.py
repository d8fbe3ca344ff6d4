"""Training rows -> the microbatches of each learner rank in a step. The only module that shifts the token axis.

A row of L prompt and C completion tokens becomes T = L + C - 1 positions: `input_ids = tokens[:-1]`,
`target_ids = tokens[1:]`, and every other [B,T] tensor is aligned to the target. The completion's first target is at
position L - 1. Masks are built from lengths, never from a pad id.

Example: prompt [7, 8], completion [9, 0], a microbatch of T = 4:
    input_ids        7 8 9 0      target_ids  8 9 0 0      completion_mask  0 1 1 0

The rows of one optimizer step are dealt to the ranks, longest first, and packed into microbatches under the token
budget. Microbatches of weight zero are added until every rank has the same number: ZeRO 3 hangs otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grpo.objective.aggregation import aggregation_weights
from grpo.objective.compatibility import Aggregation
from grpo.types import Batch, RankStep


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
