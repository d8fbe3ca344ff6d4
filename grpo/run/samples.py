"""Read and write samples/<name>.parquet: one row per completion, with all recorded data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from grpo.evaluation.answers import final_answer
from grpo.suggest import one_line
from grpo.types import Failed, Group, Scored, Unchecked, UserError

PART = "reward_part/"
"""Prefix of the column with a reward's values; a value is null if the reward abstained or failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Data that the learner adds to the completions of a step, by their positions in the step."""

    logprob_sums: Mapping[int, float] = field(default_factory=dict)
    """Sum of the learner's logprobs over the sampled tokens."""
    advantages: Mapping[int, float] = field(default_factory=dict)
    """Only for methods with one advantage per completion."""


UNTRAINED = Trained()


def write_groups(
    target: Path,
    step: int,
    groups: Sequence[Group],
    *,
    rewards: Sequence[str],
    answer_column: str = "answer",
    trained: Trained = UNTRAINED,
) -> None:
    """Write one parquet file with a row per completion.

    Args:
        rewards: names of the recipe's rewards, in its order. Readers judge a data set by the first that scored it.
        answer_column: column of the data with the gold answers.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    outcomes = [rollout.outcome for rollout in rollouts]
    completions = [rollout.completion for rollout in rollouts]
    columns = {
        "step": [step] * len(rollouts),
        "dataset": [rollout.prompt.dataset for rollout in rollouts],
        "prompt_id": [rollout.prompt.prompt_id for rollout in rollouts],
        "sample_index": [i for group in groups for i in range(len(group.rollouts))],
        "prompt": [rollout.prompt.text for rollout in rollouts],
        "completion": [rollout.text for rollout in rollouts],
        "extracted": [final_answer(rollout.text) for rollout in rollouts],
        "gold": [gold_answer(rollout.prompt.row, answer_column) for rollout in rollouts],
        "row": [as_json(dict(rollout.prompt.row)) for rollout in rollouts],
        "reward": [o.value if isinstance(o, Scored) else None for o in outcomes],
        "advantage": [trained.advantages.get(i) for i in range(len(rollouts))],
        "failed": [o.kind if isinstance(o, Failed) else None for o in outcomes],
        "failed_detail": [o.detail if isinstance(o, Failed) else None for o in outcomes],
        "finish_reason": [completion.finish_reason for completion in completions],
        "policy_version": [int(c.policy_versions.min()) if len(c.policy_versions) else None for c in completions],
        "seed": [completion.seed for completion in completions],
        "prompt_token_ids": [rollout.prompt.token_ids for rollout in rollouts],
        "completion_token_ids": list_column([completion.token_ids for completion in completions]),
        "sampler_logprobs": list_column([completion.sampler_logprobs for completion in completions]),
        "sampler_logprob_sum": [float(c.sampler_logprobs.sum(dtype=np.float64)) for c in completions],
        "learner_logprob_sum": [trained.logprob_sums.get(i) for i in range(len(rollouts))],
    }
    table = pa.table(columns, schema=SAMPLE_SCHEMA)
    parts = [o.parts if isinstance(o, Scored) else {} for o in outcomes]
    for name in part_columns(parts, rewards):
        table = table.append_column(f"{PART}{name}", pa.array([some.get(name) for some in parts], pa.float64()))
    for name, column in logged_columns(outcomes).items():
        table = table.append_column(name, column)
    aside = target.with_name(target.name + ".partial")
    with aside.open("wb") as out:
        pq.write_table(table, out, compression="zstd", write_page_checksum=True)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, target)


def logged_columns(outcomes: Sequence[Scored | Failed]) -> dict[str, pa.Array]:
    """Return `<reward>/<column>` -> the values that reward functions have logged for the completions; missing ones are
    null. A mix of int and float becomes float; any other mix of types becomes text."""
    out = {}
    for name in sorted({name for outcome in outcomes for name in outcome.logged.columns}):
        values = [outcome.logged.columns.get(name) for outcome in outcomes]
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {int, float} and len(kinds) == 2:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        out[name] = pa.array(values) if kinds else pa.nulls(len(values), pa.string())
    return out


def part_columns(parts: Sequence[Mapping[str, float]], rewards: Sequence[str]) -> list[str]:
    """Return the names in `parts` in the recipe's order of rewards, each followed by the entries of its mapping."""
    places = {name: i for i, name in enumerate(rewards)}
    named = dict.fromkeys(name for some in parts for name in some)
    return sorted(named, key=lambda name: (places.get(name.partition("/")[0], len(places)), "/" in name))


def gold_answer(row: Mapping[str, Unchecked], column: str) -> str | None:
    """Return the gold answer of a data row as text; None if the row has none."""
    value = row.get(column)
    return value if value is None or isinstance(value, str) else as_json(value)


def as_json(value: Unchecked) -> str:
    """Return `value` as JSON; values that JSON does not support (dates, bytes) become strings."""
    return json.dumps(value, ensure_ascii=False, default=str)


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Return these columns of a samples file, followed by the columns of the rewards' values (`PART`).

    Raises UserError when the file is damaged or is not a samples file.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            absent = [name for name in SAMPLE_SCHEMA.names if name not in file.schema_arrow.names]
            if absent:
                raise UserError(
                    f"{path} cannot be read: it has no column {absent[0]}; another version may have made it"
                )
            fields = [SAMPLE_SCHEMA.field(name) for name in names]
            fields += [pa.field(name, pa.float64()) for name in file.schema_arrow.names if name.startswith(PART)]
            every = [one.name for one in fields]
            table = file.read(columns=every).select(every)
        table.validate(full=True)
        return table.cast(pa.schema(fields))
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error, 200)}") from error


def list_column(arrays: Sequence[NDArray[np.generic]]) -> pa.ListArray:
    """Return a column of lists made from arrays, without a Python object per element."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))


SAMPLE_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("dataset", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("extracted", pa.string()),
        ("gold", pa.string()),
        ("row", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("failed", pa.string()),
        ("failed_detail", pa.string()),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("seed", pa.int64()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.int32())),
        ("sampler_logprobs", pa.list_(pa.float32())),
        ("sampler_logprob_sum", pa.float64()),
        ("learner_logprob_sum", pa.float64()),
    ]
)
