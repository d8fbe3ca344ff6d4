"""Statistics of an evaluation (avg@k, pass@k, maj@k over prompts, with intervals) and a paired test of two evaluations.

Intervals come from resampling prompts, not completions: more completions give information about their prompt, only more
prompts give information about the data set. So an interval is about the mean over all prompts of this kind, however
many completions each has.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from grpo.evaluation.answers import final_answer
from grpo.metrics.measures import fraction, logged_metrics
from grpo.types import Group, Rollout, Scored, Unchecked

DRAWS = 10_000
LEVEL = 0.95
GAINS = (-1.0, 1.0)
"""Range of the gain of a statistic between 0 and 1."""
RIGHT = 1.0
"""Lowest reward of a right completion: pass@k and maj@k count right completions, avg@k is the mean reward."""
BLOCK = 2_000_000
"""Maximum number of resampled values held in memory."""
FEW = 20
"""If fewer prompts than this differ from the most common value, resampling underestimates the spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One completion of an evaluation."""

    value: float | None
    """Value of the reward that judges the data set; None where it gave none."""
    answer: str
    """Answer that it votes for; empty: no vote."""
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over prompts and its 95 % confidence interval. The bounds are NaN if a data set has a single prompt."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetEvaluation:
    """An evaluation on one data set."""

    per_prompt: Mapping[str, float]
    """prompt_id -> avg@k: mean over its scored completions."""
    pass_at_k: float
    """Share of prompts with a right completion among all k."""
    maj_at_k: float
    """Share of prompts whose most frequent answer is right."""
    tokens_mean: float
    truncated_fraction: float
    failed: int
    """Completions without a reward; they are excluded from avg@k, pass@k and maj@k."""

    @property
    def accuracy(self) -> float:
        """avg@k: mean over prompts of the mean over samples."""
        return float(np.mean(list(self.per_prompt.values())))

    def interval(self) -> Interval:
        """Return the accuracy with its interval."""
        return interval(list(self.per_prompt.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation on all data sets, each judged by the first reward that scores it."""

    sets: Mapping[str, SetEvaluation]
    parts: Mapping[str, SetEvaluation] = field(default_factory=dict)
    """`<data set>/<column>/<value>` -> the prompts with that value, for the columns of data.eval.by."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """Means of the values that reward functions have logged (`metrics.measures.logged_metrics`); not in checkpoints."""

    @property
    def accuracy(self) -> float:
        """Mean over data sets."""
        return float(np.mean([each.accuracy for each in self.sets.values()]))

    def interval(self) -> Interval:
        """Return the accuracy with its interval."""
        return interval(*(list(each.per_prompt.values()) for each in self.sets.values()))


def judge(scored: Sequence[Mapping[str, float]]) -> str | None:
    """Return the reward that judges a data set: the first in the recipe's order that scored any of its completions.

    `scored`: the parts of each completion, in the recipe's order. On completions where this reward abstains, no other
    reward replaces it.
    """
    firsts = dict.fromkeys(next(iter(parts)) for parts in scored if parts)
    behind = {name for parts in scored for name in list(parts)[1:]}
    return next((name for name in firsts if name not in behind), None)


def parts_of(rollout: Rollout) -> Mapping[str, float]:
    """Return the parts of a rollout's reward; empty if it failed."""
    return rollout.outcome.parts if isinstance(rollout.outcome, Scored) else {}


def judged(rollout: Rollout, by: str | None) -> Judged:
    """Return the `Judged` record of a completion. `by`: the reward that judges its data set."""
    return Judged(
        value=None if by is None else parts_of(rollout).get(by),
        answer=final_answer(rollout.text),
        tokens=len(rollout.completion.token_ids),
        truncated=rollout.completion.finish_reason == "length",
    )


def summarize(samples: Mapping[str, Sequence[Judged]]) -> SetEvaluation:
    """Return the statistics of one data set. `samples`: prompt_id -> its completions.

    Raises ValueError when no completion was scored.
    """
    values = statistics_of(samples)
    every = [sample for some in samples.values() for sample in some]
    k = max(len(some) for some in samples.values())
    return SetEvaluation(
        per_prompt=values["avg"],
        pass_at_k=mean_of(values.get(f"pass@{k}", values["pass"])),
        maj_at_k=mean_of(values["maj"]),
        tokens_mean=float(np.mean([sample.tokens for sample in every])),
        truncated_fraction=fraction(every, lambda sample: sample.truncated),
        failed=sum(sample.value is None for sample in every),
    )


