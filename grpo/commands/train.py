"""`grpo train`: check, start Ray and the engines, run the loop, and report the outcome.

This module owns the order of start and shutdown, and turns every outcome into an exit code, a reason in summary.json
and a last line. It restarts lost engines from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo import config as config_module
from grpo.config import Config
from grpo.run.signals import Stopper, interrupt_early, signals_delayed
from grpo.types import EngineFailure, ExitCode, RewardOutage, UserError

PATIENCE_S = 30.0
"""Time that a cluster may take to release the resources of a failed attempt, or to notice a lost node, in seconds."""


def train_command(config: Config, recipe: Path, asked: Mapping[str, str]) -> int:
    """Run `grpo train`: check, start Ray and the engines, run the loop, report the outcome. Return the exit code.

    `asked`: the values of `resume` and `allow`, if given.
    """
    started = time.monotonic()
    origin: Any = None
    allowed = [name for name in asked.get("allow", "").split(",") if name]
    for name in allowed:
        config_module.refuse_unknown(name, f"allow={name}")
    try:
        # the imports take seconds, and only after them is it known whether the run can be resumed
        with signals_delayed():
            from grpo.checks import check  # noqa: PLC0415
            from grpo.cluster import session as cluster  # noqa: PLC0415
            from grpo.run import folder as run_folder  # noqa: PLC0415
            from grpo.run import resume as resuming  # noqa: PLC0415

            origin = resuming.find(asked.get("resume"), config, str(recipe))
        config = check.resolve_paths(config)
        if origin.done and origin.run is not None:
            resuming.refuse_other_run(origin.run, config, allowed)
            print(f"{origin.run} is done: it has {run_folder.steps_done(origin.run)} steps; more of them: run.steps=N")
            return ExitCode.DONE
        if origin.run is None:
            run_folder.choose(config, str(recipe))  # refuses a name that is in use before the checks, which take longer
        with cluster.session(config, None), tempfile.TemporaryDirectory(prefix="grpo-check-") as log_dir:
            interrupt_early()  # joining a cluster has replaced our signal handlers with Ray's
            plan = check.check(config, recipe, Path(log_dir), say=print_progress)
        resumed = resuming.prepare(origin, plan, allowed)
    except KeyboardInterrupt:
        if origin is None or origin.checkpoint is None:
            raise
        print(f"grpo: interrupted before anything was started; go on with resume={origin.run}", file=sys.stderr)
        return ExitCode.RESUMABLE
    if origin.run is None:
        folder = run_folder.create(config, str(recipe))
    else:
        run, seen = origin.run, origin.state
        folder = run_folder.reopen(run, config, resumed.step, lambda: resuming.state_of(run) == seen)
        folder.facts |= resumed.progress.accuracies()
    path = folder.path
    if plan.dropped:
        run_folder.write_text(path / "dropped_prompts.txt", "\n".join(plan.dropped) + "\n")
    from grpo.run.console import Console  # noqa: PLC0415

    with Console(steps=config.run.steps, log=path / "log.txt") as console:
        code, reason = run_and_report(plan, resumed, folder, console)
        summary = {
            "recipe": str(recipe),
            "seed": config.run.seed,
            "versions": run_folder.versions(),
            "fingerprints": dict(plan.fingerprints),
            **folder.facts,
            "wall_s": round(time.monotonic() - started, 3),
            "exit_reason": reason,
        }
        try:
            folder.write_summary(summary)
        except OSError as error:
            console.say(f"grpo: besides, summary.json could not be written: {error}")
        report(summary, path, console, code)
    return code


def run_and_report(plan: Any, resumed: Any, folder: Any, console: Any) -> tuple[int, str]:
    """Run to any outcome and report it. Return the exit code and the reason for the summary."""
    from grpo.run import checkpoints as checkpoint  # noqa: PLC0415
    from grpo.run import folder as run_folder  # noqa: PLC0415

    # a handler may run in the middle of a console line, so it writes to stderr directly
    stopper = Stopper(plan.config.run.grace_s, lambda text: os.write(sys.stderr.fileno(), f"{text}\n".encode()))
    stopper.install()
    code, reason, stopped, passing, full = ExitCode.INTERNAL, "failed", "", False, False
    began = resumed.step  # copied: the loop advances it
    try:
        for line in (*plan.lines, *resumed.lines):
            console.say(line)
        finished = run_with_restarts(plan, resumed, folder, console, stopper)
        folder.close()
        if finished:
            return ExitCode.DONE, "done"
        stopped = f"interrupted by {stopper.asked}"
    except UserError as error:
        code, reason, passing = ExitCode.USAGE, f"failed: {error}", isinstance(error, RewardOutage)
        console.say(f"grpo: {error}")
    except KeyboardInterrupt:  # Stopped, or an exception that Ray raises for it
        stopped = f"interrupted by {stopper.asked}"
    except Exception as error:  # noqa: BLE001 - any error is shown, recorded and turned into exit code 1
        # C code may turn Stopped into its own error; a signal to the whole job also ends the engines
        if stopper.enforced or (stopper.asked and isinstance(error, EngineFailure)):
            stopped = f"interrupted by {stopper.asked}"
            keep_traceback(folder.path)
        elif run_folder.is_disk_full(error):
            stopped, full = f"stopped by a full disk: {error}", True
            run_folder.drop_unfinished(folder.path)
        else:
            reason, passing = f"failed: {error}", isinstance(error, EngineFailure)
            console.say(f"grpo: {type(error).__name__}: {error}\n{keep_traceback(folder.path)}")
    finally:
        stopper.uninstall()
    every = checkpoint.list_checkpoints(folder.path)
    hint = f"go on with resume={folder.path}" if every else "there is no checkpoint to go on from"
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
        console.say(f"grpo: besides, a file could not be written: {error}")
    return code, reason


def keep_traceback(path: Path) -> str:
    """Write the traceback of the current exception to the run folder. Return a text with its path, or with the
    traceback itself if it cannot be written."""
    target = path / "logs" / "driver-traceback.txt"
    try:
        target.write_text(traceback.format_exc())
    except OSError as error:
        return f"(its traceback could not be written: {error})\n{traceback.format_exc()}"
    return f"(traceback in {target})"


def run_with_restarts(plan: Any, resumed: Any, folder: Any, console: Any, stopper: Stopper) -> bool:
    """Call `run`, and restart it from the last checkpoint when engines are lost, up to `cluster.max_restarts` times.

    Returns whether the run has finished. Raises EngineFailure when the engines cannot be restarted.
    """
    from grpo.run import checkpoints as checkpoint  # noqa: PLC0415
    from grpo.run import resume as resuming  # noqa: PLC0415

    lost: EngineFailure | None = None
    began = resumed.step
    for left in range(plan.config.cluster.max_restarts, -1, -1):
        try:
            return run(plan, resumed, folder, console, stopper, patience_s=PATIENCE_S if lost else 0.0)
        except UserError as error:  # after the loss, the cluster may be too small
            if lost is None or folder.facts["steps"] > began:  # unrelated to the loss
                raise
            raise EngineFailure(f"{lost}; the engines cannot be started again: {error}") from error
        except EngineFailure as error:
            lost = error
            if stopper.asked or not left or not checkpoint.list_checkpoints(folder.path):
                raise
            resumed = resuming.restore_last(plan, folder.path)
            began = resumed.step
            console.say(f"{error}\n{keep_traceback(folder.path)}; starting the engines again after step {resumed.step}")
            folder.rewind(plan.config, resumed.step)
            folder.facts |= resumed.progress.accuracies()
    raise AssertionError("the last attempt returns or raises")


def run(plan: Any, resumed: Any, folder: Any, console: Any, stopper: Stopper, *, patience_s: float) -> bool:
    """Start what the plan needs, train, and shut everything down. Results are stored in the facts of the folder.

    Returns whether the run has finished; otherwise it was stopped between two steps.
    """
    from grpo import driver  # noqa: PLC0415
    from grpo.cluster import actors, engines  # noqa: PLC0415
    from grpo.cluster import session as cluster  # noqa: PLC0415
    from grpo.cluster.reward_workers import SpreadPool  # noqa: PLC0415
    from grpo.evaluation.statistics import paired_gain  # noqa: PLC0415
    from grpo.rewards.pool import RewardPool  # noqa: PLC0415
    from grpo.run import folder as run_folder  # noqa: PLC0415
    from grpo.run.timeline import Timeline  # noqa: PLC0415

    config = plan.config
    logs = folder.path / "logs"
    with contextlib.ExitStack() as stack:
        files, spread = plan.reward_files, config.cluster.reward_nodes > 0
        scorer: Any = None
        if not spread:  # the workers load while Ray starts
            pool = RewardPool(config.rewards, files=files, workers=config.reward_workers, log_dir=logs)
            scorer = stack.enter_context(pool)
        dashboard = stack.enter_context(cluster.session(config, logs, patience_s=patience_s, say=console.say))
        if spread:
            scorer = stack.enter_context(SpreadPool(config, files, logs))
        if config.run.prometheus:
            folder.export(cluster.exporter(folder.path.name))
        stopper.install()  # Ray has replaced our signal handlers
        console.say(f"starting {config.cluster.samplers} samplers and {config.cluster.learner_ranks} learner ranks")
        timeline = Timeline(folder.path / "trace" if config.run.trace else None)
        group = engines.Engines(config, logs, console.say, timeline)
        folder.facts["nodes"] = group.hosts | (scorer.hosts(config.cluster.start_timeout_s) if spread else {})
        console.say(placed(folder.facts["nodes"], dashboard))
        try:
            if resumed.manifest is not None:
                group.restore(resumed.folder, resumed.manifest.learner)
            loop = loop_of(plan, resumed, group, scorer, timeline, folder, console, stopper)
            actors.freeze_garbage()
            with stopper.finishing_steps():
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
    plan: Any, resumed: Any, group: Any, scorer: Any, timeline: Any, folder: Any, console: Any, stopper: Stopper
) -> Any:
    """Assemble the parts of the training loop."""
    from grpo import data, driver  # noqa: PLC0415
    from grpo.cluster import engines  # noqa: PLC0415
    from grpo.metrics.health import Health  # noqa: PLC0415
    from grpo.run.timeline import TimedScorer  # noqa: PLC0415

    health = Health(plan.config, folder.metrics())
    folder.facts["warnings"] = health.warnings()
    return driver.Loop(
        config=plan.config,
        prompts=plan.prompts,
        eval_prompts=plan.eval_prompts,
        engines=group,
        scorer=TimedScorer(scorer, timeline),
        timeline=timeline,
        folder=folder,
        reporter=console,
        decode=functools.partial(data.completion_texts, plan.tokenizer),
        train_settings=engines.train_settings(plan.config, plan.end_token_ids),
        eval_settings=engines.eval_settings(plan.config, plan.end_token_ids),
        progress=resumed.progress,
        saver=saver_of(plan, folder, group, console),
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


def saver_of(plan: Any, folder: Any, group: Any, console: Any) -> Any:
    """Return the saver that writes the checkpoints of the run."""
    from grpo.run import resume as resuming  # noqa: PLC0415
    from grpo.run.saving import Saver  # noqa: PLC0415

    return Saver(
        plan.config,
        folder.path,
        engines=group,
        fingerprints=functools.cache(lambda: resuming.fingerprints(plan)),
        flush=folder.flush,
        say=console.say,
    )


def report(summary: dict[str, Any], path: Path, console: Any, code: int) -> None:
    """Print the last lines: warnings, the accuracy gain, and the run folder."""
    from grpo.metrics.health import warning_line  # noqa: PLC0415

    for warning in summary["warnings"]:
        console.say(warning_line(warning, summary["steps"]))
    if code == ExitCode.DONE and "accuracy_gain" in summary:
        low, high = summary["accuracy_gain_interval"]
        console.say(
            f"accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f} "
            f"(gain {summary['accuracy_gain']:.3f}, 95 % interval {low:.3f} to {high:.3f})"
        )
    console.say(f"run folder {path}")


def print_progress(text: str) -> None:
    """Print progress to stderr, before there is a console."""
    print(text, file=sys.stderr, flush=True)
