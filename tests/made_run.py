"""Run folders for the tests of the viewer, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo.run.samples import SAMPLE_SCHEMA

CONFIG = """\
model: {path: base}
data: {train: [{path: train.jsonl}], template: "{question}"}
algorithm: {prompts_per_step: 2, group_size: 2}
rewards: [{file: judge.py}]
run: {steps: 4}
"""


def sample(prompt: int = 0, index: int = 0, /, **changes: Any) -> dict[str, Any]:
    """A row of a samples file: completion `index` of a prompt, which got the reward 1 if the index is even."""
    row: dict[str, Any] = {
        "step": 1,
        "dataset": "sums",
        "prompt_id": f"sums:{prompt}:h",
        "sample_index": index,
        "prompt": f"What is {prompt}+1?",
        "completion": f"It is {prompt + index}.",
        "extracted": str(prompt + index),
        "gold": str(prompt + 1),
        "row": json.dumps({"question": f"What is {prompt}+1?", "level": prompt}),
        "reward": float(index % 2 == 0),
        "advantage": 1.0 - 2 * (index % 2),
        "failed": None,
        "failed_detail": None,
        "finish_reason": "stop",
        "policy_version": 0,
        "seed": 2**60 + index,
        "prompt_token_ids": [1, 2, 3],
        "completion_token_ids": [10 + index, 11, 12],
        "sampler_logprobs": [-0.5, -0.25, -0.125],
        "sampler_logprob_sum": -0.875,
        "learner_logprob_sum": -1.0,
        "reward_part/judge": float(index % 2 == 0),
    }
    return row | changes


def write_samples(run: Path, stem: str, rows: Sequence[Mapping[str, Any]], **columns: pa.Array) -> Path:
    """Write a samples file. `columns`: more columns."""
    schema = SAMPLE_SCHEMA.append(pa.field("reward_part/judge", pa.float64()))
    table = pa.Table.from_pylist(list(rows), schema=schema)
    for name, column in columns.items():
        table = table.append_column(name, column)
    path = run / "samples" / f"{stem}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    return path


def write_metrics(run: Path, lines: Sequence[Mapping[str, float]]) -> None:
    """Write metrics.jsonl."""
    whole = [{"time": "2026-01-01T00:00:00+00:00", **line, "step": int(line["step"])} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in whole)
    (run / "metrics.jsonl").write_text(text)


def make_run(run: Path, steps: int = 2) -> Path:
    """A run of two prompts with two completions each, in every step: one of each prompt right, one wrong."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    write_metrics(run, [{"step": step, "reward/mean": 0.5, "policy/entropy": 1.0} for step in range(1, steps + 1)])
    for step in range(1, steps + 1):
        rows = [sample(prompt, index, step=step) for prompt in (0, 1) for index in (0, 1)]
        write_samples(run, f"step-{step:06d}", rows)
    return run
