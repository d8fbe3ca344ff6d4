"""The metrics of a step in the driver: its groups, the learner's result, and the duration of each part.

The numbers themselves are computed in `grpo.metrics.measures`; docs/metrics.md lists them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo.batching import Credit, TrainingRow, account, members_needed
from grpo.config import Config
from grpo.data import Cursor, MixedCursor
from grpo.metrics import measures
from grpo.objective.compatibility import GROUP_RELATIVE
from grpo.suggest import suggest
from grpo.types import Group, StepResult, UserError

if TYPE_CHECKING:
    from grpo.sync.transaction import SyncResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The groups of a step."""

    groups: tuple[Group, ...]
    """The groups to train on, at most prompts_per_step."""
    unused: tuple[Group, ...]
    """Groups that were sampled and replaced, because they had no spread or too few members."""
    attempts: int
    sample_s: float
    reward_s: float

    @property
    def sampled_groups(self) -> tuple[Group, ...]:
        return self.groups + self.unused


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The training rows of a step, the learner's result on them, and the time that both took."""

    credit: Credit
    result: StepResult
    batch_s: float
    update_s: float


def step_metrics(
    config: Config, policy_version: int, cursor: Cursor | MixedCursor, sampled: Sampled, learned: Learned
) -> dict[str, float]:
    """Return the metrics of a step, except for `timings` and `throughput`.

    Args:
        policy_version: the learner's version before the step.
        cursor: position in the data after the step's prompts were drawn.
    """
    a, credit, result = config.algorithm, learned.credit, learned.result
    rollouts = [rollout for group in sampled.sampled_groups for rollout in group.rollouts]
    learner = measures.learner_metrics(result)
    out = {
        **measures.rollout_metrics(sampled.sampled_groups, members_needed(a)),
        **measures.staleness_metrics(rollouts, policy_version),
        **learner,
        **account(credit.uses, learner),
        "optim/optimizer_steps": float(result.optimizer_steps),
        "progress/epoch": cursor.epochs,
        **{f"progress/epoch/{name}": epochs for name, epochs in cursor.epochs_by_set.items()},
    }
    if len(config.data.train) > 1:
        out |= measures.metrics_by_set(sampled.sampled_groups, members_needed(a))
    if a.advantage in GROUP_RELATIVE:
        out |= measures.spread_of("advantage/", credit.advantages, ("mean", "std", "min", "max"))
    if a.max_refills:
        out |= {
            "refill/attempts": float(sampled.attempts - 1),
            "refill/replaced_groups": float(len(sampled.unused)),
            "refill/missing_groups": float(a.prompts_per_step - len(sampled.groups)),
        }
    return out


def throughput(
    config: Config, minibatches: Sequence[Sequence[TrainingRow]], weight_bytes: int, metrics: Mapping[str, float]
) -> dict[str, float]:
    """Return the sampled tokens per second, and the learner's rate in model TFLOP/s per rank.

    Model flops are 6 per parameter and position for forward and backward, and 2 for each forward without gradient
    (arXiv 2001.08361 sec. 2.1; attention is left out). Padding and recomputation do not count.
    """
    a = config.algorithm
    rate = metrics["tokens/sampled"] / metrics["time/step_s"]
    out = {"tokens/per_second": rate}
    if config.on_gpu:
        out["tokens/per_second_per_gpu"] = rate / config.gpus_used
    parameters = weight_bytes / (4 if config.model.dtype == "float32" else 2)
    positions = sum(row.positions for rows in minibatches for row in rows)
    forwards = (a.kl_coef > 0) + (config.optimizer_steps_per_step > 1)
    flops = parameters * positions * (6 * a.epochs_per_step + 2 * forwards)
    out["perf/learner_tflops_per_rank"] = flops / metrics["time/update_s"] / config.cluster.learner_ranks / 1e12
    return out


def refuse_unknown_best(best: str | None, names: Collection[str]) -> None:
    """Raise UserError, with the nearest name, if `best`, the value of `run.keep_best`, is not in `names`."""
    if best is None or best in names:
        return
    raise UserError(f"run.keep_best={best} is not a metric of this run{suggest(best, names)}")


def full_check_metrics(sync: SyncResult) -> dict[str, float]:
    """Return the metrics of the full check of a weight sync, the worst group of parameters; empty if it had none."""
    if not sync.movement_errors:
        return {}
    return {"sync/movement_error": max(sync.movement_errors), "time/full_check_s": sync.full_check_s}


def full_check_line(sync: SyncResult) -> str:
    """Return the result of a full check in words."""
    count = len(sync.movement_errors)
    groups = f"worst of {count} groups of parameters" if count > 1 else "one group of parameters"
    return (
        f"weights: the samplers follow the learner: under perturbed weights their logprobs differ by "
        f"{max(sync.movement_errors):.2g} of its movement ({groups}; full check, {sync.full_check_s:.1f} s)"
    )


def timings(
    sampled: Sampled, learned: Learned, sync: SyncResult, started: float, synced: float, ended: float
) -> dict[str, float]:
    """Return the timings of a step and the metrics of its weight sync.

    The step ran from `started` to `ended`, and its weight sync began at `synced`. The idle time is the time in which no
    role worked. A role's busy fraction is the share of the step in which it worked.
    """
    parts = {
        "sample": sampled.sample_s,
        "reward": sampled.reward_s,
        "batch": learned.batch_s,
        "update": learned.update_s,
        "sync": ended - synced,
    }
    whole = ended - started
    return {
        "sync/seconds": sync.seconds,
        "sync/bytes": float(sync.nbytes),
        "sync/probe_rms": sync.probe.rms,
        "sync/probe_q90": sync.probe.q90,
        "sync/noise_rms": sync.noise.rms,
        "sync/noise_q90": sync.noise.q90,
        **full_check_metrics(sync),
        **{f"time/{name}_s": seconds for name, seconds in parts.items()},
        "time/idle_s": whole - sum(parts.values()),
        "time/step_s": whole,
        "time/samplers_busy_fraction": (parts["sample"] + parts["sync"]) / whole,
        "time/learner_busy_fraction": (parts["update"] + parts["sync"]) / whole,
    }
