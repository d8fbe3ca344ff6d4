"""The parts of a loss, per token: the policy's term, the weight of its sample, the critic's term, the token weights.

Tensors are [N], the trained tokens of a microbatch; `Rows` is the row of each. Two groups of functions share a rule:

- `policy_term` and the functions that it calls: `log_ratio` is logprobs - old_logprobs, with gradient through logprobs.
  With one update per batch, old_logprobs are logprobs.detach(). Then every ratio is exactly 1, nothing is clipped, and
  each objective has the gradient of REINFORCE (GMPO with the row's mean advantage).
- `importance_weight`, `bounded_weight` and `kept_sequences` correct for samples from a policy that differs slightly
  from the learner's: numerics, quantization, staleness. They take old_logprobs (the learner's at the step's start) and
  sampler_logprobs (as vLLM reported them), and return detached tensors that multiply the policy term and nothing else.
  They never renormalise: a token that is masked stays in every denominator. fengyao.notion.site/off-policy-rl; masked
  form arXiv 2510.18855 sec. 3 (IcePop).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from grpo.objective.compatibility import Aggregation, PolicyLoss

Level = Literal["none", "token", "sequence"]
Mode = Literal["truncate", "mask"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The row of each of N tokens. A tensor with one value per token is [N]; one with one value per row is [B].

    The tokens of a row are adjacent and in order. The rows may follow each other in any order, and a row may have no
    token. Where the rows were stored is not known here: padded rows, and rows packed end to end, give the same numbers.
    `per_row[rows.ids]` repeats a value per row at each token of the row.
    """

    ids: torch.Tensor
    """[N] int64; index of each token's row."""
    count: int
    """B"""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the tokens of each row, [N] -> [B]; 0 for a row without tokens.

        It is computed in float64, because the error of a running sum in float32 grows with the length of the row.
        """
        sums = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.ids, values.double()).to(values.dtype)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the tokens of each row, [N] -> [B]; 0 for a row without tokens."""
        return self.sum(values) / self.sum(torch.ones_like(values)).clamp(min=1)

    def last_tokens(self) -> torch.Tensor:
        """Return [N] bool, true at the last token of each row."""
        last = torch.ones_like(self.ids, dtype=torch.bool)
        last[:-1] = self.ids[:-1] != self.ids[1:]
        return last


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerm:
    """A policy term, [N] each."""

    loss: torch.Tensor
    """With gradient."""
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    """bool: the ratio left its range on the low or the high side, and the clip acted. Under CISPO such a token has a
    bounded weight and keeps its gradient; under every other objective it has no gradient."""


def ppo_clip(
    log_ratio: torch.Tensor, advantages: torch.Tensor, *, eps_low: float, eps_high: float, dual_clip: float | None
) -> PolicyTerm:
    """Return -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A); PPO arXiv 1707.06347, two ranges as in DAPO 2503.14476.

    Args:
        dual_clip: with a negative advantage the loss is at most -dual_clip * A. This stops the gradient of a token
            whose ratio is large; arXiv 1912.09729 eq. 5. None: off.
    """
    ratio = torch.where(advantages == 0, 0.0, log_ratio).exp()  # an overflowed ratio times 0 would be NaN
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    stopped = clipped < unclipped
    if dual_clip is not None:
        floor = dual_clip * advantages
        bounded = (advantages < 0) & (objective < floor)
        objective = torch.where(bounded, floor, objective)
        stopped = stopped | bounded
    return PolicyTerm(loss=-objective, clipped_low=stopped & (ratio < 1), clipped_high=stopped & (ratio > 1))


def gspo(
    log_ratio: torch.Tensor, advantages: torch.Tensor, rows: Rows, *, eps_low: float, eps_high: float
) -> PolicyTerm:
    """Return PPO's clip on the sequence ratio, the geometric mean of the token ratios; GSPO, arXiv 2507.18071 eq. 5.

    This is the token form (eq. 14): each token has the sequence's ratio, with gradient through its own logprob.
    Advantages may therefore differ between tokens.
    """
    mean = rows.mean(log_ratio.detach())[rows.ids]
    return ppo_clip(
        mean + log_ratio - log_ratio.detach(), advantages, eps_low=eps_low, eps_high=eps_high, dual_clip=None
    )


