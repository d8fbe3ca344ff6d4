"""The optimizer steps of one driver step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo.config import AlgorithmConfig, CriticConfig
from grpo.learner.prepare import Prepared, TrainedTokens, critic_ids, prepare, trained_tokens
from grpo.learner.protocol import Model, StepEngine
from grpo.learner.tally import Tally
from grpo.learner.token_columns import TokenColumns
from grpo.metrics.measures import mismatch_counts
from grpo.objective.kl import anchor_kl, estimate, k3
from grpo.objective.losses import (
    PolicyTerm,
    Rows,
    bounded_weight,
    clipped_value_loss,
    importance_weight,
    kept_sequences,
    policy_term,
)
from grpo.types import Batch, RankStep


def run_step(
    step: RankStep,
    engine: StepEngine,
    algorithm: AlgorithmConfig,
    critic: CriticConfig,
    device: torch.device,
    token_columns: TokenColumns | None = None,
) -> Tally:
    """Run the optimizer steps of one driver step on this rank; return this rank's metric sums.

    `token_columns`: gets the values per token of the updates that were not skipped.

    An update whose loss or gradient is not finite on any rank is skipped on all ranks and passed to `engine.set_aside`.
    A skipped update of the policy counts in `optim/skipped_updates`, and its tokens in `gradient/zero_advantage` or
    `gradient/stopped`. A skipped update of the critic counts in `value/skipped_updates`. No other sum over the updates
    includes a skipped one.
    """
    tally = Tally(token_columns=token_columns)
    prepared = prepare(step, engine, algorithm, critic, device, tally)
    uses = list(zip(step.minibatches, prepared, strict=True)) * step.epochs
    updates = left_out = skipped = values_skipped = 0
    measured: set[int] = set()  # minibatches whose mismatch is in the tally: once per step, not once per epoch
    for number, (minibatch, ready) in enumerate(uses):
        limit = algorithm.max_kl_old
        if updates and limit is not None and measured_kl_old(minibatch, ready, engine, device) > limit:
            left_out = len(uses) - number
            break
        position = number % len(step.minibatches)
        trained, valued = _update(
            minibatch, ready, step, engine, algorithm, critic, device, tally, measure=position not in measured
        )
        if trained:
            measured.add(position)
        updates, skipped, values_skipped = updates + trained, skipped + (not trained), values_skipped + (not valued)
    for minibatch, ready in uses[len(uses) - left_out :]:
        _tally_unused(tally, minibatch, ready)
    tally.maxima["policy/updates"] = float(updates)
    tally.maxima["policy/stopped_minibatches"] = float(left_out)
    tally.skipped_updates = skipped + values_skipped
    tally.maxima["optim/skipped_updates"] = float(skipped)
    if algorithm.advantage == "gae":
        tally.maxima["value/skipped_updates"] = float(values_skipped)
    return tally


def _update(
    minibatch: Sequence[Batch],
    prepared: Sequence[Prepared],
    step: RankStep,
    engine: StepEngine,
    algorithm: AlgorithmConfig,
    critic: CriticConfig,
    device: torch.device,
    tally: Tally,
    *,
    measure: bool,
) -> tuple[bool, bool]:
    """Run one optimizer step of the policy and, if there is one, the critic. Return whether the policy was updated, and
    whether no update of the critic was skipped.

    `measure`: add the mismatch between sampler and learner to the tally.
    """
    policy, value = Tally(token_columns=TokenColumns() if tally.token_columns is not None else None), Tally()
    pairs = list(zip(minibatch, prepared, strict=True))
    not_finite = 0
    for position, (batch, ready) in enumerate(pairs, 1):
        last = position == len(pairs)
        not_finite = _policy_microbatch(
            batch, ready, step, engine, algorithm, device, policy, last=last, not_finite=not_finite, measure=measure
        )
    not_finite = 0
    for position, (batch, ready) in enumerate(pairs if algorithm.advantage == "gae" else (), 1):
        last = position == len(pairs)
        not_finite = _critic_microbatch(batch, ready, engine, critic, device, value, last=last, not_finite=not_finite)
    norm = engine.optimizer_step("policy")
    policy.add("optim/grad_norm", norm, 1)
    trained, valued = math.isfinite(norm), True
    if algorithm.advantage == "gae":
        norm = engine.optimizer_step("critic")
        value.add("value/grad_norm", norm, 1)
        valued = math.isfinite(norm)
    if trained:
        tally.absorb(policy)
    else:
        _tally_unused(tally, minibatch, prepared)
    if valued:
        tally.absorb(value)
    if not (trained and valued):
        engine.set_aside(minibatch, prepared, step.kl_coef)
    return trained, valued


def _backward(model: Model, loss: torch.Tensor, engine: StepEngine, *, last: bool, not_finite: int) -> int:
    """Accumulate the gradient of `loss`. Return `not_finite`, plus 1 if the loss is not finite.

    If any loss of the update is not finite on any rank, the last microbatch's loss is NaN on every rank. This makes
    every rank's gradient NaN, so that the optimizer steps on no rank.

    Args:
        not_finite: number of earlier losses of the update that were not finite on this rank.
    """
    not_finite += not bool(torch.isfinite(loss))
    if last and engine.all_sum([not_finite])[0]:
        loss = loss * math.nan
    engine.backward(model, loss, last=last)
    return not_finite


@torch.no_grad()
def measured_kl_old(
    minibatch: Sequence[Batch], prepared: Sequence[Prepared], engine: StepEngine, device: torch.device
) -> float:
    """Return the KL (k3) from the policy at the step's start to the current one, per token of `minibatch` on all ranks.

    A collective. It runs a separate forward pass, so that a minibatch that will not be used accumulates no gradient.
    """
    total = count = 0.0
    for batch, ready in zip(minibatch, prepared, strict=True):
        logprobs, _ = engine.logprobs(batch)
        assert ready.old_logprobs is not None
        total += float(k3(ready.old_logprobs, trained_tokens(batch, device).select(logprobs)).double().sum())
        count += float(ready.old_logprobs.numel())
    total, count = engine.all_sum([total, count])
    return total / count if count else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Parts of a microbatch's loss, [N] each unless noted."""

    total: torch.Tensor
    """With gradient."""
    policy: PolicyTerm
    weight: torch.Tensor
    """Factor of the policy term: the bounded importance weight, 0 in rejected rows."""
    raw_weight: torch.Tensor
    """The importance weight before the bounds."""
    rejected: torch.Tensor
    """[B] bool"""
    kl_ref: torch.Tensor | None
    log_ratio: torch.Tensor


