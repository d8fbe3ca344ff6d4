"""Signs that a run does not learn as it should, from its metrics and the answers in its samples.

The warnings of `grpo.metrics.health` come first; the signs here are weaker, so they are for a reader to judge. A sign
has to hold for several consecutive steps. docs/view.md lists them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from grpo.config import Config
from grpo.metrics.health import PLACE, Health
from grpo.types import Json

PART_EQUAL_STEPS = 5
TRUNCATED_FRACTION, TRUNCATED_STEPS = 0.3, 3
FAILED_FRACTION, FAILED_STEPS = 0.02, 2
MISMATCH_Q99, MISMATCH_STEPS = 0.5, 3
STALENESS_MEAN, STALENESS_STEPS = 2.0, 3
ENTROPY_SHARE, ENTROPY_STEPS = 0.2, 5
LENGTH_RATIO, LENGTH_STEPS = 2.0, 5
BASELINE_STEPS = 5
"""Thresholds, and numbers of consecutive steps. Entropy and length are compared with their median over the first
BASELINE_STEPS steps."""
DISAGREEING_FRACTION, DISAGREEING_COUNT = 0.05, 3
"""Share and number of the completions of a file which end with the gold answer, and which still got the lowest
reward."""
DISAGREEING_AT_FIRST = 0.5
"""Share of the completions with the gold answer that got the lowest reward, for a run that gets over it: such a grader
is wrong, and not only strict about a form that the policy learns."""

TITLES = {
    "constant_reward": "All rewards are equal",
    "no_spread": "Groups without spread",
    "zero_gradient": "The gradient is 0",
    "zero_lr": "The learning rate is 0",
    "all_truncated": "Every completion is truncated",
}
"""Title of each warning of grpo.metrics.health."""

Line = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A sign that held."""

    kind: str
    title: str
    text: str
    """The observation."""
    cause: str
    """The likely cause, and where to look."""
    first_step: int
    last_step: int
    steps: int
    """Number of steps in which it held."""
    group: int | None = None
    """A group of its first step that shows it."""
    filter: str = ""
    """Filter that selects its completions."""

    def as_json(self) -> dict[str, Json]:
        """Return the alarm as an answer has it."""
        return {name: getattr(self, name) for name in self.__slots__}


def alarms_of(config: Config | None, lines: Sequence[Line]) -> list[Alarm]:
    """Return the alarms of a run, from the lines of metrics.jsonl in the order of steps."""
    steps = [line for line in lines if "group/count" in line]  # the others are of evaluations
    return [*(health_alarms(config, lines) if config else ()), *metric_alarms(steps)]


def health_alarms(config: Config, lines: Sequence[Line]) -> list[Alarm]:
    """Return the warnings of `grpo.metrics.health` as alarms; none if the metrics lack what it reads."""
    try:
        warnings = Health(config, lines).warnings()
    except LookupError:
        return []
    out = []
    for warning in warnings:
        text, _, cause = warning["text"].partition(": ")
        out.append(
            Alarm(
                kind=warning["sign"], title=TITLES[warning["sign"]], text=text, cause=cause.removesuffix(PLACE),
                first_step=warning["first"], last_step=warning["last"], steps=warning["steps"],
            )
        )  # fmt: skip
    return out


def metric_alarms(lines: Sequence[Line]) -> list[Alarm]:
    """Return the alarms of this module about the metrics of the steps."""
    found = [
        *part_alarms(lines),
        alarm(
            "truncation", "Many completions are truncated", lines, TRUNCATED_STEPS,
            lambda line: TRUNCATED_FRACTION <= line.get("completion/truncated_fraction", 0.0) < 1,
            lambda line: f"{100 * line['completion/truncated_fraction']:.0f} % of the completions reached "
            "`sampling.max_tokens`",
            "a truncated completion rarely has its answer, so it is scored as wrong whatever it reasons: raise "
            "`sampling.max_tokens`, or see whether the completions repeat themselves",
            'finish_reason == "length"',
        ),
        *failure_alarms(lines),
        alarm(
            "mismatch_tail", "Sampler and learner disagree on some tokens", lines, MISMATCH_STEPS,
            lambda line: line.get("mismatch/q99", 0.0) >= MISMATCH_Q99,
            lambda line: f"1 % of the tokens differ by more than {line['mismatch/q99']:.2g} nats in logprob",
            "the two engines compute different probabilities (dtype, attention, quantization, or stale weights), so "
            "importance weights are far from 1: see `model.float32_head` and `algorithm.importance_high`; colour the "
            "tokens of a completion by learner minus sampler",
        ),
        alarm(
            "staleness", "Completions are of old weights", lines, STALENESS_STEPS,
            lambda line: line.get("staleness/mean", 0.0) >= STALENESS_MEAN,
            lambda line: f"completions were sampled {line['staleness/mean']:.2g} versions before they were trained on",
            "sampling lags behind the learner",
        ),
        drift_alarm(
            "entropy_collapse", "The entropy has collapsed", lines, ENTROPY_STEPS, "policy/entropy",
            lambda value, base: value <= ENTROPY_SHARE * base,
            "nats of entropy per token",
            "the policy has become almost deterministic, so the members of a group are alike and little is left to "
            "learn from: lower `optimizer.lr`, raise `algorithm.entropy_coef`, or use harder prompts",
        ),
        drift_alarm(
            "length_drift", "The length of completions has drifted", lines, LENGTH_STEPS, "completion/tokens_mean",
            lambda value, base: value >= LENGTH_RATIO * base or value * LENGTH_RATIO <= base,
            "tokens per completion",
            "the reward may favour a length rather than an answer: compare `completion/tokens_right_mean` with "
            "`completion/tokens_wrong_mean`, and read the completions",
        ),
    ]  # fmt: skip
    return [one for one in found if one is not None]


