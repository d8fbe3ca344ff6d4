"""The files of a run, read while it trains: metrics, summary, config, and the list of its samples files.

A file that resolves to a path outside the run folder is refused. A damaged file is reported in one sentence, and the
rest of the run is still shown.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import threading
import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grpo import config as config_module
from grpo.config import Config
from grpo.suggest import suggest
from grpo.types import Json, Unchecked, UserError

SAMPLES_NAME = re.compile(r"(step-|eval-)?(\d{1,12})")
"""Stem of a samples file; those of `grpo eval` have only a number."""
RECENT_S = 300.0
"""A run without a summary whose files changed within this time is taken to be running, if its lock is not visible."""
MAX_FOOTERS = 10_000
"""Maximum number of samples files whose number of rows is remembered."""
MAX_SMALL_FILE = 64 << 20
"""Maximum bytes of a JSON or YAML file that is read whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesFile:
    """One samples file."""

    stem: str
    kind: str
    """`step` or `eval`."""
    step: int | None
    """None for the files of `grpo eval`, which have no step."""
    path: Path


@dataclass(slots=True)
class Metrics:
    """The lines of metrics.jsonl as columns."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, array[float]] = field(default_factory=dict)
    """name -> one value per step; NaN where a step does not have the metric. May be shorter than `steps`."""
    times: list[str] = field(default_factory=list)
    """Times of the first and the last line."""
    problem: str | None = None
    """Sentence about the first damaged line."""

    def add(self, line: dict[str, Json]) -> None:
        """Add a line. A second line of a step, as an evaluation may write, is merged with the first.

        Raises ValueError, LookupError or TypeError if the line is damaged.
        """
        step = line.pop("step")
        if type(step) is not int or not -(2**63) <= step < 2**63:
            raise ValueError("step is no integer")
        values = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        when = line.get("time")
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        at = len(self.steps) - 1
        for name, value in values.items():
            column = self.columns.setdefault(name, array("d"))
            while len(column) <= at:
                column.append(math.nan)
            column[at] = value
        if isinstance(when, str):
            self.times = [self.times[0] if self.times else when, when]

    def series(self, name: str) -> list[float | None]:
        """Return the values of a metric, one per step; None where a step has no finite value."""
        column = self.columns.get(name, array("d"))
        values = [value if math.isfinite(value) else None for value in column]
        return values + [None] * (len(self.steps) - len(values))

    def lines(self) -> list[dict[str, float]]:
        """Return name -> value for each step, with `step`."""
        out: list[dict[str, float]] = [{"step": step} for step in self.steps]
        for name, column in self.columns.items():
            for line, value in zip(out, column, strict=False):
                if not math.isnan(value):
                    line[name] = value
        return out


class RunFiles:
    """The files of one run folder."""

    def __init__(self, path: Path) -> None:
        """`path`: a folder with config.yaml or metrics.jsonl."""
        self.path = path.resolve()
        self.name = self.path.name
        self._metrics = Metrics()
        self._read_to, self._inode = 0, -1
        self._lines = 0
        self._lock = threading.Lock()
        self._footers: OrderedDict[tuple[str, int, int], int] = OrderedDict()
        self._config: tuple[tuple[int, int], Config] | None = None

    def inside(self, path: Path) -> Path:
        """Return `path` if it is inside the run folder, with links followed. Raises UserError otherwise."""
        if not path.resolve().is_relative_to(self.path):
            raise UserError(f"{path} is a link to a file outside the run folder; the viewer does not follow it")
        return path

    def metrics(self) -> Metrics:
        """Return metrics.jsonl. Only lines that were added since the last call are read. Thread-safe: what is returned
        does not change any more.

        A last line that is not complete is left for the next call. A resumed run replaces the file, which is then
        read from the start.
        """
        with self._lock:
            self._metrics = self._read_metrics()
            return self._metrics

    def _read_metrics(self) -> Metrics:
        file = self.path / "metrics.jsonl"
        try:
            opened = self.inside(file).open("rb")
        except (OSError, UserError) as error:
            self._read_to, self._inode = 0, -1
            return Metrics(problem=None if isinstance(error, FileNotFoundError) else str(error))
        with opened:
            status = os.fstat(opened.fileno())
            if status.st_ino == self._inode and status.st_size == self._read_to:
                return self._metrics
            found = copy.deepcopy(self._metrics)
            if status.st_ino != self._inode or status.st_size < self._read_to:
                found, self._read_to, self._inode, self._lines = Metrics(), 0, status.st_ino, 0
            opened.seek(self._read_to)
            for line in opened:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                self._lines += 1
                try:
                    values = json.loads(line)
                    if not isinstance(values, dict):
                        raise ValueError("no mapping")
                    found.add(values)
                except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
                    found.problem = found.problem or f"{file}:{self._lines} is damaged and left out: {line[:80]!r}"
        return found

    def read_json(self, name: str) -> Json:
        """Return the content of a JSON file of the folder; None if there is none. Raises UserError if it is damaged."""
        file = self.path / name
        try:
            if self.inside(file).stat().st_size > MAX_SMALL_FILE:
                raise UserError(f"{file} is larger than {MAX_SMALL_FILE} bytes")
            found: Json = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error
        return found

    def summary(self) -> dict[str, Json]:
        """Return summary.json; empty if there is none. Raises UserError if it is damaged."""
        found = self.read_json("summary.json")
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise UserError(f"{self.path / 'summary.json'} is damaged: it is no mapping")
        return found

    def config(self) -> Config | None:
        """Return the config of the run; None without config.yaml. Raises UserError if it cannot be read."""
        file = self.path / "config.yaml"
        if not file.exists():
            return None
        status = self.inside(file).stat()
        if status.st_size > MAX_SMALL_FILE:
            raise UserError(f"{file} is larger than {MAX_SMALL_FILE} bytes")
        key = status.st_mtime_ns, status.st_size
        if self._config is None or self._config[0] != key:
            try:
                self._config = key, config_module.read_dump(file)
            except Exception as error:  # OmegaConf has errors of its own, and a damaged file may raise any
                raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
        return self._config[1]

    def samples(self) -> list[SamplesFile]:
        """Return the samples files, training steps first, by step."""
        found = []
        for path in (self.path / "samples").glob("*.parquet"):
            if named := SAMPLES_NAME.fullmatch(path.stem):
                kind = "step" if named[1] == "step-" else "eval"
                step = int(named[2]) if named[1] else None
                found.append(SamplesFile(stem=path.stem, kind=kind, step=step, path=path))
        return sorted(found, key=lambda one: (one.kind == "eval", int(re.sub(r"\D", "", one.stem)), one.stem))

    def samples_file(self, stem: str) -> SamplesFile:
        """Return the samples file with this stem. Raises NotFoundError with the nearest name otherwise."""
        files = {one.stem: one for one in self.samples()}
        if stem not in files:
            raise NotFoundError(f"{self.name} has no samples file {stem[:80]!r}{suggest(stem[:80], [*files])}")
        return files[stem]

    def rows(self, file: SamplesFile) -> int | None:
        """Return the number of rows of a samples file; None if it cannot be read."""
        try:
            status = file.path.stat()
            key = (file.stem, status.st_mtime_ns, status.st_size)
            if key not in self._footers:
                self._footers[key] = pq.read_metadata(self.inside(file.path)).num_rows
                if len(self._footers) > MAX_FOOTERS:
                    self._footers.popitem(last=False)
            return self._footers[key]
        except (pa.ArrowException, OSError, ValueError, UserError):
            return None

    def state(self, summary: dict[str, Json]) -> str:
        """Return `done`, `failed`, `stopped`, `running` or `unknown`. `summary`: the content of summary.json."""
        reason = summary.get("exit_reason")
        if isinstance(reason, str):
            return "done" if reason == "done" else "failed" if reason.startswith("failed") else "stopped"
        if self._locked() or self._age_s() < RECENT_S:
            return "running"
        return "unknown"

    def _locked(self) -> bool:
        """Return whether a process of this machine holds the lock of the folder; read without touching the lock."""
        try:
            inode = (self.path / ".lock").stat().st_ino
            with open("/proc/locks", encoding="ascii") as locks:
                return any(f":{inode} " in line and "FLOCK" in line for line in locks)
        except OSError:
            return False

    def _age_s(self) -> float:
        """Return the seconds since the metrics, samples or log of the run changed."""
        newest = 0.0
        for name in ("metrics.jsonl", "samples", "log.txt"):
            try:
                newest = max(newest, (self.path / name).stat().st_mtime)
            except OSError:
                continue
        return time.time() - newest

    def changed(self) -> str:
        """Return a token that changes when metrics, samples or summary do."""
        marks = []
        for name in ("metrics.jsonl", "samples", "summary.json", "trace"):
            try:
                status = (self.path / name).stat()
                marks.append(f"{status.st_mtime_ns:x}.{status.st_size:x}")
            except OSError:
                marks.append("-")
        return "_".join(marks)


class NotFoundError(UserError):
    """What was asked for does not exist (status 404)."""


def open_runs(paths: list[Path]) -> list[RunFiles]:
    """Return the runs in the order of the command line. A folder of runs stands for its runs, by name.

    Raises UserError when a path is neither a run nor a folder of runs.
    """
    found: list[Path] = []
    for given in paths:
        path = given.expanduser()
        if is_run(path):
            found.append(path)
            continue
        if not path.is_dir():
            near = (
                suggest(path.name, {one.name: str(one) for one in path.parent.iterdir()})
                if path.parent.is_dir()
                else ""
            )
            raise UserError(f"{given} does not exist{near}" if not path.exists() else f"{given} is no folder")
        inside = sorted(one for one in path.iterdir() if is_run(one))
        if not inside:
            raise UserError(
                f"{given} is not a run folder: it has neither config.yaml nor metrics.jsonl, and no run in it"
            )
        found += inside
    unique = dict.fromkeys(path.resolve() for path in found)
    return [RunFiles(path) for path in unique]


def is_run(path: Path) -> bool:
    """Return whether a folder is a run, or an evaluation by `grpo eval`."""
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def number(value: Unchecked) -> float | None:
    """Return a finite number as it is, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