def objective_terms(
    *,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    sampler_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    rows: Rows,
    kl_coef: float,
    algorithm: AlgorithmConfig,
) -> Terms:
    """Return policy * weight + kl_coef * kl_ref - entropy_coef * entropy per token, and its parts."""
    a = algorithm
    policy = policy_term(
        a.loss, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, rows=rows,
        eps_low=a.eps_low, eps_high=a.eps_high, dual_clip=a.dual_clip, tau_positive=a.sapo_tau_positive,
        tau_negative=a.sapo_tau_negative,
    )  # fmt: skip
    raw = importance_weight(old_logprobs, sampler_logprobs, rows, level=a.importance_level)
    weight = raw
    if a.importance_level != "none":
        weight = bounded_weight(raw, mode=a.importance_mode, low=a.importance_low, high=a.importance_high)
    rejected = torch.zeros(rows.count, dtype=torch.bool, device=rows.ids.device)
    if a.rejection_low is not None or a.rejection_high is not None:
        low, high = a.rejection_low or 0.0, a.rejection_high or math.inf
        rejected = ~kept_sequences(old_logprobs, sampler_logprobs, rows, low=low, high=high)
        weight = torch.where(rejected[rows.ids], 0.0, weight)
    total = policy.loss * weight
    kl_ref = None
    if ref_logprobs is not None and a.kl_place == "loss":
        kl_ref = estimate(logprobs.detach(), ref_logprobs, estimator=a.kl_estimator)
        total = total + kl_coef * anchor_kl(
            logprobs, old_logprobs, ref_logprobs, estimator=a.kl_estimator, gradient=a.kl_gradient, clamp=a.kl_clamp
        )
    if a.entropy_coef:
        total = total - a.entropy_coef * entropy
    return Terms(
        total=total, policy=policy, weight=weight, raw_weight=raw, rejected=rejected, kl_ref=kl_ref,
        log_ratio=(logprobs - old_logprobs).detach(),
    )  # fmt: skip