def streaks(lines: Sequence[Line], holds: Callable[[Line], bool], least: int) -> list[Line]:
    """Return the lines in which a sign holds, of streaks with at least `least` consecutive lines."""
    kept: list[Line] = []
    streak: list[Line] = []
    for line in [*lines, None]:
        if line is not None and holds(line):
            streak.append(line)
            continue
        kept += streak if len(streak) >= min(least, len(lines)) else []
        streak = []
    return kept


def alarm(
    kind: str, title: str, lines: Sequence[Line], least: int, holds: Callable[[Line], bool],
    text: Callable[[Line], str], cause: str, chosen: str = "",
) -> Alarm | None:  # fmt: skip
    """Return an alarm if the sign holds for `least` consecutive steps.

    Args:
        text: describes its last step.
        chosen: a filter for its completions.
    """
    held = streaks(lines, holds, least)
    if not held:
        return None
    last = int(held[-1]["step"])
    return Alarm(
        kind=kind, title=title, text=f"{text(held[-1])} in step {last}", cause=cause,
        first_step=int(held[0]["step"]), last_step=last, steps=len(held), filter=chosen,
    )  # fmt: skip


def drift_alarm(
    kind: str, title: str, lines: Sequence[Line], least: int, name: str, far: Callable[[float, float], bool],
    unit: str, cause: str,
) -> Alarm | None:  # fmt: skip
    """Return an alarm if a metric is far from its median over the first steps."""
    first = [line[name] for line in lines if math.isfinite(line.get(name, math.nan))][:BASELINE_STEPS]
    if not first or (base := statistics.median(first)) <= 0:
        return None
    return alarm(
        kind, title, lines, least, lambda line: name in line and far(line[name], base),
        lambda line: f"{line[name]:.3g} {unit}, and {base:.3g} at first,", cause,
    )  # fmt: skip


def part_alarms(lines: Sequence[Line]) -> Iterable[Alarm | None]:
    """Yield an alarm for each reward part that is always equal while the reward is not."""
    names = dict.fromkeys(name for line in lines for name in line)
    for name in names:
        if name.startswith("reward_part/") and name.endswith("/min"):
            yield part_alarm(lines, name.removeprefix("reward_part/").removesuffix("/min"))


def part_alarm(lines: Sequence[Line], part: str) -> Alarm | None:
    """Return an alarm if a reward part is always equal while the reward is not; `grpo.metrics.health` reports a
    constant reward."""
    low, high = f"reward_part/{part}/min", f"reward_part/{part}/max"
    return alarm(
        f"part_equal/{part}", f"The reward `{part}` is always equal", lines, PART_EQUAL_STEPS,
        lambda line: low in line and line[low] == line.get(high) and line.get("reward/min") != line.get("reward/max"),
        lambda line: f"`{part}` gave every completion {line[low]:g} and taught nothing",
        "all completions already satisfy it, or it does not find in them what it reads: compare what it extracted with "
        "the gold answer in a group",
    )  # fmt: skip


def failure_alarms(lines: Sequence[Line]) -> Iterable[Alarm | None]:
    """Yield an alarm for each kind of failure that many completions have."""
    prefix = "reward/failed_"
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
    kinds = [name.removeprefix(prefix) for name in names if name != "reward/failed_fraction"]
    for kind in kinds:
        yield failure_alarm(lines, kind, kinds)


def failure_alarm(lines: Sequence[Line], kind: str, kinds: Sequence[str]) -> Alarm | None:
    """Return an alarm if many completions fail in this way. `kinds`: all kinds of failures of the run."""

    def share(line: Line) -> float:
        total = sum(line.get(f"reward/failed_{each}", 0.0) for each in kinds)
        return line.get("reward/failed_fraction", 0.0) * line.get(f"reward/failed_{kind}", 0.0) / total if total else 0

    return alarm(
        f"failed/{kind}", f"Completions fail: {kind}", lines, FAILED_STEPS,
        lambda line: share(line) >= FAILED_FRACTION,
        lambda line: f"{100 * share(line):.1f} % of the completions failed ({kind})",
        "they have no reward and are not trained on; the page of a completion has the reason",
        f"failed == {json.dumps(kind, ensure_ascii=False)}",
    )  # fmt: skip
