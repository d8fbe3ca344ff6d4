"""Resolve `resume=auto|PATH` to a checkpoint, check that it belongs to the same run, and restore its progress."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.checks.check import CheckedRun
from grpo.checks.model_folder import model_fingerprint
from grpo.config import Config
from grpo.data import start_cursor
from grpo.run import checkpoints
from grpo.run import folder as run_folder
from grpo.run.checkpoints import Manifest
from grpo.run.progress import Progress
from grpo.run.results import read_config
from grpo.suggest import one_line
from grpo.types import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The run folder and checkpoint that a run starts from."""

    run: Path | None = None
    """The run folder to resume in; None: a new one."""
    checkpoint: Path | None = None
    """The checkpoint to resume from; None: start from the beginning."""
    done: bool = False
    """The run has reached its last step, and nothing is left to do."""
    state: tuple[str, ...] = ()
    """State of the folder (`state_of`) at the time of this decision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """State from which a run continues."""

    progress: Progress
    folder: Path | None
    """The checkpoint; None: start from the beginning."""
    manifest: Manifest | None
    lines: tuple[str, ...]
    """Lines to print about it."""

    @property
    def step(self) -> int:
        return self.progress.step


def find(resume: str | None, config: Config, recipe: str) -> Origin:
    """Return the run folder and checkpoint that `resume` refers to.

    `auto` means the last checkpoint of the run with this name, or a new run if there is none. Without `run.name`, it is
    the run with the highest number among those named after the recipe. A path is a run folder, which means its last
    checkpoint, or a checkpoint.

    Raises UserError if the path is neither, or if the run folder has no checkpoint.
    """
    if resume is None:
        return Origin()
    if resume == "auto":
        run = newest(config, recipe)
        if run is None:
            return Origin()
        if not (run / "config.yaml").is_file():
            raise UserError(f"resume=auto: {run} is not a run folder (it has no config.yaml); choose another run.name")
    else:
        run = Path(resume).expanduser().resolve()
        if run.parent.name == "checkpoints" and run in checkpoints.list_checkpoints(run.parent.parent):
            return Origin(run=run.parent.parent, checkpoint=run, state=state_of(run.parent.parent))
        if not (run / "checkpoints").is_dir():
            raise UserError(
                f"resume={resume} is neither a run folder nor a checkpoint (runs/NAME or .../checkpoints/step-N)"
            )
    every = checkpoints.list_checkpoints(run)
    if not every and resume != "auto":
        raise UserError(
            f"resume={resume}: the run has no checkpoint (run.save_every writes them); resume=auto starts over"
        )
    steps = run_folder.steps_done(run)
    done = steps is not None and steps >= config.run.steps
    return Origin(run=run, checkpoint=every[-1] if every else None, done=done, state=state_of(run))


def state_of(run: Path) -> tuple[str, ...]:
    """Return the parts of a run folder that another process working there would change: its checkpoints and its end."""
    summary = run / "summary.json"
    ended = f"ended {summary.stat().st_mtime_ns}" if summary.exists() else "not ended"
    return (*(path.name for path in checkpoints.list_checkpoints(run)), ended)


def refuse_other_run(run: Path, config: Config, allowed: Sequence[str]) -> None:
    """Refuse a folder that `resume=auto` has found by its name if its run has other options.

    Raises UserError naming the first option that differs and is not in `allowed`.
    """
    before = read_config(run / "config.yaml")
    try:
        checkpoints.compare_options(before, config, allowed)
    except UserError as error:
        raise UserError(f"{run} is another run: {error}; or choose another run.name") from error
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        raise UserError(f"{run / 'config.yaml'} is damaged: {one_line(error, 200)}") from error


def newest(config: Config, recipe: str) -> Path | None:
    """Return the folder of the run with this name, or the recipe's folder with the highest number; None if there is
    none."""
    root = Path(config.run.dir).expanduser().resolve()
    if config.run.name is not None:
        return root / config.run.name if (root / config.run.name).exists() else None
    stem = Path(recipe).stem
    numbered = {1: root / stem}
    for path in root.glob(f"{stem}-*"):
        if path.name.removeprefix(f"{stem}-").isdigit():
            numbered[int(path.name.removeprefix(f"{stem}-"))] = path
    there = [number for number, path in numbered.items() if _is_of(path, stem)]
    return numbered[max(there)] if there else None


def _is_of(folder: Path, stem: str) -> bool:
    """Return whether a run folder belongs to the recipe of this name: `exp-2` may be the second run of exp.yaml or the
    first of exp-2.yaml."""
    try:
        return Path((folder / run_folder.RECIPE).read_text(encoding="utf-8").strip()).stem == stem
    except OSError:
        return False


def prepare(origin: Origin, plan: CheckedRun, allowed: Sequence[str]) -> Resumed:
    """Read the checkpoint and compare it with the current run.

    Raises UserError if one of its files is damaged, if it belongs to another run, or if it is beyond the last step.
    """
    config = plan.config
    if origin.checkpoint is None:
        lines: tuple[str, ...] = ()
        if origin.run is not None:
            if run_folder.steps_done(origin.run) is not None:
                raise UserError(
                    f"{origin.run} is done and has no checkpoint to resume from (run.save_every writes them); choose "
                    "another run.name"
                )
            refuse_other_run(origin.run, config, allowed)
            lines = (f"resumed    {origin.run.name} from its beginning: it has no checkpoint",)
        return Resumed(progress=Progress.start(config, plan.prompts), folder=None, manifest=None, lines=lines)
    try:
        manifest = checkpoints.read(origin.checkpoint)
    except UserError as error:
        every = checkpoints.list_checkpoints(origin.checkpoint.parent.parent)
        others = [path for path in every if path < origin.checkpoint]
        hint = f"; the checkpoint before it: resume={others[-1]}" if others else ""
        raise UserError(f"{error}{hint}") from error
    notes = checkpoints.compare(manifest, config, fingerprints(plan), allowed)
    if manifest.step > config.run.steps:
        raise UserError(f"run.steps={config.run.steps} is less than the {manifest.step} steps of {origin.checkpoint}")
    return Resumed(
        progress=progress_of(manifest, plan),
        folder=origin.checkpoint,
        manifest=manifest,
        lines=(f"resumed    after step {manifest.step}, from {origin.checkpoint}", *(f"note       {n}" for n in notes)),
    )


def progress_of(manifest: Manifest, plan: CheckedRun) -> Progress:
    """Restore the progress of a checkpoint, adapted to the differences that were allowed.

    With other data or another order of the data (another seed, other weights), prompts are drawn from the beginning.
    Another `kl_coef` replaces the adapted one.

    Raises UserError if the checkpoint was written by another version.
    """
    config, saved, now = plan.config, manifest.fingerprints, plan.fingerprints
    changed = checkpoints.differences(manifest.config, checkpoints.plain(config))

    def differs(options: str) -> bool:
        return any(re.fullmatch(options, option) for option in changed)

    other_data = saved.get("data.train") != now.get("data.train") or differs(r"data\.(seed|train(\[\d+\]\.weight)?)")
    anew = start_cursor(plan.prompts, config.data) if other_data else None
    try:
        progress = Progress.restore(manifest.driver, plan.prompts, anew=anew)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint of step {manifest.step} is of another version: {error!r}") from error
    if saved.get("data.eval.sets") != now.get("data.eval.sets") or differs(r"data\.eval\.(?!(sets|every|by)\b).+"):
        progress.before = progress.after = progress.evaluated = None  # earlier results are not comparable
    if "algorithm.kl_coef" in changed:
        progress.kl_coef = config.algorithm.kl_coef
    return progress


def restore_last(plan: CheckedRun, run: Path) -> Resumed:
    """Restore from the last checkpoint of the current run, after its engines were lost."""
    folder = checkpoints.list_checkpoints(run)[-1]
    manifest = checkpoints.read(folder)
    return Resumed(progress=progress_of(manifest, plan), folder=folder, manifest=manifest, lines=())


def fingerprints(plan: CheckedRun) -> dict[str, str]:
    """Return the fingerprints of everything that the run reads: data sets, reward files and models."""
    paths = {"model.path": plan.config.model.path}
    if plan.config.critic.path is not None:
        paths["critic.path"] = plan.config.critic.path
    models = {option: model_fingerprint(path) for option, path in paths.items()}
    return {**plan.fingerprints, **models}