def _policy_microbatch(
    batch: Batch,
    prepared: Prepared,
    step: RankStep,
    engine: StepEngine,
    algorithm: AlgorithmConfig,
    device: torch.device,
    tally: Tally,
    *,
    last: bool,
    not_finite: int,
    measure: bool,
) -> int:
    """Run forward and backward of the policy on one microbatch, and tally it; return what `_backward` returns."""
    tokens = trained_tokens(batch, device)
    logprobs, entropy = (tokens.select(padded) for padded in engine.logprobs(batch))
    old = logprobs.detach() if prepared.old_logprobs is None else prepared.old_logprobs
    terms = objective_terms(
        logprobs=logprobs, entropy=entropy, old_logprobs=old, ref_logprobs=prepared.ref_logprobs,
        sampler_logprobs=tokens.sampler_logprobs, advantages=prepared.advantages, rows=tokens.rows,
        kl_coef=step.kl_coef, algorithm=algorithm,
    )  # fmt: skip
    not_finite = _backward("policy", (tokens.weights * terms.total).sum(), engine, last=last, not_finite=not_finite)
    with torch.no_grad():
        if measure:
            _tally_mismatch(tally, batch, tokens, old, terms, algorithm)
            if tally.token_columns is not None:
                tally.token_columns.add(
                    batch.rollout_index, tokens.rows, learner_logprobs=old, advantages=prepared.advantages,
                    entropies=entropy, importance_weights=terms.weight,
                )  # fmt: skip
        _tally_objective(tally, terms, tokens.weights, entropy.detach(), algorithm)
        _tally_uses(tally, _accounted(batch, tokens), prepared.advantages, terms, algorithm)
    return not_finite


def _critic_microbatch(
    batch: Batch,
    prepared: Prepared,
    engine: StepEngine,
    critic: CriticConfig,
    device: torch.device,
    tally: Tally,
    *,
    last: bool,
    not_finite: int,
) -> int:
    """Run forward and backward of the critic on one microbatch, and tally it; return what `_backward` returns."""
    assert prepared.old_values is not None
    assert prepared.returns is not None
    tokens = trained_tokens(batch, device)
    values = tokens.select(engine.values(critic_ids(batch).to(device)).float()[:, :-1])
    token_loss, clipped = clipped_value_loss(values, prepared.old_values, prepared.returns, eps=critic.clip)
    loss = (tokens.weights * token_loss).sum()
    not_finite = _backward("critic", critic.coef * loss, engine, last=last, not_finite=not_finite)
    with torch.no_grad():
        count = float(values.numel())
        error = (prepared.returns - values).double()
        returns = prepared.returns.double()
        tally.add("value/loss", float(loss), 0)
        tally.add("value/clip_fraction", float(clipped.sum()), count)
        tally.add("value/mean", float(values.sum()), count)
        tally.add("value/return_mean", float(returns.sum()), count)
        tally.add("value/return_square", float(returns.square().sum()), count)
        tally.add("value/error", float(error.sum()), count)
        tally.add("value/error_square", float(error.square().sum()), count)
    return not_finite


def _accounted(batch: Batch, tokens: TrainedTokens) -> torch.Tensor:
    """Return [N] bool, true for the tokens whose uses are counted here.

    The driver counts the tokens of groups without spread.
    """
    return batch.has_spread.to(tokens.rows.ids.device)[tokens.rows.ids]


def _tally_unused(tally: Tally, minibatch: Sequence[Batch], prepared: Sequence[Prepared]) -> None:
    """Count the uses of tokens in an update that did not happen."""
    for batch, ready in zip(minibatch, prepared, strict=True):
        uses = _accounted(batch, trained_tokens(batch, ready.advantages.device))
        without = ready.advantages == 0
        tally.add("gradient/zero_advantage", float((uses & without).sum()), 0)
        tally.add("gradient/stopped", float((uses & ~without).sum()), 0)


