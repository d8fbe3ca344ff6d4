"""Answers about the samples of a run: the groups of a file, one group, and one completion with its tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from grpo.run.samples import PART, SAMPLE_SCHEMA
from grpo.types import Json, Unchecked, UserError
from grpo.view import filters
from grpo.view.files import NotFoundError, RunFiles, SamplesFile, number
from grpo.view.query import Query, whole
from grpo.view.rows import TOKENS, VIRTUAL, Groups, batches, doc_of, load, matches, rewards_of, schema_of, statistics_of
from grpo.view.rows import types_of as columns_of
from grpo.view.tokens import VALUES, Decoder, LearnerValues, decoder_of, learner_values

SORTS = ("group", "spread", "mean", "length", "failed", "dataset")
SAMPLER_LOGPROBS = "sampler_logprobs"
PREVIEW = 200
"""Characters of a prompt in a list."""
MAX_TEXT = 200_000
"""Characters of a completion in a group; the completion's own answer has its tokens, page by page."""
IDENTITY = ("dataset", "prompt_id", "sample_index", "reward", "failed", "finish_reason", "advantage", "gold", "prompt")


def parsed_filter(text: str, schema: pa.Schema) -> filters.Filter | None:
    """Return the filter, or None for an empty text. Raises UserError if it is wrong."""
    return filters.parse(text, columns_of(schema)) if text.strip() else None


def groups_answer(files: RunFiles, stem: str, query: Query, page: tuple[int, int] | None = None) -> Json:
    """Return a page of the groups of a samples file, filtered and sorted. `page`: (offset, limit) instead of those of
    the query."""
    file = files.samples_file(stem)
    offset, limit = page or query.page(100)
    sort = query.choice("sort", SORTS, "group")
    descending = query.choice("order", ("asc", "desc"), "asc") == "desc"
    schema = schema_of(files, file)
    chosen = parsed_filter(query.text("filter"), schema)
    names = [*IDENTITY, "length", *(chosen.columns if chosen else ())]
    table, groups = load(files, file, names, schema)
    found = matches(table, chosen)
    rewards = rewards_of(table)
    matching = np.flatnonzero(np.logical_or.reduceat(found, groups.starts)) if len(groups.starts) else groups.starts
    cells = Cells(table, groups)
    order = cells.sorted(matching, sort, descending)
    return {
        "file": file.stem,
        "step": file.step,
        "groups": [cells.row(g, found) for g in order[offset : offset + limit]],
        "total_groups": len(groups.starts),
        "matching_groups": len(matching),
        "total_rows": len(table),
        "matching_rows": int(found.sum()),
        "columns": column_list(schema),
        "reward_range": [number(float(f(rewards))) for f in (np.nanmin, np.nanmax)] if np.isfinite(rewards).any()
        else [None, None],
        "problem": None if len(table) else f"{file.path.name} has no rows",
    }  # fmt: skip


def column_list(schema: pa.Schema) -> list[Json]:
    """Return name, type and meaning of the columns that a filter can name."""
    return [
        {"name": name, "type": filters.type_word(kind), "doc": doc_of(name), "virtual": name in VIRTUAL}
        for name, kind in columns_of(schema).items()
    ]


