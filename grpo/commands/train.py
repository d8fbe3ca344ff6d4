"""`grpo train`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from grpo import config as config_module
from grpo.config import Config
from grpo.run.signals import signals_delayed
from grpo.types import ExitCode

if TYPE_CHECKING:
    from grpo.run.resume import Origin


def train_command(config: Config, recipe: Path, asked: Mapping[str, str]) -> ExitCode:
    """Check a recipe and run it. Return the exit code. `asked`: the values of `resume` and `allow`, if given."""
    started = time.monotonic()
    origin: Origin | None = None
    allowed = [name for name in asked.get("allow", "").split(",") if name]
    for name in allowed:
        config_module.refuse_unknown(name, f"allow={name}")
    try:
        # the imports take seconds, and only after them is it known whether the run can be resumed
        with signals_delayed():
            from grpo.checks.environment import check_environment  # noqa: PLC0415 - before the rest is imported

            check_environment(print_progress)
            from grpo.lifecycle import train as lifecycle  # noqa: PLC0415
            from grpo.run import resume  # noqa: PLC0415

            origin = resume.find(asked.get("resume"), config, str(recipe))
        if line := lifecycle.done_before(config, origin, allowed):
            print(line)
            return ExitCode.DONE
        plan, resumed = lifecycle.check_run(config, recipe, origin, allowed, print_progress)
    except KeyboardInterrupt:
        if origin is None or origin.checkpoint is None:
            raise
        print(f"grpo: interrupted before anything was started; resume it with resume={origin.run}", file=sys.stderr)
        return ExitCode.RESUMABLE
    return lifecycle.train(plan, resumed, origin, recipe, started).code


def print_progress(text: str) -> None:
    """Print progress to stderr, before there is a console."""
    print(text, file=sys.stderr, flush=True)