def _tally_objective(
    tally: Tally,
    terms: Terms,
    weights: torch.Tensor,
    entropy: torch.Tensor,
    algorithm: AlgorithmConfig,
) -> None:
    """Add the objective's sums of one microbatch. The weighted terms are shares of a sum over the optimizer step."""
    tokens = float(weights.numel())
    ratio = terms.log_ratio.exp()
    shares = {
        "policy/loss": (weights * terms.policy.loss.detach() * terms.weight).sum(),
        "policy/total_loss": (weights * terms.total.detach()).sum(),
        "policy/entropy_loss": -algorithm.entropy_coef * (weights * entropy).sum(),
    }
    means = {
        "policy/entropy": entropy.sum(),
        "policy/clip_fraction_low": terms.policy.clipped_low.sum(),
        "policy/clip_fraction_high": terms.policy.clipped_high.sum(),
        "policy/ratio_mean": ratio.sum(),
        "policy/kl_old": (ratio - 1 - terms.log_ratio).sum(),
    }
    if terms.kl_ref is not None:
        shares["policy/kl_ref_loss"] = (weights * terms.kl_ref).sum()
        tally.kl_ref.add(float(terms.kl_ref.sum()), tokens)
    if not algorithm.entropy_coef:
        del shares["policy/entropy_loss"]
    numbers = torch.stack([value.double() for value in (*shares.values(), *means.values())]).tolist()
    for name, number in zip((*shares, *means), numbers, strict=True):
        tally.add(name, number, 0 if name in shares else tokens)
    if tokens:
        tally.maximum("policy/ratio_max", float(ratio.max()))


def _tally_uses(
    tally: Tally, left: torch.Tensor, advantages: torch.Tensor, terms: Terms, algorithm: AlgorithmConfig
) -> None:
    """Count each use of a token in `left` under the first reason that applies."""
    clipped = terms.policy.clipped_low | terms.policy.clipped_high
    if algorithm.loss == "cispo":  # it bounds the weight of a clipped token and keeps its gradient
        clipped = torch.zeros_like(clipped)
    reasons = {
        "gradient/zero_advantage": advantages == 0,
        "gradient/mismatch_masked": terms.weight == 0,
        "gradient/clipped": clipped,
    }
    for name, applies in reasons.items():
        tally.add(name, float((left & applies).sum()), 0)
        left = left & ~applies
    tally.add("gradient/contributing", float(left.sum()), 0)


def _tally_mismatch(
    tally: Tally,
    batch: Batch,
    tokens: TrainedTokens,
    old_logprobs: torch.Tensor,
    terms: Terms,
    algorithm: AlgorithmConfig,
) -> None:
    """Add the mismatch between sampler and learner logprobs, on the weights that sampled.

    This is the invariant that breaks first if anything is wrong.
    """
    difference = (old_logprobs - tokens.sampler_logprobs).double().cpu()
    count = float(difference.numel())
    if count:
        token_weight = difference.exp()
        tally.add("mismatch/mean", float(difference.abs().sum()), count)
        tally.mismatch_square.add(float(difference.square().sum()), count)
        tally.add("mismatch/equal_fraction", float((difference == 0).sum()), count)
        tally.mismatch_counts += mismatch_counts(difference.abs().numpy())
        tally.add("mismatch/kl", float((token_weight - 1 - difference).sum()), count)
        largest = float(difference.abs().max())
        tally.maximum("mismatch/max", largest if largest == largest else float("inf"))
        raw, weight = terms.raw_weight.double().cpu(), terms.weight.cpu()
        if algorithm.importance_level == "none":
            raw = token_weight
        tally.add("mismatch/importance_weight_mean", float(raw.sum()), count)
        tally.add("mismatch/importance_weight_square", float(raw.square().sum()), count)
        tally.maximum("mismatch/importance_weight_max", float(raw.max()))
        tally.minimum("mismatch/importance_weight_min", float(raw.min()))
        if algorithm.importance_level != "none":
            bounded = (raw < algorithm.importance_low) | (raw > algorithm.importance_high)
            tally.add("mismatch/importance_weight_bounded_fraction", float(bounded.sum()), count)
        tally.add("mismatch/masked_fraction", float((weight == 0).sum()), count)
        rows = tokens.rows.ids[tokens.rows.last_tokens()]
        tally.add("mismatch/rejected_sequence_fraction", float(terms.rejected[rows].sum()), float(rows.numel()))
    row_sums = tokens.rows.sum(old_logprobs).tolist()
    for index, value in zip(batch.rollout_index.tolist(), row_sums, strict=True):
        if index >= 0:
            tally.learner_logprob_sums[index] = value