class Cells:
    """The rows of a file as lists of Python values by column, in groups."""

    def __init__(self, table: pa.Table, groups: Groups) -> None:
        self._columns = {name: table[name].to_pylist() for name in (*IDENTITY, "length") if name in table.column_names}
        self.groups, self._length = groups, len(table)
        self.low, self.high, self.mean = statistics_of(rewards_of(table), groups)

    def column(self, name: str) -> Sequence[Unchecked]:
        """Return a column; of None if the file does not have it."""
        return self._columns.get(name) or [None] * self._length

    def of(self, name: str, g: int) -> Sequence[Unchecked]:
        """Return the values of a group."""
        start = int(self.groups.starts[g])
        return self.column(name)[start : start + int(self.groups.sizes[g])]

    def failed(self, g: int) -> int:
        """Return the number of failed completions of a group."""
        return sum(kind is not None for kind in self.of("failed", g))

    def length_mean(self, g: int) -> float | None:
        """Return the mean number of tokens of the completions of a group."""
        lengths = [length for one in self.of("length", g) if (length := number(one)) is not None]
        return sum(lengths) / len(lengths) if lengths else None

    def sorted(self, chosen: NDArray[np.int64], sort: str, descending: bool) -> list[int]:
        """Return the numbers of the `chosen` groups in the requested order; groups without a value come last."""
        keys: dict[str, Callable[[int], float | str]] = {
            "group": lambda g: g,
            "spread": lambda g: float(self.high[g] - self.low[g]),
            "mean": lambda g: float(self.mean[g]),
            "length": lambda g: self.length_mean(g) or 0.0,
            "failed": self.failed,
            "dataset": lambda g: as_text(self.of("dataset", g)[0]) or "",
        }
        valued = [(keys[sort](int(g)), int(g)) for g in chosen]
        missing = [g for value, g in valued if isinstance(value, float) and math.isnan(value)]
        present = [(value, g) for value, g in valued if not (isinstance(value, float) and math.isnan(value))]
        present.sort(key=lambda pair: pair[0], reverse=descending)
        return [g for _, g in present] + missing

    def row(self, g: int, found: NDArray[np.bool_]) -> dict[str, Json]:
        """Return a group as a row of the step's page."""
        prompt, gold = (as_text(self.of(name, g)[0]) or "" for name in ("prompt", "gold"))
        start = int(self.groups.starts[g])
        names = ("reward", "failed", "finish_reason", "length", "advantage")
        rows = zip(*(self.of(name, g) for name in names), strict=True)
        return {
            "group": g,
            "prompt_id": as_text(self.of("prompt_id", g)[0]),
            "dataset": as_text(self.of("dataset", g)[0]),
            "prompt": prompt[:PREVIEW],
            "gold": gold[:PREVIEW] or None,
            "mean": number(float(self.mean[g])),
            "spread": number(float(self.high[g] - self.low[g])),
            "length_mean": self.length_mean(g),
            "failed": self.failed(g),
            "cells": [
                {
                    "index": i,
                    "reward": number(reward),
                    "failed": as_text(failed),
                    "finish_reason": as_text(finish_reason),
                    "length": number(length),
                    "advantage": number(advantage),
                    "matches": bool(found[start + i]),
                }
                for i, (reward, failed, finish_reason, length, advantage) in enumerate(rows)
            ],
        }


def group_place(files: RunFiles, file: SamplesFile, group: str) -> tuple[Groups, int]:
    """Return the groups of a file and the number of the requested one. Raises NotFoundError if there is none."""
    _, groups = load(files, file, ())
    g = whole("group", group)
    if g >= len(groups.starts):
        last = f"its groups are 0 to {len(groups.starts) - 1}" if len(groups.starts) else "it has no groups"
        raise NotFoundError(f"{file.stem} has no group {g}; {last}")
    return groups, g


def read_group(
    files: RunFiles, file: SamplesFile, groups: Groups, g: int, names: Sequence[str]
) -> list[dict[str, Json]]:
    """Return the rows of a group with these columns. Only the batches that have them are kept in memory.

    Raises UserError when the file is damaged.
    """
    start, end = int(groups.starts[g]), int(groups.starts[g] + groups.sizes[g])
    parts, at = [], 0
    for batch in batches(files, file, names, size=64):
        first, last = max(start - at, 0), min(end - at, len(batch))
        if first < last:
            parts += batch.slice(first, last - first).to_pylist()
        at += len(batch)
        if at >= end:
            break
    return parts


def group_answer(files: RunFiles, stem: str, group: str) -> Json:
    """Return the completions of a group side by side."""
    file = files.samples_file(stem)
    groups, g = group_place(files, file, group)
    rows = read_group(files, file, groups, g, columns_without_lists(files, file))
    return group_of_rows(file, rows, g, len(groups.starts))


