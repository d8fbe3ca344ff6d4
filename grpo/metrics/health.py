"""Signs that a run learns nothing, detected in the metrics of its steps; docs/look.md lists them.

A sign is reported once it has held for as many consecutive steps as its threshold, or for all steps of a shorter run.
It is reported once in the console, then at the end and in summary.json with the steps in which it held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from grpo.config import Config
from grpo.objective.compatibility import GROUP_RELATIVE

CONSTANT_REWARD_STEPS = 3
NO_SPREAD_STEPS = 5
NO_SPREAD_FRACTION = 0.95
ZERO_GRADIENT_STEPS = 3
ZERO_LR_STEPS = 3
TRUNCATED_STEPS = 3
"""Thresholds: consecutive steps, and the share of groups without spread that counts as all of them."""

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign that a run learns nothing."""

    name: str
    steps: int
    """Consecutive steps after which it is reported."""
    holds: Callable[[Config, Metrics], bool]
    describe: Callable[[Config, Metrics], str]
    """Returns the observation and its likely cause."""


class SignWarning(TypedDict):
    """A reported sign, as summary.json has it."""

    sign: str
    first: int
    """First step in which it held."""
    last: int
    steps: int
    """Number of steps in which it held."""
    text: str
    """Its description at the last of them."""


class Health:
    """Follows the metrics of a run and records the steps in which each sign held."""

    def __init__(self, config: Config, lines: Iterable[Metrics] = ()) -> None:
        """`lines`: lines of metrics.jsonl from the steps before a resume. Signs in them are recorded, not printed."""
        self._config = config
        self._held: dict[str, list[int]] = {sign.name: [] for sign in SIGNS}
        self._texts: dict[str, str] = {}
        self._reported: set[str] = set()
        for line in lines:
            self.see(int(line["step"]), line)

    def see(self, step: int, metrics: Metrics) -> list[str]:
        """Record the metrics of a step; return the warnings to print now."""
        if "group/count" not in metrics:  # an evaluation's line
            return []
        said = []
        for sign in SIGNS:
            if not sign.holds(self._config, metrics):
                continue
            held = self._held[sign.name]
            held.append(step)
            self._texts[sign.name] = sign.describe(self._config, metrics)
            needed = min(sign.steps, self._config.run.steps)
            if sign.name not in self._reported and held[-needed:] == list(range(step - needed + 1, step + 1)):
                self._reported.add(sign.name)
                since = f"the last {needed} steps" if needed > 1 else f"step {step}"
                said.append(f"warning: in {since} {self._texts[sign.name]}")
        return said

    def warnings(self) -> list[SignWarning]:
        """Return every reported sign."""
        return [
            {"sign": name, "first": held[0], "last": held[-1], "steps": len(held), "text": self._texts[name]}
            for name, held in self._held.items()
            if name in self._reported
        ]


def warning_line(warning: SignWarning, steps: int) -> str:
    """Return an entry of `Health.warnings` as one line, for the end of a run of `steps` steps."""
    return f"warning: in {warning['steps']} of {steps} steps {warning['text']}"


PLACE = "; the completions are in samples/"
"""End of a warning on the console."""


def _constant_reward(config: Config, metrics: Metrics) -> bool:
    return "reward/min" in metrics and metrics["reward/min"] == metrics["reward/max"]


def _why_constant(config: Config, metrics: Metrics) -> str:
    value = metrics["reward/mean"]
    varying = [
        name.split("/")[1]
        for name in metrics
        if name.startswith("reward_part/")
        and name.endswith("/min")
        and name.count("/") == 2  # entries of a mapping have no weights
        and metrics[name] != metrics[name[:-3] + "max"]
    ]
    if varying:
        cause = f"the values of {', '.join(varying)} differ, and their weights are 0 or cancel (rewards[i].weight)"
    elif metrics["completion/truncated_fraction"] == 1:
        cause = f"all were truncated at sampling.max_tokens={config.sampling.max_tokens}, perhaps before the answer"
    elif value > 0:
        cause = "the model solves the task already, or the reward does not depend on the completion"
    else:
        cause = (
            "the task is too hard for this model, the prompt does not ask for what the reward reads, or the reward "
            "does not depend on the completion"
        )
    return f"every completion got the reward {value:g}, so nothing is learned: {cause}{PLACE}"


def _no_spread(config: Config, metrics: Metrics) -> bool:
    relative = config.algorithm.advantage in GROUP_RELATIVE and not config.algorithm.max_refills
    share = metrics.get("group/no_spread_fraction", 0.0)
    return relative and share >= NO_SPREAD_FRACTION and not _constant_reward(config, metrics)


def _why_no_spread(config: Config, metrics: Metrics) -> str:
    right = metrics["group/all_right_fraction"]
    return (
        f"{metrics['group/no_spread_fraction']:.0%} of the groups had one reward for all members, so nothing was "
        f"learned from them: the prompts are too easy or too hard for this model ({right:.0%} all right), or the "
        "reward depends on the prompt alone; algorithm.max_refills replaces such groups, data.train[i].between "
        "filters by difficulty"
    )


def _zero_gradient(config: Config, metrics: Metrics) -> bool:
    return metrics.get("optim/grad_norm", 0.0) == 0.0


CAUSES = {
    "failed": "they failed or their groups were too small to compare",
    "truncated": "algorithm.mask_truncated excludes completions that were truncated at sampling.max_tokens",
    "no_spread": "the rewards within each group are equal",
    "stale": "an older policy sampled them",
    "zero_advantage": "their advantage is 0",
    "stopped": "the updates were skipped (not finite, or beyond algorithm.max_kl_old)",
    "mismatch_masked": "the bounds on the importance weights exclude them (algorithm.importance_*, rejection_*)",
    "clipped": "the clip stops their gradient (algorithm.eps_low, eps_high)",
    "contributing": "they reached the loss, and its gradient is 0",
}
"""Column of the account of sampled tokens (`gradient/*`) -> why its tokens change no weight."""


def _why_zero(config: Config, metrics: Metrics) -> str:
    column = max(CAUSES, key=lambda name: metrics.get(f"gradient/{name}", 0.0))
    share = metrics.get(f"gradient/{column}", 0.0) / max(1.0, metrics.get("gradient/sampled", 0.0))
    return f"the gradient was 0: {share:.0%} of the sampled tokens changed no weight, because {CAUSES[column]}"


def _zero_lr(config: Config, metrics: Metrics) -> bool:
    return config.optimizer.lr == 0


def _truncated(config: Config, metrics: Metrics) -> bool:
    return metrics["completion/truncated_fraction"] == 1


def _why_truncated(config: Config, metrics: Metrics) -> str:
    return (
        f"every completion was truncated at sampling.max_tokens={config.sampling.max_tokens}: that is too few, or the "
        "model never writes an end token (sampling.stop, sampling.stop_token_ids, the chat template)"
    )


SIGNS = (
    Sign("constant_reward", CONSTANT_REWARD_STEPS, _constant_reward, _why_constant),
    Sign("no_spread", NO_SPREAD_STEPS, _no_spread, _why_no_spread),
    Sign("zero_gradient", ZERO_GRADIENT_STEPS, _zero_gradient, _why_zero),
    Sign("zero_lr", ZERO_LR_STEPS, _zero_lr, lambda config, metrics: "no weight could change: optimizer.lr is 0"),
    Sign("all_truncated", TRUNCATED_STEPS, _truncated, _why_truncated),
)
