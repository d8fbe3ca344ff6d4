"""Validation rules between the options of the data section."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from grpo.config.rules import inert, need
from grpo.config.schema import Config
from grpo.config.schema_data import DatasetConfig, TrainSetConfig


def validate_data(c: Config) -> None:
    """Validate the section data and the options that depend on it.

    Raises UserError at the first invalid option.
    """
    need(
        c.data.system_prompt is None or c.data.messages_column is None,
        "data.system_prompt has no effect when data.messages_column gives the turns; leave it out",
    )
    need(c.data.date is None or _is_day(c.data.date), f"data.date={c.data.date} must be a day as in 2026-01-31")
    validate_gold(c)
    need(len(c.data.train) > 0, "data.train is empty: give at least one data set, as a path or {path: train.jsonl}")
    for option, sets in (("data.train", c.data.train), ("data.eval.sets", c.data.eval.sets)):
        for i, dataset in enumerate(sets):
            _validate_set(f"{option}[{i}]", dataset)
    _validate_weights(c.data.train)


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def validate_gold(c: Config) -> None:
    """Raise UserError if `data.gold_template` is set and every reward has `gold: false`.

    `gold: null` counts as possibly true, since the reward file decides.
    """
    if all(reward.gold is False for reward in c.rewards):
        inert(c, "data.gold_template", "without a reward that has gold: true")


def _validate_set(option: str, dataset: DatasetConfig) -> None:
    need(dataset.name != "", f"{option}.name must not be empty; leave it out for the path's own name")
    for column, bounds in dataset.between.items():
        need(
            len(bounds) == 2 and bounds[0] <= bounds[1],
            f"{option}.between.{column} must be [lowest, highest], not {bounds}",
        )


def _validate_weights(sets: Sequence[TrainSetConfig]) -> None:
    weights = [dataset.weight for dataset in sets]
    if all(weight is None for weight in weights):
        return
    need(len(sets) > 1, "data.train[0].weight has no effect with one data set; leave it out")
    for i, weight in enumerate(weights):
        need(
            weight is not None,
            f"data.train[{i}].weight is missing while other data sets have weights: give one to all of them or to none",
        )
