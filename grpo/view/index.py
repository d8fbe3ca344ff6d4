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
from grpo.run.samples import PART
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """What a reward made of the completions of a file that end with the gold answer."""

    reward: str
    lowest: int
    """Number of those that got its lowest value."""
    right: int
    """Number of all of them."""
    known: int
    """Number of completions that ended, have a value of the reward and a gold answer."""
    group: int
    """The group that has most of the lowest."""


def disagreement(files: RunFiles, file: SamplesFile) -> Disagreement | None:
    """Return how the reward that judges a data set disagrees with the gold answers: of several, the one that disagrees
    most; None without gold answers. A completion is judged by the first reward of the recipe that scored it.

    If all values of a reward are equal and above 0, it disagrees with none. Raises UserError when the file is damaged.
    """
    schema = schema_of(files, file)
    parts = [name for name in schema.names if name.startswith(PART) and "/" not in name.removeprefix(PART)]
    needed = ("extracted", "gold", "finish_reason")
    table, groups = load(files, file, (*needed, *parts), schema)
    if not {*needed} <= {*table.column_names}:
        return None
    golds = {gold: gold and final_answer(gold) for gold in table["gold"].unique().to_pylist()}
    rows = table.select(needed).to_pylist()
    ended = np.array([row["gold"] is not None and row["finish_reason"] != "length" for row in rows], dtype=np.bool_)
    right = np.array([bool(row["extracted"]) and row["extracted"] == golds[row["gold"]] for row in rows], np.bool_)
    left = ended & ~np.isnan(rewards_of(table))
    found = []
    for name in parts:
        values = table[name].cast(pa.float64()).to_numpy()
        mine = left & ~np.isnan(values)
        left &= ~mine
        if not mine.any():
            continue
        low, high = values[mine].min(), values[mine].max()
        lowest = mine & right & (values == low) & (low < high or low <= 0)
        found.append(
            Disagreement(
                reward=name.removeprefix(PART), lowest=int(lowest.sum()), right=int((mine & right).sum()),
                known=int(mine.sum()), group=int(np.argmax(np.add.reduceat(lowest, groups.starts, dtype=np.int64))),
            )
        )  # fmt: skip
    return max(found, key=lambda one: one.lowest, default=None)
