"""Scored groups -> the rows that are trained on, each with its advantage, and an account of every sampled token.

The account counts *uses*: a token that is trained on in two epochs counts twice. Its columns exclude each other, the
first that applies, and add up: sampled = failed + truncated + no_spread + stale, here, + zero_advantage + stopped +
mismatch_masked + clipped + contributing, on the learner. The scored members of a group that is too small count as
failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo.batching import TrainingRow
from grpo.config import AlgorithmConfig, Config
from grpo.metrics import scored_rewards
from grpo.objective import advantages as family
from grpo.objective.legal import GROUP_RELATIVE, NEEDS_GROUPS
from grpo.types import Group, Rollout, Scored

LEARNER_COLUMNS = ("zero_advantage", "stopped", "mismatch_masked", "clipped", "contributing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """A step's rows."""

    minibatches: tuple[tuple[TrainingRow, ...], ...]
    advantages: tuple[float, ...]
    """Of the rows, in order; for token-level methods the rewards that they are made from."""
    uses: Mapping[str, int]
    """The account's columns up to `stale`, and `sampled`."""


def training_rows(groups: Sequence[Group], unused: Sequence[Group], config: Config, policy_version: int) -> Credit:
    """Rows of each minibatch, with advantages over the scored members of each group.

    Failed rollouts are in no row and no statistic. A group with fewer scored members than the method compares is
    dropped. Rollouts of groups without spread stay where the method gives them 0: they count in the denominator.
    Truncated completions that `mask_truncated` leaves out are compared with, and not trained on.

    Args:
        groups: of the step's prompts, in order.
        unused: further groups that were sampled and replaced, for the account alone.
        policy_version: of the learner; a row with an older token is left out as stale.
    """
    a = config.algorithm
    least = members_needed(a)
    usable = [(p, group) for p, group in enumerate(groups) if len(scored_rewards(group)) >= least]
    shaped = [
        [shaped_reward(r, config) for r in group.rollouts if isinstance(r.outcome, Scored)] for _, group in usable
    ]
    spread = [family.has_spread(scored_rewards(group)) for _, group in usable]
    lengths = [[int(r.completion.sampled_mask.sum()) for r in scored(group)] for _, group in usable]
    values = row_values(shaped, spread, lengths, a)
    # where 0 is not final, because the KL or the whitening moves it, such a row contributes like any other
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
        lost = group.rollouts if p not in trained_groups else failed(group)
        uses["failed"] += sum(tokens_of(r) for r in lost)
    for group in unused:
        uses["sampled"] += sum(tokens_of(r) for r in group.rollouts)
        lost = group.rollouts if len(scored_rewards(group)) < least else failed(group)
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
    """Return the advantage of each trained completion by its position in the step; empty where a method gives tokens
    advantages of their own."""
    if config.algorithm.advantage not in GROUP_RELATIVE:
        return {}
    return {row.rollout_index: row.advantage for rows in credit.minibatches for row in rows}


def training_row(
    rollout: Rollout, prompt: int, index: int, advantage: float, reward: float, has_spread: bool
) -> TrainingRow:
    """The row of a rollout. `prompt`: position of its group in the step; `index`: its own among all rollouts."""
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
    """Scored members that a group must have to be trained on."""
    if a.advantage == "pass_at_k":
        return a.pass_k
    return 2 if a.advantage in NEEDS_GROUPS else 1


def row_values(
    shaped: Sequence[Sequence[float]], spread: Sequence[bool], lengths: Sequence[Sequence[int]], a: AlgorithmConfig
) -> list[list[float]]:
    """What the method gives each row of each group: its advantage, or the reward that tokens will be given.

    Args:
        shaped: [P][n_p] rewards, length penalty included.
        spread: [P] whether the raw rewards differ; where they do not, the length penalty alone gives no advantage.
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
    """The reward with the soft length penalty (DAPO, arXiv 2503.14476 eq. 13): from `length_penalty_tokens` before
    `max_tokens` it falls linearly, by `length_penalty` at `max_tokens`."""
    assert isinstance(rollout.outcome, Scored)
    buffer = config.algorithm.length_penalty_tokens
    if not buffer:
        return rollout.outcome.value
    over = len(rollout.completion.token_ids) - (config.sampling.max_tokens - buffer)
    return rollout.outcome.value - config.algorithm.length_penalty * max(0.0, min(1.0, over / buffer))


def left_out(rollout: Rollout, policy_version: int, has_spread: bool, a: AlgorithmConfig) -> str | None:
    """The column that a scored rollout's tokens fall into before the learner, None where they go on to it."""
    if a.mask_truncated and rollout.completion.finish_reason == "length":
        return "truncated"
    if not has_spread:
        return "no_spread"
    return "stale" if is_stale(rollout, policy_version) else None


def is_stale(rollout: Rollout, policy_version: int) -> bool:
    """Whether any token was sampled by an older policy than the learner's."""
    return int(rollout.completion.policy_versions.min()) < policy_version


def tokens_of(rollout: Rollout) -> int:
    """Sampled tokens of a rollout."""
    return int(rollout.completion.sampled_mask.sum())


def scored(group: Group) -> list[Rollout]:
    return [r for r in group.rollouts if isinstance(r.outcome, Scored)]


def failed(group: Group) -> list[Rollout]:
    return [r for r in group.rollouts if not isinstance(r.outcome, Scored)]


def account(uses: Mapping[str, int], learner: Mapping[str, float]) -> dict[str, float]:
    """The whole table, `gradient/<column>`.

    Raises RuntimeError when the columns do not add up: then tokens were lost between the sampler and the loss.
    """
    table = {f"gradient/{name}": float(count) for name, count in uses.items()}
    table |= {f"gradient/{name}": learner.get(f"gradient/{name}", 0.0) for name in LEARNER_COLUMNS}
    total = sum(value for name, value in table.items() if name != "gradient/sampled")
    if total != table["gradient/sampled"]:
        raise RuntimeError(f"the account of sampled tokens does not add up: {table}")
    return table
