"""A run folder, opened to read its results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from grpo.data import nearest_path
from grpo.suggest import one_line
from grpo.types import Json, UserError

ACCURACY = "eval/accuracy"


class Run:
    """Results of a run. `grpo.Run("runs/name")` opens a finished run, or one that is still running."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UserError if `path` is no run folder."""
        self.path = Path(path).expanduser().resolve()
        """The run folder."""
        if not (self.path / "config.yaml").is_file():
            near = "" if self.path.exists() else nearest_path(self.path)
            raise UserError(f"{path} is not a run folder: it has no config.yaml{near}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def metrics(self) -> pa.Table:
        """Return metrics.jsonl as a table with one row per line. A metric that a line does not have is null.

        Raises UserError naming a damaged line.
        """
        lines = metric_lines(self.path / "metrics.jsonl")
        names = dict.fromkeys(name for line in lines for name in line)
        return pa.table({name: [line.get(name) for line in lines] for name in names})

    @property
    def samples(self) -> pa.Table:
        """Return all completions as a table with the columns of samples/*.parquet, the training steps before the
        evaluations. The first column, `kind`, is `step` or `eval`.

        Raises UserError if a file cannot be read.
        """
        files = (self.path / "samples").glob("*.parquet")
        return read_samples(sorted(files, key=lambda file: (file.name.startswith("eval"), file.name)))

    @property
    def model_path(self) -> Path:
        """Return the folder of the trained model. Raises UserError if the run has not ended with one."""
        folder = self.path / "model"
        if not folder.is_dir():
            raise UserError(f"{self.path} has no trained model: the run has not reached its last step")
        return folder

    @property
    def accuracy(self) -> float | None:
        """Return the accuracy of the last evaluation of the run, or None if there was none.

        It is the mean of the data sets' accuracies (`eval/accuracy`). Before the first evaluation after a step, it is
        the accuracy of the base model.
        """
        found = [line[ACCURACY] for line in metric_lines(self.path / "metrics.jsonl") if ACCURACY in line]
        return float(found[-1]) if found else None

    @property
    def summary(self) -> Mapping[str, Json]:
        """Return summary.json. Raises UserError if the run has not ended, or was killed."""
        try:
            summary: dict[str, Json] = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} has no summary.json: the run has not ended, or it was killed") from error
        return summary


def read_config(path: Path) -> dict[str, Json]:
    """Return a saved config. Raises UserError when it is damaged."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {one_line(error, 200)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no sections")
    return config


def metric_lines(file: Path) -> list[dict[str, float | str]]:
    """Return the lines of metrics.jsonl; none without a file. An incomplete last line is left out: it may still be
    being written.

    Raises UserError naming a damaged line.
    """
    data = file.read_bytes() if file.is_file() else b""
    lines, found = data.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            int(values["step"]), numbers(values)
            found.append(values)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if number < len(lines) or data.endswith(b"\n"):
                raise UserError(f"{file}:{number} is damaged: {line[:80]!r}") from error
    return found


def numbers(line: Mapping[str, float | str]) -> dict[str, float]:
    """Return the step and the metrics of a line. Raises an error if one of them is not a number."""
    return {name: float(value) for name, value in line.items() if name != "time"}


def read_samples(files: list[Path]) -> pa.Table:
    """Return the rows of samples files as one table, with the kind of file as the first column.

    Raises UserError if a file cannot be read.
    """
    tables = []
    for file in files:
        try:
            table = pq.read_table(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error, 200)}") from error
        kind = "step" if file.name.startswith("step") else "eval"
        tables.append(table.add_column(0, "kind", pa.array([kind] * len(table), pa.string())))
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
