"""Scored groups -> training rows with their advantages, and an account of every sampled token.

The account counts *uses*: a token that is trained on in two epochs counts twice. Each use is in the first column that
applies, so the columns add up:

    sampled = failed + truncated + no_spread + stale                                        (counted here)
              + zero_advantage + stopped + mismatch_masked + clipped + contributing         (counted by the learner)

Scored members of a group that is too small count as failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo.batching.steps import TrainingRow
from grpo.config import AlgorithmConfig, Config
from grpo.objective import advantages as family
from grpo.objective.compatibility import GROUP_RELATIVE, NEEDS_GROUPS
from grpo.types import Group, Rollout, Scored

LEARNER_COLUMNS = ("zero_advantage", "stopped", "mismatch_masked", "clipped", "contributing")


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
    shaped = [
        [shaped_reward(r, config) for r in group.rollouts if isinstance(r.outcome, Scored)] for _, group in usable
    ]
    spread = [family.has_spread(group.rewards) for _, group in usable]
    lengths = [[int(r.completion.sampled_mask.sum()) for r in scored(group)] for _, group in usable]
    values = row_values(shaped, spread, lengths, a)
    # if the KL in the reward or the whitening can change an advantage of 0, a row without spread counts like any other
    judged = a.advantage in GROUP_RELATIVE and not (a.kl_coef > 0 and a.kl_place == "reward")
    uses = dict.fromkeys(("sampled", "failed", "truncated", "no_spread", "stale"), 0)
    minibatches: list[list[TrainingRow]] = [[] for _ in range(a.minibatches_per_step)]
    for (p, group), group_values, group_shaped, has_spread in zip(usable, values, shaped, spread, strict=True):
        members = [(i, r) for i, r in enumerate(group.rollouts) if isinstance(r.outcome, Scored)]
        for (i, rollout), value, reward in zip(members, group_values, group_shaped, strict=True):
            reason = left_out(rollout, policy_version, has_spread or not judged, a)
            if reason is not None:
                uses[reason] += tokens_of(rollout)
            if reason != "truncated" and not is_stale(rollout, policy_version):
                returned = value if a.advantage == "reinforce_pp_baseline" else reward
                row = training_row(rollout, p, p * a.group_size + i, value, returned, has_spread or not judged)
                minibatches[p * a.minibatches_per_step // a.prompts_per_step].append(row)
    trained_groups = {p for p, _ in usable}
    for p, group in enumerate(groups):
        uses["sampled"] += sum(tokens_of(r) for r in group.rollouts)
        lost = group.rollouts if p not in trained_groups else group.failed
        uses["failed"] += sum(tokens_of(r) for r in lost)
    for group in unused:
        uses["sampled"] += sum(tokens_of(r) for r in group.rollouts)
        lost = group.rollouts if len(group.rewards) < least else group.failed
        uses["failed"] += sum(tokens_of(r) for r in lost)
        for rollout in scored(group) if lost is not group.rollouts else ():
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
