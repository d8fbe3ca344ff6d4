"""One learner rank's arithmetic in a step: reference and old logprobs, microbatches, optimizer steps, metric sums.

Pure torch against the `PolicyEngine` it is given; DeepSpeed stays in `grpo.learner`. Nothing here divides: losses are
dot products with `token_weights`, metrics are sums and counts that are added over ranks and divided when logged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from grpo.logprobs import selected_logprobs
from grpo.loss import TokenLoss, grpo_token_loss
from grpo.types import Batch, RankStep


class NonFiniteError(RuntimeError):
    """A loss, logprob or gradient is NaN or infinite; nothing of this step has been published."""


class PolicyEngine(Protocol):
    """What `run_step` needs of a model and its optimizer."""

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B,T] ids -> [B,T,V] logits of the policy; under `torch.no_grad` without graph."""
        ...

    def ref_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B,T] ids -> [B,T,V] logits of the frozen reference."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, a share of the global sum; `last` ends the optimizer step's accumulation."""
        ...

    def optimizer_step(self) -> float:
        """Apply the accumulated gradient and clear it. Returns its global norm before clipping."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; a collective."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The numbers of the loss, and the sampling temperature that the learner replays."""

    temperature: float
    eps_low: float
    eps_high: float
    kl_coef: float
    importance_weight_cap: float


@dataclass(slots=True)
class Tally:
    """Metric sums of one rank."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    extremes: dict[str, float] = field(default_factory=dict)
    learner_logprob_sums: dict[int, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        pair = self.sums.setdefault(name, [0.0, 0.0])
        pair[0] += total
        pair[1] += count

    def maximum(self, name: str, value: float) -> None:
        self.extremes[name] = max(value, self.extremes.get(name, value))

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the seconds that the block takes to this rank's total; the logged value is the slowest rank's."""
        started = _clock(device)
        yield
        self.extremes[name] = self.extremes.get(name, 0.0) + _clock(device) - started


def _clock(device: torch.device) -> float:
    """Seconds, once everything that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run_step(step: RankStep, engine: PolicyEngine, objective: Objective, device: torch.device) -> tuple[Tally, int]:
    """Every optimizer step of one driver step on this rank.

    Returns:
        This rank's metric sums and the number of optimizer steps taken.

    Raises:
        NonFiniteError: on every rank, before the optimizer step that would have spread it.
    """
    tally = Tally()
    old: dict[int, torch.Tensor] = {}
    if step.multiple_updates:
        with tally.timed("time/old_logprobs_s", device):
            for batch in unique_batches(step):
                with torch.no_grad():
                    logprobs, _ = policy_logprobs(engine, batch, objective, device)
                old[id(batch)] = logprobs
                _tally_mismatch(tally, batch, logprobs.cpu(), objective)
    for minibatch in step.minibatches:
        bad = False
        for position, batch in enumerate(minibatch):
            logprobs, entropy = policy_logprobs(engine, batch, objective, device)
            if not step.multiple_updates:
                _tally_mismatch(tally, batch, logprobs.detach().cpu(), objective)
            ref_logprobs = None
            if objective.kl_coef > 0:
                with tally.timed("time/ref_logprobs_s", device):
                    ref_logprobs = reference_logprobs(engine, batch, objective, device)
            old_logprobs = old.get(id(batch), logprobs.detach())
            token_loss = _token_loss(batch, objective, device, logprobs, old_logprobs, ref_logprobs)
            weights = batch.token_weights.to(device)
            loss = (weights * token_loss.total).sum()
            bad = bad or not bool(torch.isfinite(loss))
            engine.backward(loss, last=position == len(minibatch) - 1)
            _tally_loss(tally, batch, token_loss, weights, entropy, anchored=ref_logprobs is not None)
        if engine.any_rank(bad):
            raise NonFiniteError("the loss is not finite; the weights have not been touched by this minibatch")
        norm = engine.optimizer_step()
        if norm != norm or norm == float("inf"):
            raise NonFiniteError(f"the gradient norm is {norm}; no weights of this step have been published")
        tally.add("optim/grad_norm", norm, 1)
    return tally, len(step.minibatches)


def unique_batches(step: RankStep) -> list[Batch]:
    """Each microbatch once: later epochs repeat the first one's."""
    return list({id(batch): batch for minibatch in step.minibatches for batch in minibatch}.values())


