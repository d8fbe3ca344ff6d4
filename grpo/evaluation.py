"""Statistics of an evaluation: avg@k, pass@k, maj@k over prompts, with intervals, and the paired test of two of them.

Prompts are what is resampled: a completion tells about its prompt, and only another prompt about the data set. So an
interval says where the mean over all prompts of this kind lies, however many completions each got.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo.metrics import fraction, logged_metrics
from grpo.types import Group, Rollout, Scored

DRAWS = 10_000
LEVEL = 0.95
GAINS = (-1.0, 1.0)
"""Between these lies the gain of a statistic between 0 and 1."""
RIGHT = 1.0
"""The reward from which on a completion is right: pass@k and maj@k count right ones, avg@k takes the mean reward."""
BLOCK = 2_000_000
"""Numbers that a resampling holds at once."""
FEW = 20
"""Where fewer prompts than this differ from the most common value, resampling sees too little of the spread."""

BOX = re.compile(r"\\boxed\s*(?:(?=\{)|(-?\.?\d[^\s$\\{}]*))")
BRACE = re.compile(r"\\.|[{}]", re.S)
NUMBER = re.compile(r"-?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
BRACKET = re.compile(r"[(\[]|\\\{")
MARKUP = re.compile(r"\\(?:text|math)[a-z]*|\*\*|[${}\\]")
LONE = re.compile(r"\(?([A-Z])\)?[.:]?")
"""A choice of several: B, (B), B."""
SAID = re.compile(
    rf"(?i:answer)(?i:\s+is\b\s*+:?|\s*+:)\s*+(?:(?i:option\s+)?(?!I\s+[a-z])({LONE.pattern})(?=\s|[,;!]|$)"
    rf"(?!\s*(?:[=+<>]|(?:or|and|/|,|&)\s*\(?[A-Z]\b))|((?>{NUMBER.pattern}))(?!\s*(?:[-=+*/^]|times|cdot)))"
)
"""The answer is B, the answer is 5; no choice between letters (A or B), no variable (N = 5) and no sum (5 + 2 = 7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One completion of an evaluation."""

    value: float | None
    """What the first reward gave; None where it failed."""
    answer: str
    """What it votes for; empty: nothing."""
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over prompts and where it lies with 95 % confidence. NaN bounds: one prompt tells nothing of others."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetEvaluation:
    """An evaluation on one data set."""

    per_prompt: Mapping[str, float]
    """prompt_id -> avg@k: mean over its scored completions."""
    pass_at_k: float
    """Share of prompts with a right completion among k = all."""
    maj_at_k: float
    """Share of prompts whose most frequent answer is right."""
    tokens_mean: float
    truncated_fraction: float
    failed: int
    """Completions without a reward; they are in no mean."""

    @property
    def accuracy(self) -> float:
        """avg@k: mean over prompts of the mean over samples."""
        return float(np.mean(list(self.per_prompt.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation on every data set, by the first reward that scores it."""

    sets: Mapping[str, SetEvaluation]
    parts: Mapping[str, SetEvaluation] = field(default_factory=dict)
    """`<data set>/<column>/<value>` -> the prompts with that value, for the columns of data.eval.by."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """Means of what reward functions have logged, by `grpo.metrics.logged_metrics`; no checkpoint keeps them."""

    @property
    def accuracy(self) -> float:
        """Mean over data sets."""
        return float(np.mean([each.accuracy for each in self.sets.values()]))


def judge(scored: Sequence[Mapping[str, float]]) -> str | None:
    """The reward that a data set is judged by: the recipe's first of those that scored any of its completions.

    `scored`: the parts of each completion, in the recipe's order. Where that reward abstained, another one does not
    take its place.
    """
    firsts = dict.fromkeys(next(iter(parts)) for parts in scored if parts)
    behind = {name for parts in scored for name in list(parts)[1:]}
    return next((name for name in firsts if name not in behind), None)


def parts_of(rollout: Rollout) -> Mapping[str, float]:
    """The parts of its reward; none where it failed."""
    return rollout.outcome.parts if isinstance(rollout.outcome, Scored) else {}


def judged(rollout: Rollout, by: str | None) -> Judged:
    """What counts of a completion. `by`: the reward that judges its data set."""
    return Judged(
        value=None if by is None else parts_of(rollout).get(by),
        answer=final_answer(rollout.text),
        tokens=len(rollout.completion.token_ids),
        truncated=rollout.completion.finish_reason == "length",
    )


def final_answer(text: str) -> str:
    """The answer that a completion ends with, as text to vote by; empty where its last box is not closed.

    It is what stands in the last `\\boxed{...}`, else what follows the last `####` on its line, else the last
    `<answer>...</answer>`, else the letter or number of the last "answer is ...", else a last line that is a lone
    letter, else the last number, else all of it.
    """
    found = ending(text.rpartition("</think>")[2].replace("\u2212", "-"))
    if letter := LONE.fullmatch(MARKUP.sub("", found).strip()):
        return letter[1]
    if not BRACKET.search(found):  # in brackets, commas are between members
        found = THOUSANDS.sub(lambda number: number[0].replace(",", ""), found)
    return "".join(found.split()).rstrip(".,")


def ending(text: str) -> str:
    """The answer as it was written."""
    if boxes := list(BOX.finditer(text)):
        return boxes[-1][1] or inside(text, boxes[-1].end())
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0]
    plain = MARKUP.sub("", text).strip()
    if said := list(SAID.finditer(plain)):
        return said[-1][1] or said[-1][3]
    last = plain.rpartition("\n")[2].strip()
    if LONE.fullmatch(last):
        return last
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else text


def inside(text: str, start: int) -> str:
    """What the brace at `start` holds up to the one that closes it; empty without such. Escaped braces do not count."""
    depth = 0
    for mark in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start + 1 : mark.start()]
    return ""


def summarize(samples: Mapping[str, Sequence[Judged]]) -> SetEvaluation:
    """The numbers of one data set. `samples`: prompt_id -> its completions.

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
    """The evaluation of data set -> its groups; of every value of the columns `by`, too.

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
    column: str, rows: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[Judged]]
) -> dict[str, dict[str, Sequence[Judged]]]:
    """Value of the column -> the samples of the prompts whose row has it, by value. `rows`, `samples`: by prompt_id."""
    out: dict[str, dict[str, Sequence[Judged]]] = defaultdict(dict)
    for prompt_id, some in samples.items():
        if column in rows[prompt_id]:
            out[str(rows[prompt_id][column])][prompt_id] = some
    return dict(sorted(out.items()))


def statistics_of(samples: Mapping[str, Sequence[Judged]]) -> dict[str, dict[str, float]]:
    """Statistic -> prompt_id -> value, over the prompts that have it.

    "avg" is the mean reward of the scored completions, "pass" whether any of them is right, "maj" the rightness of the
    most frequent answer, and "pass@k" for k = 1, 2, 4, ... up to the number asked for is estimated from all of them,
    for prompts with at least k scored ones.

    Raises ValueError when no completion was scored.
    """
    out: dict[str, dict[str, float]] = defaultdict(dict)
    asked = max((len(some) for some in samples.values()), default=0)
    ks = sorted({asked, *(2**i for i in range(asked.bit_length()) if 2**i <= asked)})
    for prompt_id, some in sorted(samples.items()):  # in whatever order they came, the resampling sees one
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


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n completions, drawn without replacement, hold one of the `right` ones: the unbiased estimator
    of arXiv 2107.03374 sec. 2.1.

    Raises ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"pass@{k} cannot be estimated from {right} right ones of {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: Sequence[tuple[str, bool]]) -> float:
    """Chance that the most frequent answer is right, ties broken at random; 0 where nobody votes.

    Completions of the same answer can be judged differently, where the reward looks at more than the answer: then it
    is right by their share. `votes`: (answer, whether right) of each; an empty answer is no vote.
    """
    counts = Counter(answer for answer, _ in votes if answer)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]
    shares = [np.mean([right for answer, right in votes if answer == winner]) for winner in winners]
    return float(np.mean(shares))


def mean_of(values: Mapping[str, float]) -> float:
    """Mean over prompts."""
    return float(np.mean(list(values.values())))


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of a statistic between 0 and 1 over prompts, with its interval."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan)
    low, high = bounds([array], (0.0, 1.0), seed=seed)
    return Interval(mean=mean, low=low, high=high)


def paired_gain(before: Evaluation, after: Evaluation, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean gain of `accuracy`, with its 95 % interval over prompts: (gain, low, high)."""
    gains = list(paired(before, after).values())
    low, high = bounds(gains, GAINS, seed=seed)
    return float(np.mean([array.mean() for array in gains])), low, high


def paired(before: Evaluation, after: Evaluation) -> dict[str, NDArray[np.float64]]:
    """Data set -> gains of its prompts, for what both evaluations have.

    Raises ValueError when that is nothing.
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
    """95 % interval of the mean over strata of their means; each stratum [N] is resampled by itself.

    The expanded percentile interval: resampling N prompts has too small a spread by sqrt((N-1)/N) and normal tails, so
    the quantiles are taken further out, where Student's t of the smallest stratum has them (Hesterberg, arXiv
    1411.5279). A stratum where all but `FEW` prompts agree is bounded by `means_with_one_more`.

    Args:
        span: between which the values lie; values beyond it widen it.
    """
    draws = []
    for i, array in enumerate(strata):
        if few_differ(array):
            draws.append(means_with_one_more(array, span, seed + i))
        else:
            draws.append((resampled_means(array, seed + i),) * 2)
    sizes = [len(array) for array in strata if not few_differ(array)]
    n = min(sizes, default=0)
    tail = statistics.NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile(n - 1)) if n else (1 - LEVEL) / 2
    lows, highs = (np.mean(side, axis=0) for side in zip(*draws, strict=True))
    return float(np.quantile(lows, tail)), float(np.quantile(highs, 1 - tail))


def few_differ(values: NDArray[np.float64]) -> bool:
    """Whether fewer than `FEW` values are another than the most common one."""
    return bool(len(values) - np.unique(values, return_counts=True)[1].max() < FEW)


def means_with_one_more(
    values: NDArray[np.float64], span: tuple[float, float], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[DRAWS] weighted means of the values and one more at the lower end of `span`, and at its upper end; weights are
    uniform over all that sum to 1.

    Their outer quantiles bound the mean (Gaffke; Learned-Miller and Thomas, arXiv 1905.06208). For values of 0 and 1
    they are Clopper and Pearson's bounds of a binomial.
    """
    rng = np.random.default_rng(seed)
    each, counts = np.unique(values, return_counts=True)
    inside = rng.dirichlet(counts, size=DRAWS) @ each
    # the weight of the one more is Beta(1, N): its quantiles, evenly, where drawing would add noise
    weight = 1 - rng.permutation((np.arange(DRAWS) + 0.5) / DRAWS) ** (1 / len(values))
    low, high = (inside + weight * (end - inside) for end in (min(span[0], each[0]), max(span[1], each[-1])))
    return low, high


def resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """[DRAWS] means of as many values drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(values))
    blocks = [
        values[rng.integers(len(values), size=(min(rows, DRAWS - start), len(values)))].mean(axis=1)
        for start in range(0, DRAWS, rows)
    ]
    return np.concatenate(blocks)


def student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal's (Abramowitz and Stegun 26.7.5); within
    0.2 % from 5 degrees on."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + float(sum(term / degrees ** (i + 1) for i, term in enumerate(terms)))


def sign_test(strata: Sequence[NDArray[np.float64]], *, seed: int = 0) -> float:
    """Two-sided p-value of "the two are alike": how often the mean gain is as far from 0 when the sign of every
    prompt's gain is tossed (a permutation test on pairs; at least 1 / (DRAWS + 1))."""
    rng = np.random.default_rng(seed)
    seen = abs(np.mean([array.mean() for array in strata]))
    tossed = np.zeros(DRAWS)
    for array in strata:
        rows = max(1, BLOCK // len(array))
        for start in range(0, DRAWS, rows):
            signs = rng.integers(2, size=(min(rows, DRAWS - start), len(array))) * 2 - 1
            tossed[start : start + len(signs)] += (signs * array).mean(axis=1) / len(strata)
    return float((1 + (np.abs(tossed) >= seen - 1e-12).sum()) / (DRAWS + 1))
