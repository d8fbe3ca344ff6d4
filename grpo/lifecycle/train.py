"""A training, from a loaded recipe to its summary.

    run.resume.find    the run folder and the checkpoint to start from
    check_run          everything that is known before an engine starts
    open_folder        the run folder
    run                reward workers, Ray, engines, the loop, shutdown; restarted when engines are lost
    train              summary.json and the last lines

Every outcome becomes an `Outcome`, a reason in summary.json and a last line. A command returns its exit code, and
Python callers get its error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo import data, driver
from grpo.checks import check
from grpo.checks.check import CheckedRun
from grpo.cluster import actors, engines
from grpo.cluster import session as cluster
from grpo.cluster.reward_workers import SpreadPool
from grpo.config import Config
from grpo.evaluation.statistics import Interval, paired_gain, with_bounds
from grpo.metrics.health import Health, warning_line
from grpo.rewards import functions
from grpo.rewards.pool import RewardPool
from grpo.run import checkpoints, resume, sessions
from grpo.run import folder as run_folder
from grpo.run.console import Console
from grpo.run.folder import RunFolder
from grpo.run.heartbeat import waiting
from grpo.run.results import metric_lines, numbers
from grpo.run.resume import Origin, Resumed
from grpo.run.saving import Saver
from grpo.run.signals import Stopper, interrupt_early
from grpo.run.timeline import Timeline
from grpo.sampler.settings import eval_settings, train_settings
from grpo.types import EngineFailure, ExitCode, Json, RewardOutage, UserError

STDERR = 2
"""File descriptor. In a notebook, sys.stderr has none."""
PATIENCE_S = 30.0
"""Time that a cluster may take to release the resources of a failed attempt, or to notice a lost node, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training that is ready to start."""

    plan: CheckedRun
    resumed: Resumed
    folder: RunFolder
    console: Console
    stopper: Stopper


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a training has ended."""

    run: Path
    """The run folder."""
    code: ExitCode
    reason: str
    error: Exception | None = None
    """The error that ended it; None if it is done, or if a signal stopped it."""
    resumable: bool = False
    """It has a checkpoint."""


def done_before(config: Config, origin: Origin, allowed: Sequence[str]) -> str:
    """Return a line about the run to resume if it has no steps left, else "".

    Raises UserError if it has other options.
    """
    if not origin.done or origin.run is None:
        return ""
    resume.refuse_other_run(origin.run, check.resolve_paths(config), allowed)
    return f"{origin.run} is done: it has {run_folder.steps_done(origin.run)} steps; to continue it: run.steps=N"


def check_run(
    config: Config,
    recipe: Path,
    origin: Origin,
    allowed: Sequence[str],
    say: Callable[[str], None],
    written: Path | None = None,
) -> tuple[CheckedRun, Resumed]:
    """Check the recipe, the cluster and the checkpoint.

    Args:
        say: Receives the progress.
        written: Folder with the files of reward functions that were given as Python objects.

    Raises UserError.
    """
    config = check.resolve_paths(config)
    if origin.run is None:
        run_folder.choose(config, str(recipe))  # refuses a name that is in use before the checks, which take longer
    with cluster.session(config, None), tempfile.TemporaryDirectory(prefix="grpo-check-") as log_dir:
        interrupt_early()  # joining a cluster has replaced our signal handlers with Ray's
        plan = check.check(config, recipe, Path(log_dir), say=say, written=written)
    return plan, resume.prepare(origin, plan, allowed)


def train(plan: CheckedRun, resumed: Resumed, origin: Origin, recipe: Path, started: float) -> Outcome:
    """Open the run folder, train, and write the summary. `started`: time.monotonic()."""
    config = plan.config
    folder = open_folder(plan, resumed, origin, recipe)
    begun = sessions.begin(folder.path, time.monotonic() - started)
    files = functions.keep(config.rewards, plan.reward_files, folder.path)
    plan = dataclasses.replace(plan, reward_files=files)
    with Console(steps=config.run.steps, log=folder.path / "log.txt") as console:
        # a handler may run in the middle of a console line, so it writes to stderr directly
        stopper = Stopper(config.run.grace_s, lambda text: os.write(STDERR, f"{text}\n".encode()))
        training = Training(plan=plan, resumed=resumed, folder=folder, console=console, stopper=stopper)
        outcome = run_and_report(training)
        summary: dict[str, Json] = {
            "recipe": str(recipe),
            "seed": config.run.seed,
            "versions": run_folder.versions(),
            "fingerprints": dict(plan.fingerprints),
            **folder.facts,
            "wall_s": round(time.monotonic() - started, 3),
            "exit_reason": outcome.reason,
        }
        seconds = [time.monotonic() - started]
        try:
            seconds = sessions.end(folder.path, begun, seconds[0])
            summary |= {"wall_s_all_sessions": round(sum(seconds), 3), "sessions": len(seconds)}
            folder.write_summary(summary)
        except OSError as error:
            console.say(f"grpo: also, summary.json could not be written: {error}")
        for warning in folder.facts["warnings"]:
            console.say(warning_line(warning, folder.facts["steps"]))
        if outcome.code == ExitCode.DONE and "accuracy_gain" in folder.facts:
            console.say(accuracy_line(folder))
        console.say(sessions.wall_line(seconds))
        console.say(f"run folder {folder.path}")
        for line in folder.close_trackers(failed=outcome.code != ExitCode.DONE):
            console.say(f"grpo: also, {line}")
    return outcome