def cispo(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, *, eps_low: float, eps_high: float
) -> PolicyTerm:
    """Return -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi; CISPO, arXiv 2506.13585 eq. 4.

    The clip bounds the weight and does not stop the gradient.
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - eps_low, 1 + eps_high)
    acted = advantages != 0
    return PolicyTerm(
        loss=-weight * advantages * logprobs,
        clipped_low=acted & (ratio < 1 - eps_low),
        clipped_high=acted & (ratio > 1 + eps_high),
    )


def sapo(log_ratio: torch.Tensor, advantages: torch.Tensor, *, tau_positive: float, tau_negative: float) -> PolicyTerm:
    """Return -(4 / tau) sigmoid(tau (r - 1)) A, with tau by the sign of the advantage; SAPO, arXiv 2511.20347 eq. 5.

    The gate is soft and has slope 1 at r = 1. Nothing is clipped.
    """
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_positive), advantages.new_tensor(tau_negative))
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau
    nothing = torch.zeros_like(advantages, dtype=torch.bool)
    return PolicyTerm(loss=-gate * advantages, clipped_low=nothing, clipped_high=nothing)


def gmpo(
    log_ratio: torch.Tensor, advantages: torch.Tensor, rows: Rows, *, eps_low: float, eps_high: float
) -> PolicyTerm:
    """Return -(geometric mean of the clipped token ratios) * A; GMPO, arXiv 2507.20673 eq. 4.

    Each token's log ratio is clipped to [-eps_low, eps_high] on the side that its advantage would push it to, and then
    averaged. A is the row's mean advantage. The loss is the same at every token of the row.
    """
    sign = torch.sign(advantages)
    bounded = log_ratio.clamp(-eps_low, eps_high)
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * bounded)
    objective = rows.mean(pessimistic).exp() * rows.mean(advantages)
    stopped = sign * bounded < sign * log_ratio
    return PolicyTerm(
        loss=-objective[rows.ids], clipped_low=stopped & (log_ratio < 0), clipped_high=stopped & (log_ratio > 0)
    )


def reinforce(logprobs: torch.Tensor, advantages: torch.Tensor) -> PolicyTerm:
    """Return -A log pi. There is no ratio, so it is correct only for tokens that the current policy sampled."""
    nothing = torch.zeros_like(advantages, dtype=torch.bool)
    return PolicyTerm(loss=-advantages * logprobs, clipped_low=nothing, clipped_high=nothing)


def policy_term(
    loss: PolicyLoss,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    rows: Rows,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
    tau_positive: float,
    tau_negative: float,
) -> PolicyTerm:
    """Return the term of the named objective. All tensors are [N]; `logprobs` has gradient."""
    log_ratio = logprobs - old_logprobs.detach()
    match loss:
        case "ppo_clip":
            return ppo_clip(log_ratio, advantages, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
        case "gspo":
            return gspo(log_ratio, advantages, rows, eps_low=eps_low, eps_high=eps_high)
        case "cispo":
            return cispo(logprobs, log_ratio, advantages, eps_low=eps_low, eps_high=eps_high)
        case "sapo":
            return sapo(log_ratio, advantages, tau_positive=tau_positive, tau_negative=tau_negative)
        case "gmpo":
            return gmpo(log_ratio, advantages, rows, eps_low=eps_low, eps_high=eps_high)
        case "reinforce":
            return reinforce(logprobs, advantages)


def importance_weight(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, rows: Rows, *, level: Level
) -> torch.Tensor:
    """Return exp(old - sampler) of each token, [N], or the product over the row at each of its tokens.

    Args:
        level: "token" ignores the weight of the prefix, so it is biased, and has low variance. "sequence" is exact, and
            its variance grows with length. "none": all ones.
    """
    if level == "none":
        return torch.ones_like(old_logprobs)
    difference = old_logprobs.detach() - sampler_logprobs
    if level == "sequence":
        difference = rows.sum(difference)[rows.ids]
    return difference.exp()


def bounded_weight(weight: torch.Tensor, *, mode: Mode, low: float, high: float) -> torch.Tensor:
    """Return the weight bounded by `mode`: "truncate" clamps to [low, high]; "mask" sets weights outside to 0."""
    if mode == "truncate":
        return weight.clamp(low, high)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def kept_sequences(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, rows: Rows, *, low: float, high: float
) -> torch.Tensor:
    """Return [B] bool: true if the geometric mean of a row's token weights lies within [low, high].

    The mean makes the bounds independent of length; arXiv 2510.18855 and verl's rollout correction use it.
    """
    mean = rows.mean(old_logprobs.detach() - sampler_logprobs).exp()
    return (mean >= low) & (mean <= high)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max((v - R)^2, (clip(v, v_old - eps, v_old + eps) - R)^2) / 2, as in PPO's code (arXiv 2005.12729 sec. 3).

    Args:
        values: [N] with gradient; the other tensors have none.
        eps: None: no clipping.

    Returns:
        loss [N]; clipped [N] bool, true where the clipped square is the greater one and stops the gradient.
    """
    plain = (values - returns).square()
    if eps is None:
        return plain / 2, torch.zeros_like(values, dtype=torch.bool)
    # clamp the value, not its difference from the old value: a value within the bounds must stay equal bit for bit
    bounded = (torch.clamp(values, old_values - eps, old_values + eps) - returns).square()
    return torch.maximum(plain, bounded) / 2, bounded > plain


def aggregation_weights(
    lengths: Sequence[int], prompts: Sequence[int], *, aggregation: Aggregation, constant_length: int
) -> list[float]:
    """Return the weight of the tokens of each row. The loss is the dot product of token weights and token losses.

    token_mean       1 / (tokens of the step)                      DAPO, arXiv 2503.14476 eq. 8
    sequence_mean    1 / (rows * tokens of the row)                GRPO, arXiv 2402.03300 eq. 3
    sequence_sum     1 / rows                                      mean over rows of the sum over tokens
    constant_length  1 / (rows * constant_length)                  Dr.GRPO, arXiv 2503.20783 eq. 4
    prompt_mean      1 / (prompts * tokens of the row's prompt)    every prompt counts the same

    The weights of token_mean, sequence_mean and prompt_mean add up to 1 over the step. Rows, tokens and prompts are
    counted over the given rows, which are only those that are trained on.

    Args:
        lengths: [R] trained tokens of each row of the optimizer step, over all ranks and microbatches; at least 1.
        prompts: [R] index of each row's prompt.
        constant_length: used by the aggregation of that name only.
    """
    rows = len(lengths)
    match aggregation:
        case "token_mean":
            return [1.0 / sum(lengths)] * rows
        case "sequence_mean":
            return [1.0 / (rows * length) for length in lengths]
        case "sequence_sum":
            return [1.0 / rows] * rows
        case "constant_length":
            return [1.0 / (rows * constant_length)] * rows
        case "prompt_mean":
            tokens: dict[int, int] = {}
            for prompt, length in zip(prompts, lengths, strict=True):
                tokens[prompt] = tokens.get(prompt, 0) + length
            return [1.0 / (len(tokens) * tokens[prompt]) for prompt in prompts]