def every_group(files: RunFiles, file: SamplesFile) -> Iterator[tuple[int, dict[str, Json]]]:
    """Yield the number and the answer of every group of a file, which is read once."""
    _, groups = load(files, file, ())
    g, rows = 0, list[dict[str, Json]]()
    for batch in batches(files, file, columns_without_lists(files, file), size=64):
        for row in batch.to_pylist():
            rows.append(row)
            if len(rows) == groups.sizes[g]:
                yield g, group_of_rows(file, rows, g, len(groups.starts))
                g, rows = g + 1, []


def columns_without_lists(files: RunFiles, file: SamplesFile) -> list[str]:
    """Return the columns of a file that are not lists, and the sampled tokens, which give the length."""
    schema = schema_of(files, file)
    return [one.name for one in schema if one.name == TOKENS or not pa.types.is_list(one.type)]


def group_of_rows(file: SamplesFile, rows: Sequence[Mapping[str, Json]], g: int, count: int) -> dict[str, Json]:
    """Return the answer about group `g` of `count`, from its rows."""
    first = rows[0]
    return {
        "file": file.stem,
        "step": file.step,
        "group": g,
        "prompt": as_text(first.get("prompt")),
        "prompt_id": as_text(first.get("prompt_id")),
        "dataset": as_text(first.get("dataset")),
        "gold": as_text(first.get("gold")),
        "row": data_row(first.get("row")),
        "common_prefix": common_prefix([as_text(row.get("completion")) or "" for row in rows]),
        "completions": [completion_row(row, i) for i, row in enumerate(rows)],
        "previous": g - 1 if g else None,
        "next": g + 1 if g + 1 < count else None,
    }


def common_prefix(texts: Sequence[str]) -> int:
    """Return the number of characters (code points) that all texts begin with; 0 for a single text."""
    if len(texts) < 2:
        return 0
    first, last = min(texts), max(texts)
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


def completion_row(row: Mapping[str, Json], index: int) -> dict[str, Json]:
    """Return a completion with everything that is known about it besides its tokens."""
    text = as_text(row.get("completion")) or ""
    parts, logged = {}, dict[str, Json]()
    for name, value in row.items():
        if name.startswith(PART):
            parts[name.removeprefix(PART)] = number(value)
        elif name not in SAMPLE_SCHEMA.names and not isinstance(value, list):
            logged[name] = value if isinstance(value, str | bool | int) else number(value)
    ids = row.get(TOKENS)
    return {
        "index": index,
        "text": text[:MAX_TEXT],
        "truncated_text": len(text) > MAX_TEXT,
        "extracted": read_by_grader(row, parts, logged),
        "final_answer": as_text(row.get("extracted")),
        "why": grader_column(logged, "why"),
        "reward": number(row.get("reward")),
        "parts": parts,
        "logged": logged,
        "advantage": number(row.get("advantage")),
        "failed": as_text(row.get("failed")),
        "failed_detail": as_text(row.get("failed_detail")),
        "finish_reason": as_text(row.get("finish_reason")),
        "policy_version": number(row.get("policy_version")),
        "seed": None if row.get("seed") is None else str(row["seed"]),
        "length": len(ids) if isinstance(ids, list) else None,
        "sampler_logprob_sum": number(row.get("sampler_logprob_sum")),
        "learner_logprob_sum": number(row.get("learner_logprob_sum")),
    }


def grader_column(logged: Mapping[str, Json], name: str) -> str | None:
    """Return what the first reward that logged `<reward>/<name>` logged there."""
    values = (value for column, value in logged.items() if column.endswith(f"/{name}"))
    return next((str(value) for value in values if value is not None), None)


