"""The Python face: `grpo.train`, `grpo.evaluate` and `grpo.load_config`.

They run the same sequences as the commands. A command turns an outcome into an exit code; these functions return a
result or raise.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from grpo import config as config_module
from grpo.cluster.session import write_to_stderr
from grpo.config import Config, Recipe, Reward, Value
from grpo.lifecycle import evaluate as evaluation
from grpo.lifecycle import train as training
from grpo.lifecycle.model_names import model_of
from grpo.rewards import functions
from grpo.rewards.pickling import RewardFunction
from grpo.run import resume as resuming
from grpo.run.results import Run, read_samples
from grpo.run.signals import handlers_kept
from grpo.types import ExitCode, Interrupted, Json, UserError

UNNAMED = Path("python")
"""Stands for the path of a recipe that is not a file. Its runs are runs/python, runs/python-2 and so on."""

__all__ = ["EvaluationResult", "Run", "UserError", "evaluate", "load_config", "train"]
_busy = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Result of `grpo.evaluate`."""

    path: Path
    """The folder of the evaluation."""
    sets: Mapping[str, Mapping[str, Json]]
    """Data set -> its statistics, as in evaluation.json: `avg`, `pass@<k>` and `maj` with intervals, and counts."""

    @property
    def samples(self) -> pa.Table:
        """Return all completions as a table, as `Run.samples` does."""
        return read_samples(sorted((self.path / "samples").glob("*.parquet")))


def load_config(recipe: Recipe, overrides: Mapping[str, Value] | None = None) -> Config:
    """Return the config of a recipe: the value of every option, validated as far as no other file is needed.

    Args:
        recipe: Path of a YAML file, the name of a built-in recipe, the sections as a mapping, or a config.
        overrides: `section.option` -> value, as in {"run.steps": 10, "rewards[0].weight": 0.5}.

    Raises UserError naming the file or option at fault.
    """
    return config_module.load(recipe, config_module.override_texts(overrides or {}))


def train(
    recipe: Recipe,
    overrides: Mapping[str, Value] | None = None,
    *,
    rewards: Sequence[RewardFunction | str | Path] | None = None,
    resume: str | Path | None = None,
    allow: Sequence[str] = (),
) -> Run:
    """Train as `grpo train` does, and return the finished run.

    Any thread may call it, while no other training or evaluation runs in the process. A signal stops the run only if
    it is in the main thread.

    Args:
        recipe: Path of a YAML file, the name of a built-in recipe, the sections as a mapping, or a config.
        overrides: `section.option` -> value, as in {"run.steps": 10, "rewards[0].weight": 0.5}.
        rewards: Used instead of the rewards of the recipe: functions, or paths of reward files. Functions are sent by
            value to the reward workers. Their style (grpo, trl or verl) is that of their parameters.
        resume: "auto", or a run folder or checkpoint to resume from.
        allow: Options that may differ from those of the resumed run.

    Raises:
        UserError: A mistake of the user.
        KeyboardInterrupt: A signal has stopped the run. The message names the run folder and says how to resume.
        Exception: The error that has ended the run. Its notes name the run folder.
    """
    started = time.monotonic()
    _refuse_single("rewards", rewards)
    _refuse_single("allow", allow)
    with _only_one(), tempfile.TemporaryDirectory(prefix="grpo-rewards-") as written:
        for name in allow:
            config_module.refuse_unknown(name, f"allow={name}")
        if allow and resume is None:
            raise UserError("allow is only for a resumed run: add resume='auto' or resume=PATH")
        own = None if rewards is None else _written(rewards, Path(written))
        config = config_module.load(recipe, config_module.override_texts(overrides or {}), own)
        path = _path_of(recipe)
        origin = resuming.find(None if resume is None else str(resume), config, str(path))
        if origin.run is not None and (line := training.done_before(config, origin, allow)):
            write_to_stderr(line)
            return Run(origin.run)
        try:
            plan, resumed = training.check_run(config, path, origin, allow, write_to_stderr, Path(written))
        except KeyboardInterrupt as error:
            if origin.checkpoint is None:
                raise
            raise Interrupted(f"interrupted before anything was started; {_how_to_resume(origin.run)}") from error
        return _finished(training.train(plan, resumed, origin, path, started))


