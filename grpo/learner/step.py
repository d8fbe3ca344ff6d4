"""The optimizer steps of one driver step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo.config import AlgorithmConfig, CriticConfig
from grpo.learner.prepare import Prepared, critic_ids, prepare
from grpo.learner.protocol import StepEngine
from grpo.learner.tally import Tally
from grpo.learner.tokens import TrainedTokens, trained_tokens
from grpo.metrics.measures import mismatch_counts
from grpo.objective.kl import anchor_kl, estimate, k3
from grpo.objective.mismatch import bounded_weight, importance_weight, kept_sequences
from grpo.objective.policy import PolicyTerm, policy_term
from grpo.objective.rows import Rows
from grpo.objective.values import clipped_value_loss
from grpo.types import Batch, RankStep


def run_step(
    step: RankStep, engine: StepEngine, algorithm: AlgorithmConfig, critic: CriticConfig, device: torch.device
) -> Tally:
    """Run the optimizer steps of one driver step on this rank; return this rank's metric sums.

    An update whose loss or gradient is not finite on any rank is skipped on all ranks and passed to `engine.set_aside`.
    A skipped update of the policy counts in `optim/skipped_updates`, and its tokens in `gradient/zero_advantage` or
    `gradient/stopped`. A skipped update of the critic counts in `value/skipped_updates`. No other sum over the updates
    includes a skipped one.
    """
    tally = Tally()
    prepared = prepare(step, engine, algorithm, critic, device, tally)
    updates = left_out = skipped = values_skipped = 0
    for minibatch in step.minibatches:
        limit = algorithm.max_kl_old
        if updates and limit is not None and measured_kl_old(minibatch, prepared, engine, device) > limit:
            left_out = len(step.minibatches) - updates - skipped
            break
        trained, valued = _update(minibatch, prepared, step, engine, algorithm, critic, device, tally)
        updates, skipped, values_skipped = updates + trained, skipped + (not trained), values_skipped + (not valued)
    for batch in (batch for minibatch in step.minibatches[updates + skipped :] for batch in minibatch):
        _tally_unused(tally, batch, prepared[id(batch)].advantages)
    tally.extremes["policy/updates"] = float(updates)
    tally.extremes["policy/stopped_minibatches"] = float(left_out)
    tally.extremes["optim/skipped_updates"] = float(skipped)
    if algorithm.advantage == "gae":
        tally.extremes["value/skipped_updates"] = float(values_skipped)
    return tally


def _update(
    minibatch: Sequence[Batch],
    prepared: dict[int, Prepared],
    step: RankStep,
    engine: StepEngine,
    algorithm: AlgorithmConfig,
    critic: CriticConfig,
    device: torch.device,
    tally: Tally,
) -> tuple[bool, bool]:
    """Run one optimizer step of the policy and, if there is one, the critic. Return whether the policy was updated, and
    whether no update of the critic was skipped."""
    policy, value = Tally(measured=tally.learner_logprob_sums), Tally()
    for position, batch in enumerate(minibatch):
        last = position == len(minibatch) - 1
        _policy_microbatch(batch, prepared[id(batch)], last, step, engine, algorithm, device, policy)
    for position, batch in enumerate(minibatch if algorithm.advantage == "gae" else ()):
        last = position == len(minibatch) - 1
        _critic_microbatch(batch, prepared[id(batch)], last, engine, critic, device, value)
    policy.add("optim/grad_norm", engine.optimizer_step("policy"), 1)
    trained = math.isfinite(policy.sums["optim/grad_norm"][0])
    valued = True
    if algorithm.advantage == "gae":
        value.add("value/grad_norm", engine.optimizer_step("critic"), 1)
        valued = math.isfinite(value.sums["value/grad_norm"][0])
    if trained:
        tally.absorb(policy)
    else:
        for batch in minibatch:
            _tally_unused(tally, batch, prepared[id(batch)].advantages)
    if valued:
        tally.absorb(value)
    if not (trained and valued):
        engine.set_aside(minibatch, [prepared[id(batch)] for batch in minibatch], step.kl_coef)
    return trained, valued


def _checked(loss: torch.Tensor, last: bool, engine: StepEngine, tally: Tally) -> torch.Tensor:
    """Return `loss`, or NaN for the last microbatch of an update if any loss of the update on any rank was not finite.

    The NaN makes every rank's gradient NaN, so that the optimizer steps on no rank.
    """
    if not bool(torch.isfinite(loss)):
        tally.add("not_finite", 1, 0)
    if last and engine.all_sum([tally.sums.pop("not_finite", [0.0])[0]])[0]:
        return loss * math.nan
    return loss


@torch.no_grad()
def measured_kl_old(
    minibatch: Sequence[Batch], prepared: dict[int, Prepared], engine: StepEngine, device: torch.device
) -> float:
    """Return the KL (k3) from the policy at the step's start to the current one, per token of `minibatch` on all ranks.

    A collective. It runs a separate forward pass, so that a minibatch that will not be used accumulates no gradient.
    """
    total = count = 0.0
    for batch in minibatch:
        logprobs, _ = engine.logprobs(batch)
        old = prepared[id(batch)].old_logprobs
        assert old is not None
        total += float(k3(old, trained_tokens(batch, device).select(logprobs)).double().sum())
        count += float(old.numel())
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
    last: bool,
    step: RankStep,
    engine: StepEngine,
    algorithm: AlgorithmConfig,
    device: torch.device,
    tally: Tally,
) -> None:
    tokens = trained_tokens(batch, device)
    logprobs, entropy = (tokens.select(padded) for padded in engine.logprobs(batch))
    old = logprobs.detach() if prepared.old_logprobs is None else prepared.old_logprobs
    terms = objective_terms(
        logprobs=logprobs, entropy=entropy, old_logprobs=old, ref_logprobs=prepared.ref_logprobs,
        sampler_logprobs=tokens.sampler_logprobs, advantages=prepared.advantages, rows=tokens.rows,
        kl_coef=step.kl_coef, algorithm=algorithm,
    )  # fmt: skip
    loss = (tokens.weights * terms.total).sum()
    engine.backward("policy", _checked(loss, last, engine, tally), last=last)
    with torch.no_grad():
        if int(batch.rollout_index[0]) not in tally.measured:  # once per step, not once per epoch
            _tally_mismatch(tally, batch, tokens, old, terms, algorithm)
        _tally_objective(tally, terms, tokens.weights, entropy.detach(), algorithm)
        _tally_uses(tally, _accounted(batch, tokens), prepared.advantages, terms, algorithm)


def _critic_microbatch(
    batch: Batch,
    prepared: Prepared,
    last: bool,
    engine: StepEngine,
    critic: CriticConfig,
    device: torch.device,
    tally: Tally,
) -> None:
    assert prepared.old_values is not None
    assert prepared.returns is not None
    tokens = trained_tokens(batch, device)
    values = tokens.select(engine.values(critic_ids(batch).to(device)).float()[:, :-1])
    token_loss, clipped = clipped_value_loss(values, prepared.old_values, prepared.returns, eps=critic.clip)
    loss = (tokens.weights * token_loss).sum()
    engine.backward("critic", _checked(critic.coef * loss, last, engine, tally), last=last)
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


def _accounted(batch: Batch, tokens: TrainedTokens) -> torch.Tensor:
    """Return [N] bool, true for the tokens whose uses are counted here.

    The driver counts the tokens of groups without spread.
    """
    return batch.has_spread.to(tokens.rows.ids.device)[tokens.rows.ids]


def _tally_unused(tally: Tally, batch: Batch, advantages: torch.Tensor) -> None:
    """Count the uses of tokens in an update that did not happen."""
    uses, without = _accounted(batch, trained_tokens(batch, advantages.device)), advantages == 0
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
        means["policy/kl_ref"] = terms.kl_ref.sum()
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
        tally.add("mismatch/square", float(difference.square().sum()), count)
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
        tally.maximum("mismatch/importance_weight_min_negated", -float(raw.min()))
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
