"""The metrics of a step: pure functions from groups and learner sums to numbers. docs/metrics.md lists them.

A quantity without observations (no failed group, nothing clipped because nothing was trained) is left out, not 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from grpo.objective.spread import has_spread
from grpo.types import Failed, Group, Rollout, Scored, StepResult

T = TypeVar("T")

HEADLINE = (
    "reward/mean", "group/no_spread_fraction", "completion/tokens_mean", "completion/truncated_fraction",
    "policy/entropy", "policy/kl_ref", "policy/clip_fraction", "mismatch/rms", "optim/grad_norm", "time/step_s",
)  # fmt: skip
"""The ten metrics that the console shows."""


def spread_of(prefix: str, values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Return the statistics `names` (of mean, std, min, max) of `values`, each as `<prefix><name>`.

    Empty if there are no values.
    """
    if not values:
        return {}
    array = np.asarray(values, dtype=np.float64)
    numbers = {
        "mean": array.mean(),
        "std": array.std(ddof=1) if len(array) > 1 else 0.0,
        "min": array.min(),
        "max": array.max(),
    }
    return {f"{prefix}{name}": float(numbers[name]) for name in names}


def rollout_metrics(groups: Sequence[Group], least: int) -> dict[str, float]:
    """Return the metrics of a step's rollouts: rewards, groups, lengths and failures.

    `least`: scored members that a group needs to be trained on.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [(r, r.outcome) for r in rollouts if isinstance(r.outcome, Scored)]
    four = ("mean", "std", "min", "max")
    out = spread_of("reward/", [outcome.value for _, outcome in scored], four)
    for name in sorted({name for _, outcome in scored for name in outcome.parts}):
        part = [outcome.parts[name] for _, outcome in scored if name in outcome.parts]
        out |= spread_of(f"reward_part/{name}/", part, four)
    out |= logged_metrics(groups)
    kinds = Counter(r.outcome.kind for r in rollouts if isinstance(r.outcome, Failed))
    out["reward/failed_fraction"] = sum(kinds.values()) / len(rollouts)
    out |= {f"reward/failed_{kind}": float(count) for kind, count in sorted(kinds.items())}
    lengths = [float(len(r.completion.token_ids)) for r in rollouts]
    out |= spread_of("completion/tokens_", lengths, four)
    out["completion/truncated_fraction"] = fraction(rollouts, lambda r: r.completion.finish_reason == "length")
    best = max((outcome.value for _, outcome in scored), default=0.0)
    for label, right in (("right", True), ("wrong", False)):
        members = [float(len(r.completion.token_ids)) for r, o in scored if (o.value == best and best > 0) == right]
        out |= spread_of(f"completion/tokens_{label}_", members, ("mean",))
    out |= spread_of("prompt/tokens_", [float(len(g.prompt.token_ids)) for g in groups], ("mean", "min", "max"))
    return out | group_metrics(groups, best, least) | {"tokens/sampled": sum(lengths)}


def logged_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the mean of all values that reward functions logged by a name, as `reward/<reward>/metric/<name>`.

    Values logged by a reward that failed on the completion are included.
    """
    sums: dict[str, tuple[float, int]] = {}
    for group in groups:
        for rollout in group.rollouts:
            for name, (added, values) in rollout.outcome.logged.metrics.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + added, count + values)
    return {f"reward/{name}": total / count for name, (total, count) in sorted(sums.items())}


def group_metrics(groups: Sequence[Group], best: float, least: int) -> dict[str, float]:
    """Return the metrics of the groups: counts of all groups, shares of those with at least two scored members.

    Args:
        best: the step's highest reward. Completions with this reward count as right if the reward is above 0.
        least: scored members that a group needs. A group with fewer is dropped and is in no share.
    """
    rewards = [group.rewards for group in groups]
    dropped = sum(len(group) < least for group in rewards)
    usable = [group for group in rewards if len(group) >= max(2, least)]
    out = {"group/dropped": float(dropped), "group/count": float(len(groups))}
    if not usable:
        return out
    right = [[best > 0 and value == best for value in group] for group in usable]
    out |= spread_of("group/reward_std_", [float(np.std(group, ddof=1)) for group in usable], ("mean",))
    out["group/no_spread_fraction"] = fraction(usable, lambda group: not has_spread(group))
    out["group/all_right_fraction"] = fraction(right, all)
    out["group/all_wrong_fraction"] = fraction(right, lambda group: not any(group))
    out["group/mixed_fraction"] = fraction(right, lambda group: any(group) and not all(group))
    out["group/pass_at_group_size"] = fraction(right, any)
    return out


