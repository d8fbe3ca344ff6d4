"""Signs that a run learns nothing, on metrics made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_driver import make_config

from grpo.metrics.health import (
    CAUSES,
    CONSTANT_REWARD_STEPS,
    NO_SPREAD_STEPS,
    TRUNCATED_STEPS,
    ZERO_GRADIENT_STEPS,
    Health,
    warning_line,
)

GOOD = {
    "group/count": 4.0, "reward/min": 0.0, "reward/max": 1.0, "reward/mean": 0.5, "group/no_spread_fraction": 0.25,
    "group/all_right_fraction": 0.25, "completion/truncated_fraction": 0.0, "optim/grad_norm": 0.3,
    "gradient/sampled": 100.0, "gradient/contributing": 100.0,
}  # fmt: skip
CONSTANT = {"reward/min": 0.0, "reward/max": 0.0, "reward/mean": 0.0, "group/no_spread_fraction": 1.0}
NO_SPREAD = {"group/no_spread_fraction": 0.95}
ZERO = {"optim/grad_norm": 0.0, "gradient/contributing": 10.0, "gradient/no_spread": 90.0}
CUT = {"completion/truncated_fraction": 1.0}


def lines(*steps: dict[str, float]) -> list[dict[str, Any]]:
    return [{"step": i, "time": "2026-01-01", **GOOD, **changed} for i, changed in enumerate(steps, start=1)]


def said(health: Health, every: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Step -> what was said after it."""
    told = {line["step"]: health.see(line["step"], {k: v for k, v in line.items() if k != "time"}) for line in every}
    return {step: words for step, words in told.items() if words}


@pytest.mark.parametrize(
    ("sign", "changed", "needed"),
    [
        ("constant_reward", CONSTANT, CONSTANT_REWARD_STEPS),
        ("no_spread", NO_SPREAD, NO_SPREAD_STEPS),
        ("zero_gradient", ZERO, ZERO_GRADIENT_STEPS),
        ("all_truncated", CUT, TRUNCATED_STEPS),
    ],
)
def test_a_sign_is_said_once_when_it_has_held_long_enough(
    sign: str, changed: dict[str, float], needed: int, tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    health = Health(config)
    every = lines({}, *[changed] * (needed - 1), {}, *[changed] * needed, {}, *[changed] * needed)
    assert list(said(health, every)) == [2 * needed + 1]  # not after the first row, which is one step too short
    [warning] = health.warnings()
    assert warning["sign"] == sign
    assert (warning["first"], warning["last"], warning["steps"]) == (2, 3 * needed + 2, 3 * needed - 1)
    assert warning_line(warning, 25).startswith(f"warning: in {3 * needed - 1} of 25 steps ")


def test_a_shorter_run_is_judged_whole(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=2")
    assert list(said(Health(config), lines(CONSTANT, CONSTANT))) == [2]
    assert said(Health(config), lines(CONSTANT, {})) == {}
    assert list(said(Health(make_config(tmp_path, "run.steps=1")), lines(CONSTANT))) == [1]


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    every = lines(*[CONSTANT] * (CONSTANT_REWARD_STEPS + 1))
    evaluated = [{"step": 0, "time": "x", "eval/accuracy": 0.5}]
    again = Health(config, evaluated + every[:-2])
    assert list(said(again, every[-2:])) == [CONSTANT_REWARD_STEPS]
    assert [warning["first"] for warning in again.warnings()] == [1]
    assert said(Health(config, every[:-1]), every[-1:]) == {}  # it was said before
    assert Health(config, every).warnings()[0]["steps"] == CONSTANT_REWARD_STEPS + 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "the task is too hard for this model"),
        ({"reward/min": 1.0, "reward/max": 1.0, "reward/mean": 1.0}, "the model solves the task already"),
        (CUT, "truncated at sampling.max_tokens=6"),
        ({"reward_part/a/min": 0.0, "reward_part/a/max": 1.0}, "the values of a differ"),
        ({"reward_part/a/length/min": 0.0, "reward_part/a/length/max": 1.0}, "the task is too hard for this model"),
    ],
)
def test_the_likely_cause_of_a_constant_reward(changed: dict[str, float], words: str, tmp_path: Path) -> None:
    health = Health(make_config(tmp_path, "run.steps=1"))
    [constant, *_] = said(health, lines({**CONSTANT, **changed}))[1]
    assert words in constant


@pytest.mark.parametrize("column", CAUSES)
def test_a_gradient_of_0_names_where_the_tokens_went(column: str, tmp_path: Path) -> None:
    used = {f"gradient/{name}": 20.0 if name == column else 10.0 for name in CAUSES}
    health = Health(make_config(tmp_path, "run.steps=1"))
    [words] = said(health, lines({**used, "optim/grad_norm": 0.0, "gradient/sampled": 100.0}))[1]
    assert f"20% of the sampled tokens changed no weight, because {CAUSES[column]}" in words


def test_methods_without_groups_need_no_spread_in_them(tmp_path: Path) -> None:
    for options in (("algorithm.advantage=reinforce_pp",), ("algorithm.max_refills=2",)):
        config = make_config(tmp_path, *options)
        assert said(Health(config), lines(*[NO_SPREAD] * (NO_SPREAD_STEPS + 2))) == {}