def evaluate(
    model: str | Path | Run,
    recipe: Recipe | None = None,
    overrides: Mapping[str, Value] | None = None,
    *,
    data: Sequence[str | Path] = (),
    rewards: Sequence[RewardFunction | str | Path] = (),
    out: str | Path = "evals",
) -> EvaluationResult:
    """Evaluate a model on held-out data as `grpo eval` does. What was evaluated before is not sampled again.

    Args:
        model: Folder in Hugging Face layout, hub id, or a run, which stands for its final model.
        recipe: Recipe with the data, rewards and settings. None: that of the run, or none.
        overrides: `section.option` -> value.
        data: Paths of data sets, used instead of data.eval.sets.
        rewards: Functions, or paths of reward files, used instead of the rewards of the recipe.
        out: Folder of the evaluations.

    Raises UserError, KeyboardInterrupt and others like `train`.
    """
    _refuse_single("data", data)
    _refuse_single("rewards", rewards)
    with _only_one(), tempfile.TemporaryDirectory(prefix="grpo-rewards-") as written:
        path, recipe_of_run = model_of(str(model.path if isinstance(model, Run) else model))
        chosen = recipe_of_run if recipe is None else recipe
        texts = config_module.override_texts(overrides or {})
        config = config_module.load_for_evaluation(
            chosen,
            model=path,
            data=[str(one) for one in data],
            rewards=_written(rewards, Path(written)),
            overrides=texts,
        )
        plan = evaluation.check_evaluation(config, None if chosen is None else _path_of(chosen), texts, Path(written))
        outcome = evaluation.evaluate(plan, path, Path(out))
        if outcome.error is not None:
            raise outcome.error
        if outcome.code != ExitCode.DONE:
            raise Interrupted(
                f"the evaluation was interrupted; {outcome.folder} has what was sampled, and the same call resumes it"
            )
        return EvaluationResult(path=outcome.folder, sets={n: found.as_json() for n, found in outcome.sets.items()})


@contextmanager
def _only_one() -> Iterator[None]:
    """Refuse a second training or evaluation in this process, and leave the process as it was.

    Raises UserError when another one is running.
    """
    if not _busy.acquire(blocking=False):
        raise UserError(
            "another training or evaluation is running in this process; wait for it, or use another process"
        )
    frozen = gc.get_freeze_count()
    try:
        with handlers_kept():
            yield
    finally:
        if not frozen:  # the run has excluded its objects from garbage collections
            gc.unfreeze()
        _busy.release()


def _written(rewards: Sequence[RewardFunction | str | Path], folder: Path) -> list[Reward]:
    """Write the files of the functions among `rewards` into `folder`. Return the section `rewards` of a recipe."""
    sections: list[Reward] = []
    for i, reward in enumerate(rewards):
        if isinstance(reward, str | Path):
            sections.append(str(reward))
        elif callable(reward):
            sections.append(functions.write(reward, i, folder))
        else:
            raise UserError(f"rewards[{i}] is a {type(reward).__name__}; give a function or the path of a reward file")
    return sections


def _refuse_single(name: str, values: Sequence[RewardFunction | str | Path] | None) -> None:
    """Raise UserError for a value instead of a list of values: the letters of a string would be its items."""
    if isinstance(values, str | Path) or callable(values):
        shown = repr(str(values)) if isinstance(values, str | Path) else "function"
        raise UserError(f"{name} is a list: give {name}=[{shown}]")


def _path_of(recipe: Recipe) -> Path:
    return config_module.find_recipe(recipe) if isinstance(recipe, str | Path) else UNNAMED


def _finished(outcome: training.Outcome) -> Run:
    """Return the finished run. Raises the error that has ended it, or Interrupted."""
    how = _how_to_resume(outcome.run) if outcome.resumable else f"{outcome.run} has no checkpoint to resume from"
    if outcome.error is not None:
        outcome.error.add_note(f"The run has ended; {how}")
        raise outcome.error
    if outcome.code != ExitCode.DONE:
        raise Interrupted(f"{outcome.reason}; {how}")
    return Run(outcome.run)


def _how_to_resume(run: Path | None) -> str:
    return f"resume it with grpo.train(..., resume={str(run)!r})"
