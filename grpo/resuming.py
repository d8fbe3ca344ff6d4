"""From `resume=auto|PATH` to where a run goes on: which checkpoint, whether it is of the same run, and its progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo import checkpoint, run_folder
from grpo.check import Plan, model_fingerprint
from grpo.checkpoint import Manifest
from grpo.config import Config
from grpo.data import start_cursor
from grpo.progress import Progress
from grpo.saving import plain
from grpo.types import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a run comes from."""

    run: Path | None = None
    """The run folder to go on in; None for a new one."""
    checkpoint: Path | None = None
    """None: from the beginning."""
    done: bool = False
    """The run has reached its last step: there is nothing to do."""
    state: tuple[str, ...] = ()
    """What the folder held when this was decided (`state_of`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a run goes on with."""

    progress: Progress
    folder: Path | None
    """The checkpoint."""
    manifest: Manifest | None
    lines: tuple[str, ...]
    """What to say about it."""

    @property
    def step(self) -> int:
        return self.progress.step


def find(resume: str | None, config: Config, recipe: str) -> Origin:
    """The run folder and checkpoint that `resume` means.

    `auto`: the last checkpoint of the run of this name, of the newest one where the recipe's own name is numbered; a
    new run where there is none. A path: a run folder (its last checkpoint) or a checkpoint.

    Raises UserError when the path is neither.
    """
    if resume is None:
        return Origin()
    if resume == "auto":
        run = newest(config, recipe)
        if run is None:
            return Origin()
        if not (run / "config.yaml").is_file():
            raise UserError(f"resume=auto: {run} is no run folder (it has no config.yaml); choose another run.name")
        every = checkpoint.found(run)
        done = run_folder.is_done(run, config.run.steps)
        return Origin(run=run, checkpoint=every[-1] if every else None, done=done, state=state_of(run))
    path = Path(resume).expanduser().resolve()
    if path.parent.name == "checkpoints" and path in checkpoint.found(path.parent.parent):
        return Origin(run=path.parent.parent, checkpoint=path, state=state_of(path.parent.parent))
    if not (path / "checkpoints").is_dir():
        raise UserError(
            f"resume={resume} is neither a run folder nor a checkpoint (runs/NAME or .../checkpoints/step-N)"
        )
    every = checkpoint.found(path)
    if not every:
        raise UserError(
            f"resume={resume}: the run has no checkpoint (run.save_every writes them); resume=auto starts over"
        )
    done = run_folder.is_done(path, config.run.steps)
    return Origin(run=path, checkpoint=every[-1], done=done, state=state_of(path))


def state_of(run: Path) -> tuple[str, ...]:
    """What another process changes in a run's folder when it works there: checkpoints, and the end."""
    summary = run / "summary.json"
    ended = f"ended {summary.stat().st_mtime_ns}" if summary.exists() else "not ended"
    return (*(path.name for path in checkpoint.found(run)), ended)


def refuse_other_run(run: Path, config: Config, allowed: Sequence[str]) -> None:
    """A folder that `resume=auto` has found by its name must be of a run with these options.

    Raises UserError naming the first that differs.
    """
    try:
        before = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        checkpoint.compare_options(before, plain(config), allowed)
    except UserError as error:
        raise UserError(f"{run} is another run: {error}; or choose another run.name") from error
    except (OSError, ValueError, AttributeError, TypeError, LookupError, yaml.YAMLError) as error:
        raise UserError(f"{run / 'config.yaml'} is damaged: {' '.join(str(error).split())[:200]}") from error


def newest(config: Config, recipe: str) -> Path | None:
    """The folder of the run of this name."""
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
    """Whether a run folder is of the recipe of this name: `exp-2` is also what a recipe exp-2.yaml calls its first."""
    try:
        return Path((folder / run_folder.RECIPE).read_text(encoding="utf-8").strip()).stem == stem
    except OSError:
        return False


