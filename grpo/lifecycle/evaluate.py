"""An evaluation, from a loaded recipe to its result: check, look up what was evaluated before, sample the rest."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.checks import check
from grpo.checks.check import CheckedRun
from grpo.checks.model_folder import model_fingerprint
from grpo.cluster import engines
from grpo.cluster import session as cluster
from grpo.config import Config
from grpo.lifecycle import evaluation_folder
from grpo.lifecycle.evaluation_folder import SetResult
from grpo.rewards import functions
from grpo.rewards.pool import RewardPool
from grpo.run.console import Console
from grpo.run.heartbeat import waiting
from grpo.run.signals import interrupt_early
from grpo.run.timeline import Timeline
from grpo.types import ExitCode, Prompt, RewardOutage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an evaluation has ended."""

    folder: Path
    code: ExitCode
    sets: Mapping[str, SetResult]
    """Data set -> its result; empty if the evaluation was stopped."""
    error: Exception | None = None
    """The error that stopped it; None if it is done, or if a signal stopped it."""


def check_evaluation(
    config: Config, recipe: Path | None, overrides: Sequence[str], written: Path | None = None
) -> CheckedRun:
    """Check the recipe and the cluster. Without a recipe, options that are not in `overrides` are chosen by the model
    and the data. `written`: folder with the files of reward functions that were given as Python objects.

    Raises UserError.
    """
    overridden = None if recipe else [text.partition("=")[0].lstrip("+") for text in overrides]
    config = check.resolve_paths(config)
    with cluster.session(config, None), tempfile.TemporaryDirectory(prefix="grpo-check-") as log_dir:
        interrupt_early()  # joining a cluster has replaced our signal handlers with Ray's
        where = recipe or Path("command line")
        return check.check_evaluation(config, where, Path(log_dir), written=written, overridden=overridden)


def evaluate(plan: CheckedRun, model: str, out: Path) -> Outcome:
    """Evaluate the prompts that have not been evaluated, and print the result.

    `out`: folder of the evaluations. What has been sampled is kept when the evaluation is interrupted.
    """
    key = evaluation_folder.key_of(plan, model_fingerprint(plan.config.model.path))
    folder = evaluation_folder.folder_of(out.expanduser().resolve(), evaluation_folder.name_of(model), key)
    with evaluation_folder.opened(folder, key, plan), Console(steps=0, log=folder / "log.txt") as console:
        files = functions.keep(plan.config.rewards, plan.reward_files, folder)
        plan = dataclasses.replace(plan, reward_files=files)
        left = evaluation_folder.unfinished(plan, folder, console.say)
        if not left:
            console.say(f"evaluated before: {folder}")
            sets = evaluation_folder.conclude(plan, folder)
        else:
            begun = sum(map(len, left.values())) < len(plan.eval_prompts)
            for line in plan.repeated_lines if begun else plan.lines:
                console.say(line)
            try:
                sets = sample(plan, folder, left, console)
            except KeyboardInterrupt:
                console.say("grpo: interrupted; the samples are kept, and the same command continues")
                return Outcome(folder=folder, code=ExitCode.RESUMABLE, sets={})
            except RewardOutage as error:
                done, _ = evaluation_folder.survey(plan, folder)  # removes nothing: failed completions can be read
                kept = len(done) + sum(map(len, left.values())) - len(plan.eval_prompts)
                console.say(f"grpo: {error}")
                console.say(f"grpo: {kept} prompts have been evaluated and are kept; the same command continues")
                code = ExitCode.RESUMABLE if kept else ExitCode.USAGE
                return Outcome(folder=folder, code=code, sets={}, error=error)
        for line in evaluation_folder.report(sets):
            console.say(line)
        console.say(f"evaluation {folder}")
    return Outcome(folder=folder, code=ExitCode.DONE, sets=sets)


def sample(
    plan: CheckedRun, folder: Path, left: Mapping[str, Sequence[Prompt]], console: Console
) -> dict[str, SetResult]:
    """Start samplers and reward workers, evaluate the prompts of `left`, and shut them down. Return the results."""
    config, logs = plan.config, folder / "logs"
    with (
        RewardPool(config.rewards, files=plan.reward_files, workers=config.reward_workers, log_dir=logs) as scorer,
        cluster.session(config, logs),
    ):
        interrupt_early()  # Ray has replaced our signal handlers
        console.say(f"starting {config.cluster.samplers} samplers")
        with waiting("start", "the samplers to load", console.say):
            group = engines.Engines(config, logs, console.say, Timeline(None))
        try:
            return evaluation_folder.evaluate(plan, folder, left, group, scorer, console.say)
        finally:
            group.close()
