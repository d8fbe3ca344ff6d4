"""Turn a configured data set into prompts: read, map columns, filter, tokenize, remove overlaps, apply the limit.

Each filter reports the rows that it drops: as a summary in the plan (`notes`) and one by one (`dropped`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import DataConfig, DatasetConfig
from grpo.data.columns import hint
from grpo.data.overlap import find_overlaps
from grpo.data.prompts import PromptSet, make_prompts, prompt_id
from grpo.data.rows import Row, dataset_name, read_rows
from grpo.data.template import map_columns
from grpo.suggest import first_of
from grpo.types import Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_set(dataset: DatasetConfig, *, data: DataConfig, tokenizer: PreTrainedTokenizerBase, option: str) -> PromptSet:
    """Return the prompts of one data set, in the order of its rows, before `limit` is applied.

    Raises UserError naming the option and the row at fault.
    """
    name = dataset.name or dataset_name(dataset.path)
    if dataset.split != type(dataset)().split and Path(dataset.path).expanduser().is_file():
        raise UserError(f"{option}.split={dataset.split} has no effect: {dataset.path} is a file, which has no splits")
    rows = map_columns(read_rows(dataset.path, split=dataset.split, option=option), dataset.columns, option=option)
    dropped, notes = list[str](), list[str]()
    for column, (low, high) in dataset.between.items():
        numbers = [_number(row, column, option) for row in rows]
        kept = [row for row, number in zip(rows, numbers, strict=True) if low <= number <= high]
        if not kept:
            raise UserError(
                f"{option}.between.{column}=[{low:g}, {high:g}] leaves no row; the values lie between "
                f"{min(numbers):g} and {max(numbers):g}"
            )
        notes.append(f"kept       {len(kept)} of {len(rows)} rows of {option} by between {column} {low:g}..{high:g}")
        dropped += [
            f"{prompt_id(name, row)} ({column} {number:g})"
            for row, number in zip(rows, numbers, strict=True)
            if not low <= number <= high
        ]
        rows = kept
    made = make_prompts(rows, data=data, tokenizer=tokenizer, dataset=name, option=option)
    return dataclasses.replace(made, dropped=(*dropped, *made.dropped), notes=(*notes, *made.notes))


def without_overlaps(train: PromptSet, held_out: Sequence[Prompt], data: DataConfig) -> PromptSet:
    """Return `train` with a note about the prompts that overlap with the evaluation, and without these prompts if
    `data.contaminated` is drop.

    Raises UserError when no prompt is left.
    """
    overlaps = find_overlaps(train.prompts, held_out, data)
    if not overlaps:
        return train
    total, exact = len(train.prompts), sum(overlap.exact for overlap in overlaps)
    drop = data.contaminated == "drop"
    if drop and len(overlaps) == total:
        raise UserError(
            f"{train.option}: data.contaminated=drop leaves no prompt: all {total} overlap with data.eval.sets, the "
            f"first one with {overlaps[0].held_out.prompt_id}"
        )
    shown = first_of([f"{o.prompt.prompt_id} with {o.held_out.prompt_id}" for o in overlaps])
    by_words = f" and {len(overlaps) - exact} by {data.overlap_ngram} words in a row" if data.overlap_ngram else ""
    note = (
        f"{'dropped' if drop else 'warning':11}{len(overlaps)} of {total} prompts of {train.option} overlap with "
        f"data.eval.sets, {exact} as the same text{by_words}: {shown}"
    )
    if not drop:
        return dataclasses.replace(train, notes=(*train.notes, note))
    gone = {overlap.prompt.prompt_id for overlap in overlaps}
    return dataclasses.replace(
        train,
        prompts=tuple(prompt for prompt in train.prompts if prompt.prompt_id not in gone),
        dropped=(
            *train.dropped, *(f"{o.prompt.prompt_id} (overlaps with {o.held_out.prompt_id})" for o in overlaps)
        ),
        notes=(*train.notes, note),
    )  # fmt: skip


def limited(prompts: PromptSet, limit: int | None) -> PromptSet:
    """Return the first `limit` prompts of the set, with a note; the set itself if it has no more."""
    total = len(prompts.prompts)
    if limit is None or limit >= total:
        return prompts
    note = f"limit      the first {limit} of {total} prompts of {prompts.option}"
    return dataclasses.replace(prompts, prompts=prompts.prompts[:limit], notes=(*prompts.notes, note))


def _number(row: Row, column: str, option: str) -> float:
    """Return the number in a row's column; a text that parses as a number counts as one. Raises UserError."""
    if column not in row.values:
        raise UserError(
            f"{option}.between.{column}: {row.where} has no such column; it has {', '.join(row.values)}"
            f"{hint(column, row.values)}"
        )
    value = row.values[column]
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{option}.between.{column}: {row.where} has {value!r:.80}, which is not a number")
    return number
