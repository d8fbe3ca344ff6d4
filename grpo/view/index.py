"""What is remembered about the groups of each samples file, so that a prompt is found again over the steps."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from grpo.evaluation.answers import final_answer
from grpo.types import UserError
from grpo.view.files import RunFiles, SamplesFile
from grpo.view.rows import Groups, load, rewards_of, schema_of, statistics_of

MAX_GROUPS = 500_000
"""Maximum number of groups that are remembered, of all files; the files that were used last are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    """The groups of one file."""

    prompt_ids: pa.Array
    """[N]"""
    datasets: pa.Array
    """[N]"""
    groups: Groups
    mean: NDArray[np.float64]
    """[N] mean reward; NaN without a scored completion."""
    failed: NDArray[np.int64]
    """[N] number of failed completions."""


class Index:
    """Indices of the samples files of a run. Thread-safe."""

    def __init__(self, files: RunFiles) -> None:
        self._files = files
        self._known: OrderedDict[tuple[str, int, int], FileIndex] = OrderedDict()
        self._groups = 0
        self._lock = threading.Lock()

    def of(self, file: SamplesFile) -> FileIndex:
        """Return the index of a file. Raises UserError when the file is damaged."""
        status = file.path.stat()
        key = (file.stem, status.st_mtime_ns, status.st_size)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        made = make_index(self._files, file)
        with self._lock:
            if key not in self._known:
                self._known[key] = made
                self._groups += len(made.mean)
            while self._groups > MAX_GROUPS and len(self._known) > 1:
                self._groups -= len(self._known.popitem(last=False)[1].mean)
        return made

    def all(self) -> Iterator[tuple[SamplesFile, FileIndex]]:
        """Yield every samples file that can be read, with its index."""
        for file in self._files.samples():
            try:
                yield file, self.of(file)
            except (UserError, FileNotFoundError):  # shown on the page of the file; or a resume has removed it
                continue


def make_index(files: RunFiles, file: SamplesFile) -> FileIndex:
    """Return the index of a file, read from the disk. Raises UserError when the file is damaged."""
    schema = schema_of(files, file)
    table, groups = load(files, file, ("dataset", "failed"), schema)
    count, rows = len(groups.starts), len(table)
    first = pa.array(groups.starts)
    missing = pa.nulls(count, pa.string())
    failed = ~table["failed"].is_null().to_numpy() if "failed" in table.column_names else np.zeros(rows, dtype=np.bool_)
    return FileIndex(
        prompt_ids=table["prompt_id"].combine_chunks().take(first),
        datasets=table["dataset"].combine_chunks().take(first) if "dataset" in table.column_names else missing,
        groups=groups,
        mean=statistics_of(rewards_of(table), groups)[2],
        failed=np.add.reduceat(failed, groups.starts, dtype=np.int64) if count else np.zeros(0, np.int64),
    )


def disagreement(files: RunFiles, file: SamplesFile) -> tuple[int, int]:
    """Return how many completions end with the gold answer and got the lowest reward of the file, and how many have a
    reward and a gold answer. Raises UserError when the file is damaged.

    If all rewards are equal and above 0, no completion counts.
    """
    table, _ = load(files, file, ("extracted", "gold"))
    if not {"extracted", "gold"} <= {*table.column_names}:
        return 0, 0
    rewards = rewards_of(table)
    known = ~np.isnan(rewards) & ~table["gold"].is_null().to_numpy()
    if not known.any():
        return 0, 0
    low, high = np.nanmin(rewards), np.nanmax(rewards)
    lowest = np.flatnonzero(known & (rewards == low)) if low < high or low <= 0 else np.zeros(0, np.int64)
    wrong = table.select(["extracted", "gold"]).take(pa.array(lowest)).to_pylist()
    golds = {gold: final_answer(gold) for gold in {row["gold"] for row in wrong}}
    same = sum(bool(row["extracted"]) and row["extracted"] == golds[row["gold"]] for row in wrong)
    return same, int(known.sum())