def prepare(origin: Origin, plan: Plan, allowed: Sequence[str]) -> Resumed:
    """Read the checkpoint and hold it against what the run is now.

    Raises UserError when a file of it is damaged, when it is of another run, or when it lies beyond the last step.
    """
    config = plan.config
    if origin.checkpoint is None:
        if origin.run is not None:
            if run_folder.is_done(origin.run, 0):
                raise UserError(
                    f"{origin.run} is done and has no checkpoint to go on from (run.save_every writes them); choose "
                    "another run.name"
                )
            refuse_other_run(origin.run, config, allowed)
        lines = (
            () if origin.run is None else (f"resumed    {origin.run.name} from its beginning: it has no checkpoint",)
        )
        return Resumed(progress=Progress.start(config, plan.prompts), folder=None, manifest=None, lines=lines)
    try:
        manifest = checkpoint.read(origin.checkpoint)
    except UserError as error:
        others = [path for path in checkpoint.found(origin.checkpoint.parent.parent) if path < origin.checkpoint]
        hint = f"; the checkpoint before it: resume={others[-1]}" if others else ""
        raise UserError(f"{error}{hint}") from error
    notes = checkpoint.compare(manifest, plain(config), fingerprints(plan), allowed)
    if manifest.step > config.run.steps:
        raise UserError(f"run.steps={config.run.steps} is less than the {manifest.step} steps of {origin.checkpoint}")
    return Resumed(
        progress=progress_of(manifest, plan),
        folder=origin.checkpoint,
        manifest=manifest,
        lines=(f"resumed    after step {manifest.step}, from {origin.checkpoint}", *(f"note       {n}" for n in notes)),
    )


def progress_of(manifest: Manifest, plan: Plan) -> Progress:
    """What a checkpoint says, but for what `plan` was allowed to have otherwise: other data or another order of them
    (another seed, other weights) are drawn from their beginning, and another `kl_coef` takes the adapted one's place.

    Raises UserError when the checkpoint is of another version.
    """
    config, before = plan.config, manifest.config
    same_data = manifest.fingerprints.get("data.train") == plan.fingerprints.get("data.train")
    same_order = before["data"]["seed"] == config.data.seed and weights_of(before) == weights_of(plain(config))
    anew = None if same_data and same_order else start_cursor(plan.prompts, config.data)
    try:
        progress = Progress.restore(manifest.driver, plan.prompts, anew=anew)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint of step {manifest.step} is of another version: {error!r}") from error
    if manifest.fingerprints.get("data.eval.sets") != plan.fingerprints.get("data.eval.sets") or any(
        before["data"]["eval"].get(name) != value
        for name, value in plain(config)["data"]["eval"].items()
        if name not in ("sets", "every", "by")
    ):  # what was measured otherwise is nothing to compare with
        progress.before = progress.after = progress.evaluated = None
    if before["algorithm"]["kl_coef"] != config.algorithm.kl_coef:
        progress.kl_coef = config.algorithm.kl_coef
    return progress


def weights_of(config: Mapping[str, Any]) -> list[float | None]:
    """Of the training sets."""
    return [dataset["weight"] for dataset in config["data"]["train"]]


def again(plan: Plan, run: Path) -> Resumed:
    """From the last checkpoint of the run under way, after its engines were lost."""
    folder = checkpoint.found(run)[-1]
    manifest = checkpoint.read(folder)
    return Resumed(progress=progress_of(manifest, plan), folder=folder, manifest=manifest, lines=())


def fingerprints(plan: Plan) -> dict[str, str]:
    """Of everything that the run reads. Empty of models where nothing is ever saved: reading them takes time."""
    paths = {"model.path": plan.config.model.path}
    if plan.config.critic.path is not None:
        paths["critic.path"] = plan.config.critic.path
    models = {option: model_fingerprint(path) for option, path in paths.items()}
    return {**plan.fingerprints, **models}