def evaluate_groups(groups: Mapping[str, Sequence[Group]], by: Sequence[str] = ()) -> Evaluation:
    """Return the evaluation of all data sets, and of the prompts with each value of the columns `by`.

    `groups`: data set -> its groups.

    Raises ValueError when no completion of a data set was scored.
    """
    sets, parts = dict[str, SetEvaluation](), dict[str, SetEvaluation]()
    for name, some in groups.items():
        judging = judge([parts_of(rollout) for group in some for rollout in group.rollouts])
        samples = {group.prompt.prompt_id: [judged(r, judging) for r in group.rollouts] for group in some}
        sets[name] = summarize(samples)
        for column in by:
            for value, part in parts_by(column, {g.prompt.prompt_id: g.prompt.row for g in some}, samples).items():
                if any(sample.value is not None for own in part.values() for sample in own):
                    parts[f"{name}/{column}/{value}"] = summarize(part)
    logged = logged_metrics([group for some in groups.values() for group in some])
    return Evaluation(sets=sets, parts=parts, logged=logged)


def parts_by(
    column: str, rows: Mapping[str, Mapping[str, Unchecked]], samples: Mapping[str, Sequence[Judged]]
) -> dict[str, dict[str, Sequence[Judged]]]:
    """Return value of the column -> samples of its prompts, sorted by value. `rows`, `samples`: by prompt_id."""
    out: dict[str, dict[str, Sequence[Judged]]] = defaultdict(dict)
    for prompt_id, some in samples.items():
        if column in rows[prompt_id]:
            out[str(rows[prompt_id][column])][prompt_id] = some
    return dict(sorted(out.items()))


def statistics_of(samples: Mapping[str, Sequence[Judged]]) -> dict[str, dict[str, float]]:
    """Return statistic -> prompt_id -> value, over the prompts that have the statistic.

    "avg" is the mean reward of the scored completions. "pass" is 1 if any of them is right. "maj" is the rightness of
    the most frequent answer. "pass@k", for k = 1, 2, 4, ... and the number of samples per prompt, is estimated from all
    scored completions, for prompts with at least k of them.

    Raises ValueError when no completion was scored.
    """
    out: dict[str, dict[str, float]] = defaultdict(dict)
    asked = max((len(some) for some in samples.values()), default=0)
    ks = sorted({asked, *(2**i for i in range(asked.bit_length()) if 2**i <= asked)})
    for prompt_id, some in sorted(samples.items()):  # the resampling depends on the order
        scored = [(sample.value, sample.answer) for sample in some if sample.value is not None]
        if not scored:
            continue
        right = sum(value >= RIGHT for value, _ in scored)
        out["avg"][prompt_id] = float(np.mean([value for value, _ in scored]))
        out["pass"][prompt_id] = float(right > 0)
        out["maj"][prompt_id] = majority([(answer, value >= RIGHT) for value, answer in scored])
        for k in ks:
            if k <= len(scored):
                out[f"pass@{k}"][prompt_id] = pass_at_k(len(scored), right, k)
    if not out:
        raise ValueError("no completion of the evaluation was scored")
    return dict(out)


def repeats_of_avg(k: int) -> tuple[str, ...]:
    """Return the statistics that are the same number as avg if all rewards are 0 or 1. `k`: completions per prompt."""
    return ("pass@1", "maj") if k == 1 else ("pass@1",)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the probability that k of n completions, drawn without replacement, include one of the `right` ones: the
    unbiased estimator of arXiv 2107.03374 sec. 2.1.

    Raises ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"pass@{k} cannot be estimated from {right} right ones of {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: Sequence[tuple[str, bool]]) -> float:
    """Return the probability that the most frequent answer is right, with ties broken at random; 0 without votes.

    Completions with the same answer can be judged differently, if the reward considers more than the answer. Then the
    share of right ones counts. `votes`: (answer, whether right) of each completion; an empty answer is no vote.
    """
    counts = Counter(answer for answer, _ in votes if answer)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]
    shares = [np.mean([right for answer, right in votes if answer == winner]) for winner in winners]
    return float(np.mean(shares))


def mean_of(values: Mapping[str, float]) -> float:
    """Return the mean over prompts."""
    return float(np.mean(list(values.values())))