def open_folder(plan: CheckedRun, resumed: Resumed, origin: Origin, recipe: Path) -> RunFolder:
    """Create the run folder, or reopen it at the step from which the run continues."""
    if origin.run is None:
        folder = run_folder.create(plan.given, str(recipe))
    else:
        run, seen = origin.run, origin.state
        folder = run_folder.reopen(run, plan.given, resumed.step, lambda: resume.state_of(run) == seen)
        folder.facts |= resumed.progress.accuracies()
    if plan.dropped:
        run_folder.write_text(folder.path / "dropped_prompts.txt", "\n".join(plan.dropped) + "\n")
    return folder


def run_and_report(training: Training) -> Outcome:
    """Run to any outcome and report it."""
    folder, console, stopper = training.folder, training.console, training.stopper
    stopper.install()
    code, reason, stopped, passing, full = ExitCode.INTERNAL, "failed", "", False, False
    began = training.resumed.step  # copied: the loop advances it
    cause: Exception | None = None
    try:
        plan = training.plan
        described = plan.lines if training.resumed.manifest is None else plan.repeated_lines
        for line in (*described, *training.resumed.lines):
            console.say(line)
        finished = run_with_restarts(training)
        folder.close()
        if finished:
            return Outcome(run=folder.path, code=ExitCode.DONE, reason="done")
        stopped = f"interrupted by {stopper.asked}"
    except UserError as error:
        code, reason, cause = ExitCode.USAGE, f"failed: {error}", error
        passing = isinstance(error, RewardOutage)
        console.say(f"grpo: {error}")
    except KeyboardInterrupt:  # Stopped, or an exception that Ray raises for it
        stopped = f"interrupted by {stopper.asked}"
    except Exception as error:  # noqa: BLE001 - any error is shown, recorded and turned into exit code 1
        # C code may turn Stopped into its own error; a signal to the whole job also ends the engines
        if stopper.enforced or (stopper.asked and isinstance(error, EngineFailure)):
            stopped = f"interrupted by {stopper.asked}"
            keep_traceback(folder.path)
        elif run_folder.is_disk_full(error):
            stopped, full, cause = f"stopped by a full disk: {error}", True, error
            run_folder.drop_unfinished(folder.path)
        else:
            reason, passing, cause = f"failed: {error}", isinstance(error, EngineFailure), error
            console.say(f"grpo: {type(error).__name__}: {error}\n{keep_traceback(folder.path)}")
    finally:
        stopper.uninstall()
    every = checkpoints.list_checkpoints(folder.path)
    hint = f"resume it with resume={folder.path}" if every else "there is no checkpoint to resume from"
    newest = (run_folder.step_of(every[-1]) or 0) if every else 0
    further = newest > began  # an attempt that fails without making progress does not end with 75
    if stopped:
        code, reason = ExitCode.RESUMABLE if every and (further or not full) else ExitCode.INTERNAL, stopped
        console.say(f"grpo: {reason}; {hint}")
    elif every:
        code = ExitCode.RESUMABLE if passing and further else code
        console.say(f"grpo: the state after step {newest} is saved; {hint}")
    try:
        folder.close()
    except Exception as error:  # noqa: BLE001 - reported in addition to the first failure, which stays the reason
        console.say(f"grpo: also, a file could not be written: {error}")
    return Outcome(run=folder.path, code=code, reason=reason, error=cause, resumable=bool(every))


def keep_traceback(path: Path) -> str:
    """Write the traceback of the current exception to the run folder. Return a text with its path, or with the
    traceback itself if it cannot be written."""
    target = path / "logs" / "driver-traceback.txt"
    try:
        target.write_text(traceback.format_exc())
    except OSError as error:
        return f"(its traceback could not be written: {error})\n{traceback.format_exc()}"
    return f"(traceback in {target})"


def run_with_restarts(training: Training) -> bool:
    """Call `run`, and restart it from the last checkpoint when engines are lost, up to `cluster.max_restarts` times.

    Returns whether the run has finished. Raises EngineFailure when the engines cannot be restarted.
    """
    plan, folder = training.plan, training.folder
    lost: EngineFailure | None = None
    began = training.resumed.step
    for left in range(plan.config.cluster.max_restarts, -1, -1):
        try:
            return run(training, patience_s=PATIENCE_S if lost else 0.0)
        except UserError as error:  # after the loss, the cluster may be too small
            if lost is None or folder.facts["steps"] > began:  # unrelated to the loss
                raise
            raise EngineFailure(f"{lost}; the engines cannot be restarted: {error}") from error
        except EngineFailure as error:
            lost = error
            if training.stopper.asked or not left or not checkpoints.list_checkpoints(folder.path):
                raise
            training = dataclasses.replace(training, resumed=resume.restore_last(plan, folder.path))
            began = training.resumed.step
            training.console.say(f"{error}\n{keep_traceback(folder.path)}; restarting the engines after step {began}")
            folder.rewind(plan.config, began)
            folder.facts |= training.resumed.progress.accuracies()
    raise AssertionError("the last attempt returns or raises")


