"""The rows of one samples file: read by column, with the values of their groups as more columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from grpo.run.samples import PART, SAMPLE_SCHEMA
from grpo.types import UserError
from grpo.view.files import RunFiles, SamplesFile
from grpo.view.filters import Filter
from grpo.view.visible import visible

BATCH = 512
"""Rows that are decoded at a time, so that long lists of tokens are not all in memory."""
NEEDED = ("prompt_id", "sample_index", "reward")
TOKENS = "completion_token_ids"
VIRTUAL = {
    "length": (pa.int64(), "number of tokens of the completion"),
    "group": (pa.int64(), "number of the group in its file, from 0"),
    "spread": (pa.float64(), "highest minus lowest reward of the group; null without a scored completion"),
    "group_mean": (pa.float64(), "mean reward of the scored completions of the group"),
}
"""Columns that are computed when a file is read -> (type, meaning)."""
DOCS = {
    "step": "step of the run",
    "dataset": "name of the data set",
    "prompt_id": "<data set>:<row>:<content hash>",
    "sample_index": "position of the completion in its group, from 0",
    "prompt": "text of the prompt",
    "completion": "text of the completion, without special tokens",
    "extracted": "the answer that the completion ends with",
    "gold": "the gold answer",
    "row": "the row of the data, as JSON",
    "reward": "weighted sum of the rewards; null if it failed",
    "advantage": "advantage in training; null for methods with one advantage per token, and in evaluations",
    "failed": "kind of the failure; null if the completion was scored",
    "failed_detail": "reason of the failure",
    "finish_reason": "how the completion ended: stop, length (truncated) or aborted",
    "policy_version": "version of the weights that sampled the completion (its first token, if they changed)",
    "seed": "seed of the completion's generator",
    "prompt_token_ids": "tokens of the prompt",
    "completion_token_ids": "sampled tokens",
    "sampler_logprobs": "logprobs of the sampled tokens in the sampler",
    "sampler_logprob_sum": "sum of sampler_logprobs",
    "learner_logprob_sum": "sum of the learner's logprobs of the sampled tokens",
}
"""Column of a samples file -> its meaning."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a file: consecutive rows of one prompt whose `sample_index` begins at 0."""

    starts: NDArray[np.int64]
    """[N] first row of each group."""
    sizes: NDArray[np.int64]
    """[N] number of rows of each group."""

    def of_rows(self) -> NDArray[np.int64]:
        """Return the number of the group of each row."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)


def doc_of(name: str) -> str:
    """Return the meaning of a column of a samples file."""
    if name in VIRTUAL:
        return VIRTUAL[name][1]
    if name.startswith(PART):
        return f"value of the reward {name.removeprefix(PART)}, without its weight"
    reward, _, column = name.partition("/")
    return DOCS.get(name) or f"logged by the reward {reward} as {column or name}"


def schema_of(files: RunFiles, file: SamplesFile) -> pa.Schema:
    """Return the columns of a samples file. Raises UserError if it cannot be read, or is no samples file."""
    try:
        schema = pq.read_schema(files.inside(file.path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(file, error) from error
    for name in NEEDED:
        if name not in schema.names:
            raise UserError(f"{file.path} cannot be read: it has no column {name}")
    for name in schema.names:
        if name in SAMPLE_SCHEMA.names and not same_kind(schema.field(name).type, name):
            raise UserError(f"{file.path} cannot be read: its column {name} is a {schema.field(name).type}")
    return schema


def same_kind(found: pa.DataType, name: str) -> bool:
    """Return whether a column has the type that a samples file gives it; a column without values may have none."""
    wanted = SAMPLE_SCHEMA.field(name).type
    both_integers = pa.types.is_integer(found) and pa.types.is_integer(wanted)
    return bool(found == wanted or pa.types.is_null(found) or both_integers)


def unreadable(file: SamplesFile, error: Exception) -> UserError:
    """Return the error about a file that is damaged."""
    return UserError(f"{file.path} cannot be read: {visible(' '.join(str(error).split())[:200])}")


def types_of(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return the columns that a filter can name, with their types."""
    return {field.name: field.type for field in schema} | {name: kind for name, (kind, _) in VIRTUAL.items()}


