"""`grpo eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from grpo import config as config_module
from grpo.checks.environment import check_environment
from grpo.commands.train import print_progress
from grpo.lifecycle.model_names import model_of


def evaluate_command(parsed: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate a model, and print its results. Return the exit code."""
    model, recipe = model_of(parsed.model)
    recipe = config_module.find_recipe(parsed.recipe) if parsed.recipe else recipe
    config = config_module.load_for_evaluation(
        recipe, model=model, data=parsed.data, rewards=parsed.reward, overrides=overrides
    )
    check_environment(print_progress)
    from grpo.lifecycle.evaluate import check_evaluation, evaluate  # noqa: PLC0415 - imports what is checked above

    plan = check_evaluation(config, recipe, overrides)
    return evaluate(plan, model, parsed.out).code
