"""The trained tokens of a microbatch on one axis, and what is computed for them before a step's first update: old and
reference logprobs, values, advantages.

Only this module derives a token's row from the layout of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo.config import AlgorithmConfig, CriticConfig
from grpo.learner.protocol import StepEngine
from grpo.learner.tally import Tally
from grpo.objective.advantages import at_last_token, generalized_advantages, rewards_to_go, whiten
from grpo.objective.compatibility import WHITENED
from grpo.objective.kl import estimate
from grpo.objective.losses import Rows
from grpo.types import Batch, RankStep

WHITEN_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTokens:
    """The N tokens of a microbatch's completion mask, row after row and in order, on the learner's device."""

    positions: torch.Tensor
    """[N] int64; index of each token in a flattened [B,T] tensor."""
    rows: Rows
    """Its ids index the [B] tensors of the batch."""
    weights: torch.Tensor
    """[N] float32; the batch's token weights."""
    sampler_logprobs: torch.Tensor
    """[N] float32"""

    def select(self, padded: torch.Tensor) -> torch.Tensor:
        """Return the elements of a [B,T] tensor at these tokens, [N]. All others get no gradient."""
        return padded.flatten().index_select(0, self.positions)


def trained_tokens(batch: Batch, device: torch.device) -> TrainedTokens:
    """Return the trained tokens of `batch`. A filler microbatch has none."""
    mask = batch.completion_mask
    return TrainedTokens(
        positions=mask.flatten().nonzero()[:, 0].to(device),
        rows=Rows(mask.nonzero()[:, 0].to(device), len(mask)),
        weights=batch.token_weights[mask].to(device),
        sampler_logprobs=batch.sampler_logprobs[mask].to(device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Tensors for training on one microbatch, without gradient: [N] each, its trained tokens."""

    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    """None: the step has one update, whose own logprobs are the old ones."""
    ref_logprobs: torch.Tensor | None
    """None: there is no reference."""
    old_values: torch.Tensor | None
    returns: torch.Tensor | None
    """`old_values` and `returns` are None if there is no critic."""


@torch.no_grad()
def prepare(
    step: RankStep,
    engine: StepEngine,
    algorithm: AlgorithmConfig,
    critic: CriticConfig,
    device: torch.device,
    tally: Tally,
) -> list[list[Prepared]]:
    """Return the `Prepared` tensors of each microbatch, [minibatches][microbatches] as in `step`. A collective."""
    batches = [batch for minibatch in step.minibatches for batch in minibatch]
    tokens = [trained_tokens(batch, device) for batch in batches]
    in_reward = algorithm.kl_coef > 0 and algorithm.kl_place == "reward"
    old: list[torch.Tensor | None] = [None] * len(batches)
    ref: list[torch.Tensor | None] = [None] * len(batches)
    if step.multiple_updates or in_reward:
        with tally.timed("time/old_logprobs_s", device):
            old = [t.select(engine.logprobs(b)[0]) for b, t in zip(batches, tokens, strict=True)]
    if algorithm.kl_coef > 0:
        with tally.timed("time/ref_logprobs_s", device):
            ref = [t.select(engine.ref_logprobs(b)) for b, t in zip(batches, tokens, strict=True)]
    penalties = [
        kl_penalty(old_logprobs, ref_logprobs, step.kl_coef, algorithm, tally) if in_reward else None
        for old_logprobs, ref_logprobs in zip(old, ref, strict=True)
    ]
    values = returns = [None] * len(batches)
    if algorithm.advantage == "gae":
        with tally.timed("time/values_s", device):
            triples = [
                critic_advantages(batch, t, penalty, engine, algorithm, critic, device)
                for batch, t, penalty in zip(batches, tokens, penalties, strict=True)
            ]
        advantages, values, returns = (list(column) for column in zip(*triples, strict=True)) if triples else ([],) * 3
    else:
        advantages = [
            token_advantages(batch, t, penalty, algorithm, device)
            for batch, t, penalty in zip(batches, tokens, penalties, strict=True)
        ]
    if algorithm.advantage in WHITENED:
        advantages = whiten(advantages, eps=WHITEN_EPS, all_sum=engine.all_sum)
    in_order = (
        Prepared(
            advantages=advantages[i],
            # with one update the ratio must be exactly 1: use the update's own logprobs, not those of a second pass
            old_logprobs=old[i] if step.multiple_updates else None,
            ref_logprobs=ref[i],
            old_values=values[i],
            returns=returns[i],
        )
        for i in range(len(batches))
    )
    return [[next(in_order) for _ in minibatch] for minibatch in step.minibatches]


def kl_penalty(
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    kl_coef: float,
    algorithm: AlgorithmConfig,
    tally: Tally,
) -> torch.Tensor:
    """Return the KL reward of each token, [N]: -kl_coef times the KL estimate of the policy at the step's start."""
    assert old_logprobs is not None
    assert ref_logprobs is not None
    kl = estimate(old_logprobs, ref_logprobs, estimator=algorithm.kl_estimator)
    tally.kl_ref.add(float(kl.sum()), float(kl.numel()))
    return -kl_coef * kl


def token_advantages(
    batch: Batch,
    tokens: TrainedTokens,
    penalty: torch.Tensor | None,
    algorithm: AlgorithmConfig,
    device: torch.device,
) -> torch.Tensor:
    """Return the advantages of a method without a critic, [N].

    They are the row's advantage or its discounted reward, plus the sum of the KL penalty from each token on. Summing
    the penalty gives the gradient of the sequence's KL.
    """
    rows = tokens.rows
    gamma = algorithm.gamma if algorithm.advantage == "reinforce_pp" else 1.0
    if algorithm.advantage == "reinforce_pp":
        advantages = rewards_to_go(at_last_token(batch.rewards.to(device), rows), rows, gamma=gamma)
    elif algorithm.advantage == "reinforce_pp_baseline":
        advantages = batch.rewards.to(device)[rows.ids]
    else:
        advantages = tokens.select(batch.advantages.to(device))
    return advantages if penalty is None else advantages + rewards_to_go(penalty, rows, gamma=gamma)


def critic_advantages(
    batch: Batch,
    tokens: TrainedTokens,
    penalty: torch.Tensor | None,
    engine: StepEngine,
    algorithm: AlgorithmConfig,
    critic: CriticConfig,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the advantages before whitening, the old values and the returns, [N] each."""
    rows = tokens.rows
    every = engine.values(critic_ids(batch).to(device)).float()
    values = tokens.select(every[:, :-1])
    token_rewards = at_last_token(batch.rewards.to(device), rows)
    if penalty is not None:
        token_rewards = token_rewards + penalty
    final = torch.zeros(rows.count, device=device)
    if critic.truncated == "bootstrap":
        last = rows.last_tokens()
        ended = rows.ids[last]
        final[ended] = torch.where(batch.truncated.to(device)[ended], tokens.select(every[:, 1:])[last], 0.0)
    advantages, returns = generalized_advantages(
        token_rewards, values, rows, gamma=algorithm.gamma, lam=algorithm.gae_lambda, final_values=final
    )
    return advantages, values, returns


def critic_ids(batch: Batch) -> torch.Tensor:
    """Return the unshifted token ids of the rows, [B,T+1].

    Value t belongs to the state in which target t is sampled, value t+1 to the state after it.
    """
    return torch.cat([batch.input_ids[:, :1], batch.target_ids], dim=1)
