"""Search over the samples of a run, and export of a selection as JSONL."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from grpo.types import Json, UserError
from grpo.view.files import RunFiles, SamplesFile, number
from grpo.view.query import Query
from grpo.view.rows import BATCH, TOKENS, load, matches, schema_of, unreadable
from grpo.view.runs import Run
from grpo.view.samples import as_text, completion_row, data_row, parsed_filter

THREADS = 4
"""Files that are searched at the same time."""
MAX_SECONDS = 20.0
"""A search ends after this time, and says that it is not complete."""
CONTEXT = 60
"""Characters before and after a hit."""
MAX_IDS = 100
EXPORTED = (
    "prompt", "completion", "gold", "extracted", "why", "reward", "advantage", "failed", "failed_detail",
    "finish_reason", "dataset", "prompt_id", "sample_index", "step", "policy_version", "seed", "length",
)  # fmt: skip
"""Fields of an exported line besides the fields of the data row, and `parts` and `logged`."""


def search_answer(run: Run, query: Query) -> Json:
    """Return the completions whose prompt or completion contains a text or a sequence of token ids, latest first."""
    started = time.monotonic()
    text, ids = query.text("q"), ids_of(query.text("ids"))
    condition = query.text("filter")
    if not text and ids is None and not condition:
        raise UserError("q= (a text), ids= (token ids) or filter= is missing")
    limit = query.whole("limit", 100, 1000)
    files = sorted(run.files.samples(), key=lambda file: (file.step or 0, file.kind == "step"), reverse=True)
    if condition and files:
        parsed_filter(condition, schema_of(run.files, files[0]))  # a mistake is reported before the search
    hits: list[Json] = []
    rows, problems, complete = 0, list[str](), True
    with ThreadPoolExecutor(THREADS, thread_name_prefix="search") as pool:
        for at in range(0, len(files), 2 * THREADS):
            if len(hits) >= limit or time.monotonic() - started > MAX_SECONDS:
                complete = False
                break
            some = files[at : at + 2 * THREADS]
            left = limit - len(hits)
            for found in pool.map(lambda file, left=left: hits_in(run, file, text, ids, condition, left), some):
                hits += found.hits
                rows += found.rows
                problems += [found.problem] if found.problem else []
    if len(hits) > limit:
        complete = False
    return {
        "hits": hits[:limit],
        "complete": complete and not problems,
        "rows_searched": rows,
        "seconds": round(time.monotonic() - started, 3),
        "problem": "; ".join(problems[:3]) or None,
    }


class Found:
    """Hits in one file."""

    def __init__(self, hits: list[Json], rows: int, problem: str | None = None) -> None:
        self.hits, self.rows, self.problem = hits, rows, problem


def ids_of(text: str) -> list[int] | None:
    """Return token ids separated by commas or spaces; None for an empty text."""
    words = text.replace(",", " ").split()
    if not words:
        return None
    if len(words) > MAX_IDS or any(not (word.isascii() and word.isdigit()) or len(word) > 9 for word in words):
        raise UserError(f"ids={text[:80]}: it must be at most {MAX_IDS} token ids, separated by commas")
    return [int(word) for word in words]


def hits_in(run: Run, file: SamplesFile, text: str, ids: list[int] | None, condition: str, limit: int) -> Found:
    """Return at most `limit` hits in one file."""
    try:
        return search_file(run, file, text, ids, condition, limit)
    except UserError as error:
        return Found([], 0, str(error))
    except FileNotFoundError:  # a resumed run has removed it
        return Found([], 0)


def search_file(run: Run, file: SamplesFile, text: str, ids: list[int] | None, condition: str, limit: int) -> Found:
    """Return at most `limit` hits in one file. Raises UserError if it is damaged or the filter does not fit it."""
    if text and ids is None:
        may_match, rows = may_contain(run.files, file, text)
        if not may_match:
            return Found([], rows)
    schema = schema_of(run.files, file)
    chosen = parsed_filter(condition, schema)
    names = [
        *(("prompt", "completion") if text else ()),
        *((TOKENS,) if ids else ()),
        *(chosen.columns if chosen else ()),
    ]
    table, groups = load(run.files, file, names, schema)
    where = matches(table, chosen)
    in_completion = contains(table, "completion", text)
    in_prompt = contains(table, "prompt", text)
    in_ids = contains_ids(table, ids)
    parts = [part for part in (in_completion, in_prompt, in_ids) if part is not None]
    if parts:
        where = where & np.logical_or.reduce(parts)
    numbers = groups.of_rows()
    hits: list[Json] = []
    for row in np.flatnonzero(where)[:limit].tolist():
        kind, content = "filter", ""
        if in_completion is not None and in_completion[row]:
            kind, content = "completion", as_text(table["completion"][row].as_py()) or ""
        elif in_prompt is not None and in_prompt[row]:
            kind, content = "prompt", as_text(table["prompt"][row].as_py()) or ""
        elif in_ids is not None and in_ids[row]:
            kind = "ids"
        at = content.find(text) if kind in ("completion", "prompt") else 0
        end = at + len(text) + CONTEXT
        group = int(numbers[row])
        hits.append(
            {
                "run": run.number,
                "file": file.stem,
                "step": file.step,
                "group": group,
                "index": row - int(groups.starts[group]),
                "prompt_id": as_text(table["prompt_id"][row].as_py()),
                "where": kind,
                "before": content[max(0, at - CONTEXT) : at],
                "match": " ".join(map(str, ids or ())) if kind == "ids" else text if content else "",
                "after": content[at + len(text) : end] if content else "",
                "cut_before": at > CONTEXT,
                "cut_after": len(content) > end,
                "reward": number(table["reward"][row].as_py()),
            }
        )
    return Found(hits, len(table))


def may_contain(files: RunFiles, file: SamplesFile, text: str) -> tuple[bool, int]:
    """Return whether `text` is in the bytes of the prompts or completions of a file, and the number of its rows. This
    is faster than a search row by row, and most files of a run do not have what is looked for.

    Raises UserError when the file is damaged.
    """
    sought = text.encode("utf-8", errors="replace")
    try:
        with pq.ParquetFile(files.inside(file.path), page_checksum_verification=True) as opened:
            names = [name for name in ("completion", "prompt") if name in opened.schema_arrow.names]
            for batch in opened.iter_batches(batch_size=BATCH, columns=names, use_threads=False):
                for column in batch.columns:
                    column.validate(full=True)
                    buffer = column.buffers()[2]
                    if buffer is not None and sought in buffer.to_pybytes():
                        return True, opened.metadata.num_rows
            return False, opened.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(file, error) from error


def contains(table: pa.Table, name: str, text: str) -> NDArray[np.bool_] | None:
    """Return which rows have `text` in a column; None without a text or the column."""
    if not text or name not in table.column_names:
        return None
    found = pc.fill_null(pc.match_substring(table[name], text), False)
    return np.asarray(found.to_numpy(), dtype=np.bool_)


def contains_ids(table: pa.Table, ids: list[int] | None) -> NDArray[np.bool_] | None:
    """Return which rows have these token ids in sequence in their completion; None without ids."""
    if ids is None or TOKENS not in table.column_names:
        return None
    found = np.zeros(len(table), dtype=np.bool_)
    if not len(table):
        return found
    column = table[TOKENS].combine_chunks()
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy()
    if len(values) < len(ids):
        return found
    span = len(values) - len(ids) + 1
    same = np.logical_and.reduce([values[i : i + span] == id_ for i, id_ in enumerate(ids)])
    starts = np.flatnonzero(same)
    rows = np.searchsorted(offsets, starts, side="right") - 1
    found[rows[starts + len(ids) <= offsets[rows + 1]]] = True
    return found


def export_lines(run: Run, query: Query) -> Iterator[bytes]:
    """Return the selected completions as lines of JSON. All mistakes are raised before the first line."""
    stem, condition = query.text("file"), query.text("filter")
    files = [run.files.samples_file(stem)] if stem else run.files.samples()
    if files:
        parsed_filter(condition, schema_of(run.files, files[0]))
    return (line for file in files for line in exported(run.files, file, condition))


def exported(files: RunFiles, file: SamplesFile, condition: str) -> Iterator[bytes]:
    """Yield the lines of one file."""
    schema = schema_of(files, file)
    chosen = parsed_filter(condition, schema)
    names = [one.name for one in schema if not pa.types.is_list(one.type)]
    table, _ = load(files, file, [*names, "length", *(chosen.columns if chosen else ())], schema)
    for row in np.flatnonzero(matches(table, chosen)).tolist():
        yield json.dumps(exported_row(table.slice(row, 1).to_pylist()[0], names)).encode() + b"\n"


def exported_row(row: dict[str, Json], names: list[str]) -> dict[str, Json]:
    """Return a line: the fields of the data row, and those of the sample, as `sample_<name>` if the data row has the
    name."""
    details = completion_row({name: row[name] for name in names}, 0)
    sample = {name: row.get(name) for name in EXPORTED} | {
        "extracted": details["extracted"], "why": details["why"], "parts": details["parts"],
        "logged": details["logged"],
    }  # fmt: skip
    data = data_row(row.get("row"))
    return data | {f"sample_{name}" if name in data else name: value for name, value in sample.items()}