BY_SET = (
    "reward/mean", "completion/tokens_mean", "completion/truncated_fraction", "group/no_spread_fraction", "group/count",
)  # fmt: skip
"""Metrics that are also logged for each data set of a mix."""


def metrics_by_set(groups: Sequence[Group], least: int) -> dict[str, float]:
    """Return the metrics BY_SET of the groups of each data set, as `<name>/<data set>`."""
    out: dict[str, float] = {}
    for dataset in sorted({group.prompt.dataset for group in groups}):
        own = rollout_metrics([group for group in groups if group.prompt.dataset == dataset], least)
        out |= {f"{name}/{dataset}": own[name] for name in BY_SET if name in own}
    return out


def fraction(items: Sequence[T], predicate: Callable[[T], bool]) -> float:
    """Return the share of `items` for which `predicate` is true."""
    return sum(bool(predicate(item)) for item in items) / len(items)


def staleness_metrics(rollouts: Sequence[Rollout], policy_version: int) -> dict[str, float]:
    """Return the mean and the maximum over tokens of the learner's version minus the version that sampled the token.

    Empty if there are no tokens.
    """
    ages = np.concatenate([policy_version - r.completion.policy_versions for r in rollouts])
    if not len(ages):
        return {}
    return {"staleness/mean": float(ages.mean()), "staleness/max": float(ages.max())}


MISMATCH_EDGES = np.logspace(-9, 3, 481)
"""Edges, in nats, of the bins in which tokens are counted by the size of their mismatch: 40 per decade, 6 % wide."""


def mismatch_counts(differences: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many of the absolute `differences` lie in each bin of MISMATCH_EDGES.

    The first bin is below the first edge. The last bin is above the last edge and also counts NaN.
    """
    return np.bincount(np.digitize(differences, MISMATCH_EDGES), minlength=len(MISMATCH_EDGES) + 1)


def counted_quantile(counts: NDArray[np.int64], q: float) -> float:
    """Return the upper edge of the bin that holds the `q`-quantile of `counts`, as `mismatch_counts` returns them.

    The first bin gives 0, the last one infinity.
    """
    bounds = np.concatenate([[0.0], MISMATCH_EDGES[1:], [math.inf]])
    return float(bounds[np.searchsorted(np.cumsum(counts), q * counts.sum())])


def value_metrics(pairs: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Remove the critic's sums from `pairs` and return the share of the returns' variance that its values explain."""
    error, error_square, return_square = (
        pairs.pop(f"value/{name}", None) for name in ("error", "error_square", "return_square")
    )
    if error is None or error_square is None or return_square is None:
        return {}
    total, count = error
    return_sum, return_count = pairs["value/return_mean"]
    variance = return_square[0] / count - (return_sum / return_count) ** 2
    if variance <= 0:
        return {}
    return {"value/explained_variance": 1 - (error_square[0] / count - (total / count) ** 2) / variance}


def learner_metrics(result: StepResult) -> dict[str, float]:
    """Return the learner's sums as means, and the metrics that are derived from them."""
    pairs = dict(result.metrics)
    square = pairs.pop("mismatch/importance_weight_square", None)
    out = value_metrics(pairs)
    updates = result.maxima.get("policy/updates", 0.0)
    for name, (total, count) in pairs.items():
        if name.startswith("gradient/"):
            out[name] = total
        elif name.endswith(("_loss", "/loss")):
            if updates:
                out[name] = total / updates
        elif count:
            out[name] = total / count
    if (kl_ref := result.kl_ref.value) is not None:
        out["policy/kl_ref"] = kl_ref
    if (square_mean := result.mismatch_square.value) is not None:
        out["mismatch/rms"] = math.sqrt(square_mean)
        out["mismatch/q99"] = counted_quantile(result.mismatch_counts, 0.99)
    if square is not None and square[0] > 0:
        weight_sum, count = pairs["mismatch/importance_weight_mean"]
        out["mismatch/effective_sample_fraction"] = weight_sum**2 / (count * square[0])
    out |= {**result.maxima, **result.minima}
    if "policy/clip_fraction_low" in out:
        out["policy/clip_fraction"] = out["policy/clip_fraction_low"] + out["policy/clip_fraction_high"]
    return out