def read_by_grader(
    row: Mapping[str, Json], parts: Mapping[str, float | None], logged: Mapping[str, Json]
) -> str | None:
    """Return the answer that the rewards read, by the first that logs `<reward>/extracted`; None if they read none.

    If none of the rewards that scored the completion logs it, return the answer that the completion ends with.
    """
    scored = [f"{name}/extracted" for name, value in parts.items() if value is not None and row.get("failed") is None]
    read = [logged[name] for name in scored if name in logged]
    return next((str(value) for value in read if value is not None), None) if read else as_text(row.get("extracted"))


def as_text(value: Unchecked) -> str | None:
    """Return a text as it is, and None for anything else."""
    return value if isinstance(value, str) else None


def data_row(text: Unchecked) -> dict[str, Json]:
    """Return the row of the data; empty if it is none."""
    try:
        found = json.loads(text, parse_constant=lambda _: None) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def completion_answer(files: RunFiles, stem: str, group: str, index: str, query: Query) -> Json:
    """Return one completion with a page of its tokens."""
    file = files.samples_file(stem)
    groups, g = group_place(files, file, group)
    i, size = whole("index", index), int(groups.sizes[g])
    if i >= size:
        raise NotFoundError(f"group {g} of {file.stem} has no completion {i}; its completions are 0 to {size - 1}")
    offset, limit = query.whole("offset", 0), query.whole("limit", 2000, 10_000)
    schema = schema_of(files, file)
    one = Groups(np.array([groups.starts[g] + i]), np.array([1]))
    [row] = read_group(files, file, one, 0, schema.names)
    ids = integers(row.get(TOKENS))
    decoder = decoder_of(files)
    prompt_ids = integers(row.get("prompt_token_ids"))
    sampled = row.get(SAMPLER_LOGPROBS)
    if sampled is not None and (not isinstance(sampled, list) or len(sampled) != len(ids)):
        raise UserError(f"{file.path} is damaged: {SAMPLER_LOGPROBS} does not have one value per token")
    values = learner_values(files, file, int(one.starts[0]), len(ids))
    return {
        **completion_row(row, i),
        "file": file.stem,
        "step": file.step,
        "group": g,
        "group_size": size,
        "prompt": as_text(row.get("prompt")),
        "prompt_id": as_text(row.get("prompt_id")),
        "dataset": as_text(row.get("dataset")),
        "gold": as_text(row.get("gold")),
        "prompt_tokens": [decoder.token(token) for token in prompt_ids[:limit]],
        "total_prompt_tokens": len(prompt_ids),
        "tokens": [
            token_row(decoder.token(ids[at]), at, sampled, values, row.get("policy_version"))
            for at in range(offset, min(offset + limit, len(ids)))
        ],
        "total_tokens": len(ids),
        "absent": absent_values(values, decoder),
        "tokenizer": decoder.folder,
    }


def integers(value: Unchecked) -> list[int]:
    """Return a list of token ids; empty if there is none."""
    return [one for one in value if isinstance(one, int)] if isinstance(value, list) else []


def token_row(
    token: dict[str, Json], at: int, sampled: Json, values: LearnerValues, version: Unchecked
) -> dict[str, Json]:
    """Return a token with its values. `sampled`: logprobs of the sampler; `version`: of the weights that sampled it."""
    found = {name: values.columns[name][at] if name in values.columns else None for name in VALUES}
    sampler = number(sampled[at]) if isinstance(sampled, list) else None
    learner = number(found["learner_logprob"])
    return {
        "index": at,
        **token,
        "sampler_logprob": sampler,
        **{name: number(value) for name, value in found.items()},
        "difference": None if sampler is None or learner is None else learner - sampler,
        "version": number(version),
    }


def absent_values(values: LearnerValues, decoder: Decoder) -> list[Json]:
    """Return what is not known about the tokens, and why."""
    absent: list[Json] = [
        {"column": name, "why": values.problem} for name in VALUES if name not in values.columns
    ]  # fmt: skip
    return [*absent, *([{"column": "text", "why": decoder.problem}] if decoder.problem else [])]