def run(training: Training, *, patience_s: float) -> bool:
    """Start what the plan needs, train, and shut everything down. Results are stored in the facts of the folder.

    Returns whether the run has finished; otherwise it was stopped between two steps.
    """
    plan, folder, console = training.plan, training.folder, training.console
    config, logs, spread = plan.config, folder.path / "logs", plan.config.cluster.reward_nodes > 0
    with contextlib.ExitStack() as stack:
        if not spread:  # the workers load while Ray starts
            scorer: RewardPool | SpreadPool = stack.enter_context(
                RewardPool(config.rewards, files=plan.reward_files, workers=config.reward_workers, log_dir=logs)
            )
        dashboard = stack.enter_context(cluster.session(config, logs, patience_s=patience_s, say=console.say))
        if spread:
            scorer = stack.enter_context(SpreadPool(config, plan.reward_files, logs))
        if config.run.prometheus:
            folder.export(cluster.exporter(folder.path.name))
        training.stopper.install()  # Ray has replaced our signal handlers
        console.say(f"starting {config.cluster.samplers} samplers and {config.cluster.learner_ranks} learner ranks")
        timeline = Timeline(folder.path / "trace" if config.run.trace else None)
        with waiting("start", "the engines to load", console.say):
            group = engines.Engines(config, logs, console.say, timeline)
        reward_hosts = scorer.hosts(config.cluster.start_timeout_s) if isinstance(scorer, SpreadPool) else {}
        folder.facts["nodes"] = group.hosts | reward_hosts
        console.say(placed(folder.facts["nodes"], dashboard))
        try:
            if training.resumed.manifest is not None and training.resumed.folder is not None:
                group.state.restore(training.resumed.folder, training.resumed.manifest.learner)
            loop = loop_of(training, group, scorer, timeline)
            actors.freeze_garbage()
            with training.stopper.finishing_steps():
                outcome = driver.train(loop)
        finally:
            folder.facts["nodes"] |= group.hosts  # a replacement sampler may run on another host
            group.close()
    if not outcome.finished:
        return False
    folder.facts["weights_sha256"] = run_folder.weights_sha256(folder.path / "model")
    if outcome.before is not None and outcome.after is not None:
        gain, low, high = paired_gain(outcome.before, outcome.after)
        folder.facts |= {"accuracy_gain": gain, "accuracy_gain_interval": [low, high]}
    return True


def loop_of(
    training: Training, group: engines.Engines, scorer: RewardPool | SpreadPool, timeline: Timeline
) -> driver.Loop:
    """Assemble the parts of the training loop."""
    plan, folder, console, stopper = training.plan, training.folder, training.console, training.stopper
    health = Health(plan.config, map(numbers, metric_lines(folder.path / "metrics.jsonl")))
    folder.facts["warnings"] = health.warnings()
    saver = Saver(
        plan.config,
        folder.path,
        engines=group.state,
        fingerprints=functools.cache(lambda: resume.fingerprints(plan)),
        flush=folder.flush,
        say=console.say,
    )
    return driver.Loop(
        config=plan.config,
        prompts=plan.prompts,
        eval_prompts=plan.eval_prompts,
        engines=group,
        scorer=scorer,
        timeline=timeline,
        folder=folder,
        reporter=console,
        decode=functools.partial(data.completion_texts, plan.tokenizer),
        train_settings=train_settings(plan.config, plan.end_token_ids),
        eval_settings=eval_settings(plan.config, plan.end_token_ids),
        progress=training.resumed.progress,
        saver=saver,
        stopping=lambda: stopper.asked is not None,
        health=health,
    )


def placed(hosts: Mapping[str, str], dashboard: str) -> str:
    """Return a line that lists the engines on each host."""
    by_host: dict[str, list[str]] = {}
    for name, host in hosts.items():
        by_host.setdefault(host, []).append(name)
    where = "; ".join(f"{', '.join(names)} on {host}" for host, names in by_host.items())
    return f"placed     {where}" + (f"; dashboard {dashboard}" if dashboard else "")


def accuracy_line(folder: RunFolder) -> str:
    """Return the line about the accuracy before and after the run."""
    facts = folder.facts
    before, after, gain = (
        with_bounds(Interval(mean=facts[name], low=low, high=high))
        for name in ("accuracy_before", "accuracy_after", "accuracy_gain")
        for low, high in [facts.get(f"{name}_interval", (math.nan, math.nan))]
    )
    return f"accuracy {before} -> {after}, gain {gain}, with 95 % intervals"