def policy_logprobs(
    engine: PolicyEngine, batch: Batch, objective: Objective, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropy [B,T] of the targets under the policy as it is now."""
    logits = engine.logits(batch.input_ids.to(device))
    return selected_logprobs(logits, batch.target_ids.to(device), temperature=objective.temperature)


@torch.no_grad()
def reference_logprobs(engine: PolicyEngine, batch: Batch, objective: Objective, device: torch.device) -> torch.Tensor:
    """Logprobs [B,T] of the targets under the frozen reference, at the sampling temperature."""
    logits = engine.ref_logits(batch.input_ids.to(device))
    return selected_logprobs(logits, batch.target_ids.to(device), temperature=objective.temperature)[0]


def _token_loss(
    batch: Batch,
    objective: Objective,
    device: torch.device,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
) -> TokenLoss:
    return grpo_token_loss(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        sampler_logprobs=batch.sampler_logprobs.to(device),
        advantages=batch.advantages.to(device),
        completion_mask=batch.completion_mask.to(device),
        ref_logprobs=ref_logprobs,
        eps_low=objective.eps_low,
        eps_high=objective.eps_high,
        kl_coef=objective.kl_coef,
        importance_weight_cap=objective.importance_weight_cap,
    )


def _tally_loss(
    tally: Tally, batch: Batch, token_loss: TokenLoss, weights: torch.Tensor, entropy: torch.Tensor, *, anchored: bool
) -> None:
    """Sums of one microbatch; of the reference only where there is one (`anchored`).

    The weighted terms are shares of a sum over the optimizer step: they have no count of their own and are divided by
    the number of updates.
    """
    mask = batch.completion_mask.to(weights.device)
    tokens = float(mask.sum())
    log_ratio = torch.log(token_loss.ratio)
    sums = torch.stack(
        [
            (weights * token_loss.policy).sum(),
            (weights * token_loss.kl_ref).sum(),
            (weights * token_loss.total.detach()).sum(),
            token_loss.kl_ref[mask].sum(),
            entropy[mask].sum(),
            token_loss.clipped_low.sum().float(),
            token_loss.clipped_high.sum().float(),
            token_loss.ratio[mask].sum(),
            (token_loss.ratio - 1 - log_ratio)[mask].sum(),
        ]
    ).tolist()
    for name, value in zip(("policy/loss", "policy/kl_ref_loss", "policy/total_loss"), sums[:3], strict=True):
        if anchored or name != "policy/kl_ref_loss":
            tally.add(name, value, 0)
    names = ("kl_ref", "entropy", "clip_fraction_low", "clip_fraction_high", "ratio_mean", "kl_old")
    for name, value in zip(names, sums[3:], strict=True):
        if anchored or name != "kl_ref":
            tally.add(f"policy/{name}", value, tokens)
    if tokens:
        tally.maximum("policy/ratio_max", float(token_loss.ratio[mask].max()))


def _tally_mismatch(tally: Tally, batch: Batch, logprobs: torch.Tensor, objective: Objective) -> None:
    """Sampler against learner, on the weights that sampled: the invariant that breaks first when anything is wrong."""
    mask = batch.completion_mask
    difference = (logprobs - batch.sampler_logprobs)[mask].double()
    tokens = float(difference.numel())
    if tokens:
        weight = difference.exp()
        tally.add("mismatch/mean", float(difference.abs().sum()), tokens)
        tally.add("mismatch/kl", float((weight - 1 - difference).sum()), tokens)
        tally.add("mismatch/importance_weight_mean", float(weight.sum()), tokens)
        tally.add("mismatch/importance_weight_square", float((weight * weight).sum()), tokens)
        if objective.importance_weight_cap > 0:
            over = float((weight > objective.importance_weight_cap).sum())
            tally.add("mismatch/importance_weight_truncated_fraction", over, tokens)
        largest = float(difference.abs().max())
        tally.maximum("mismatch/max", largest if largest == largest else float("inf"))
        tally.maximum("mismatch/importance_weight_max", float(weight.max()))
        tally.maximum("mismatch/importance_weight_min_negated", -float(weight.min()))
    row_sums = torch.where(mask, logprobs, 0.0).sum(1).tolist()
    for index, value in zip(batch.rollout_index.tolist(), row_sums, strict=True):
        if index >= 0:
            tally.learner_logprob_sums[index] = value