def interval(*sets: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean over prompts of a statistic between 0 and 1, with its interval. `sets`: values of the prompts of
    each data set; of several, it is the mean of their means."""
    arrays = [np.asarray(values, dtype=np.float64) for values in sets]
    mean = float(np.mean([array.mean() for array in arrays]))
    if min(map(len, arrays)) < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan)
    low, high = bounds(arrays, (0.0, 1.0), seed=seed)
    return Interval(mean=mean, low=low, high=high)


def with_bounds(value: Interval) -> str:
    """Return `0.512 (0.480 to 0.544)`, or only the mean without bounds."""
    return f"{value.mean:.3f}" if math.isnan(value.low) else f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def paired_gain(before: Evaluation, after: Evaluation, *, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean gain of `accuracy` with its 95 % interval over prompts: (gain, low, high)."""
    gains = list(paired(before, after).values())
    low, high = bounds(gains, GAINS, seed=seed)
    return float(np.mean([array.mean() for array in gains])), low, high


def paired(before: Evaluation, after: Evaluation) -> dict[str, NDArray[np.float64]]:
    """Return data set -> gains of its prompts, over the prompts that both evaluations have.

    Raises ValueError when there are none.
    """
    out = {}
    for name, old in before.sets.items():
        new = after.sets[name].per_prompt if name in after.sets else {}
        shared = [prompt_id for prompt_id in old.per_prompt if prompt_id in new]
        if shared:
            out[name] = np.asarray([new[p] - old.per_prompt[p] for p in shared])
    if not out:
        raise ValueError("the two evaluations share no prompt")
    return out


def bounds(strata: Sequence[NDArray[np.float64]], span: tuple[float, float], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of the stratum means; each stratum [N] is resampled separately.

    It is the expanded percentile interval: the spread of resampling N prompts is too small by the factor sqrt((N-1)/N)
    and its tails are normal, so the quantiles are moved outwards to those of Student's t for the smallest resampled
    stratum (Hesterberg, arXiv 1411.5279). A stratum where fewer than `FEW` prompts differ from the most common value
    is bounded by `means_with_one_more` instead.

    Args:
        span: range of the values; values outside widen it.
    """
    draws = [
        means_with_one_more(array, span, seed + i) if few_differ(array) else (resampled_means(array, seed + i),) * 2
        for i, array in enumerate(strata)
    ]
    n = min((len(array) for array in strata if not few_differ(array)), default=0)
    tail = statistics.NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile(n - 1)) if n else (1 - LEVEL) / 2
    lows, highs = (np.mean(side, axis=0) for side in zip(*draws, strict=True))
    return float(np.quantile(lows, tail)), float(np.quantile(highs, 1 - tail))


def few_differ(values: NDArray[np.float64]) -> bool:
    """Return whether fewer than `FEW` values differ from the most common one."""
    return bool(len(values) - np.unique(values, return_counts=True)[1].max() < FEW)


def means_with_one_more(
    values: NDArray[np.float64], span: tuple[float, float], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two arrays [DRAWS] of weighted means: of the values with one more at the lower end of `span`, and with one
    more at its upper end. The weights are uniform over all that sum to 1.

    Their outer quantiles bound the mean (Gaffke; Learned-Miller and Thomas, arXiv 1905.06208). For values of 0 and 1
    these are the Clopper-Pearson bounds of a binomial.
    """
    rng = np.random.default_rng(seed)
    each, counts = np.unique(values, return_counts=True)
    inside = rng.dirichlet(counts, size=DRAWS) @ each
    # the weight of the additional value is Beta(1, N); its evenly spaced quantiles add less noise than draws
    weight = 1 - rng.permutation((np.arange(DRAWS) + 0.5) / DRAWS) ** (1 / len(values))
    low, high = (inside + weight * (end - inside) for end in (min(span[0], each[0]), max(span[1], each[-1])))
    return low, high


def resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return [DRAWS] means of len(values) values drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(values))
    blocks = [
        values[rng.integers(len(values), size=(min(rows, DRAWS - start), len(values)))].mean(axis=1)
        for start in range(0, DRAWS, rows)
    ]
    return np.concatenate(blocks)


def student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t by expansion around the normal quantile (Abramowitz and Stegun 26.7.5),
    within 0.2 % for 5 or more degrees of freedom."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + float(sum(term / degrees ** (i + 1) for i, term in enumerate(terms)))


def sign_test(strata: Sequence[NDArray[np.float64]], *, seed: int = 0) -> float:
    """Return the two-sided p-value of the hypothesis that both evaluations are alike: the share of draws in which the
    mean gain is as far from 0 after the sign of each prompt's gain is randomized (a permutation test on pairs). It is
    at least 1 / (DRAWS + 1)."""
    rng = np.random.default_rng(seed)
    seen = abs(np.mean([array.mean() for array in strata]))
    tossed = np.zeros(DRAWS)
    for array in strata:
        rows = max(1, BLOCK // len(array))
        for start in range(0, DRAWS, rows):
            signs = rng.integers(2, size=(min(rows, DRAWS - start), len(array))) * 2 - 1
            tossed[start : start + len(signs)] += (signs * array).mean(axis=1) / len(strata)
    return float((1 + (np.abs(tossed) >= seen - 1e-12).sum()) / (DRAWS + 1))