def batches(files: RunFiles, file: SamplesFile, names: Sequence[str], size: int = BATCH) -> Iterator[pa.RecordBatch]:
    """Yield these columns of a samples file, `size` rows at a time. Raises UserError when it is damaged."""
    try:
        with pq.ParquetFile(files.inside(file.path), page_checksum_verification=True) as opened:
            if absent := [name for name in names if name not in opened.schema_arrow.names]:
                raise UserError(f"{file.path} cannot be read: it has no column {absent[0]}")
            for batch in opened.iter_batches(batch_size=size, columns=[*names], use_threads=False):
                batch.validate(full=True)
                yield batch
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(file, error) from error


def load(
    files: RunFiles, file: SamplesFile, names: Sequence[str], schema: pa.Schema | None = None
) -> tuple[pa.Table, Groups]:
    """Return columns of a samples file, virtual ones included, and its groups.

    Raises UserError when the file is damaged.
    """
    schema = schema_of(files, file) if schema is None else schema
    wanted = dict.fromkeys([*NEEDED, *(name for name in names if name in schema.names)])
    with_length = "length" in names and TOKENS in schema.names
    read = [*wanted, *([TOKENS] if with_length and TOKENS not in wanted else [])]
    parts = []
    for batch in batches(files, file, read):
        part = pa.Table.from_batches([batch])
        if with_length:
            lengths = pa.array([], pa.int64()) if not len(part) else _lengths(part[TOKENS])
            part = part.append_column("length", lengths)
            part = part if TOKENS in wanted else part.drop_columns(TOKENS)
        parts.append(part)
    if not parts:
        empty = pa.schema([schema.field(name) for name in wanted]).empty_table()
        parts = [empty.append_column("length", pa.array([], pa.int64())) if with_length else empty]
    table = pa.concat_tables(parts).combine_chunks()
    groups = groups_of(table)
    if "group" in names:
        table = table.append_column("group", pa.array(groups.of_rows()))
    if "spread" in names or "group_mean" in names:
        low, high, mean = statistics_of(rewards_of(table), groups)
        for name, values in (("spread", high - low), ("group_mean", mean)):
            column = pa.array(np.repeat(values, groups.sizes), pa.float64(), from_pandas=True)
            table = table.append_column(name, column)
    return table, groups


def _lengths(tokens: pa.ChunkedArray) -> pa.Array:
    return tokens.combine_chunks().value_lengths().cast(pa.int64())


def groups_of(table: pa.Table) -> Groups:
    """Return the groups of a file."""
    if not len(table):
        return Groups(np.zeros(0, np.int64), np.zeros(0, np.int64))
    index = table["sample_index"].to_numpy()
    ids = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    first = np.concatenate([[True], (index[1:] == 0) | (ids[1:] != ids[:-1])])
    starts = np.flatnonzero(first).astype(np.int64)
    return Groups(starts, np.diff(np.append(starts, len(table))).astype(np.int64))


def rewards_of(table: pa.Table) -> NDArray[np.float64]:
    """Return the rewards of the rows; NaN for null."""
    values: NDArray[np.float64] = table["reward"].cast(pa.float64()).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)


def statistics_of(
    values: NDArray[np.float64], groups: Groups
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return lowest, highest and mean value of each group, without those that are NaN; NaN for a group of such."""
    if not len(groups.starts):
        return (np.zeros(0),) * 3
    low, high = np.fmin.reduceat(values, groups.starts), np.fmax.reduceat(values, groups.starts)
    counts = np.add.reduceat(~np.isnan(values), groups.starts, dtype=np.int64)
    sums = np.add.reduceat(np.nan_to_num(values), groups.starts)
    mean = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return low, high, mean


def matches(table: pa.Table, chosen: Filter | None) -> NDArray[np.bool_]:
    """Return which rows of `table`, which has the columns of the filter, it matches; all without a filter."""
    if chosen is None:
        return np.ones(len(table), dtype=np.bool_)
    try:
        found = ds.dataset(table).to_table(columns={"matches": chosen.expression})["matches"]
        return np.asarray(found.to_numpy(), dtype=np.bool_)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"filter: {' '.join(str(error).split())[:200]}") from error
