"""The metrics of an evaluation, which docs/metrics.md lists, and its line on the console."""

from __future__ import annotations

from grpo.config import Config
from grpo.evaluation.statistics import Evaluation, with_bounds

OF_EVALUATION = ("accuracy", "pass_at_k", "maj_at_k", "tokens_mean", "truncated_fraction", "failed")
"""Metrics of an evaluation, logged as eval/<name>."""


def eval_names(config: Config) -> list[str]:
    """Return the names of an evaluation's metrics."""
    sets = ["", *(f"/{one.name}" for one in config.data.eval.sets if len(config.data.eval.sets) > 1)]
    return [f"eval/{name}{of_set}" for of_set in sets for name in OF_EVALUATION]


def eval_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the means over the data sets, and the metrics of each data set (if there are several) and of each part.

    `eval/failed` is a sum over the data sets. The metrics that reward functions logged are included.
    """
    sets = evaluation.sets
    out = {f"eval/{n}": sum(float(getattr(found, n)) for found in sets.values()) / len(sets) for n in OF_EVALUATION}
    out["eval/failed"] *= len(sets)  # a count, not a mean
    shown = {**(sets if len(sets) > 1 else {}), **evaluation.parts}
    out |= {f"eval/{name}": value for name, value in evaluation.logged.items()}
    return out | {f"eval/{n}/{of}": float(getattr(found, n)) for of, found in shown.items() for n in OF_EVALUATION}


def evaluation_line(evaluation: Evaluation, config: Config) -> str:
    """Return the accuracy and, if there are several data sets, that of each, with their intervals."""
    several = len(evaluation.sets) > 1
    sets = (
        f"{name}{f' {with_bounds(found.interval())}' if several else ''}, "
        f"avg@{config.data.eval.samples_of(name)} of {len(found.per_prompt)}"
        for name, found in evaluation.sets.items()
    )
    return f"accuracy {with_bounds(evaluation.interval())}: {'; '.join(sets)}"
