"""Compare whole runs: metrics, completions and weights, bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

TIMED = ("time", "tokens/per_second", "perf/", "sync/seconds")


def untimed(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]


def weights(run: Path) -> str:
    digest: str = json.loads((run / "summary.json").read_text())["weights_sha256"]
    return digest


def assert_equal_runs(run: Path, straight: Path) -> None:
    """Assert that `run` has each step once, equal in all but times, and that each step learned something."""
    assert all(line["optim/grad_norm"] > 0 for line in untimed(straight) if line["step"])
    steps = [line["step"] for line in untimed(run)]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    assert untimed(run) == untimed(straight)
    assert weights(run) == weights(straight)
    names = sorted(path.name for path in (straight / "samples").iterdir())
    assert sorted(path.name for path in (run / "samples").iterdir()) == names
    drawn = Counter[str]()
    for name in names:
        table = pq.read_table(run / "samples" / name)
        assert table.equals(pq.read_table(straight / "samples" / name)), name
        if name.startswith("step-"):
            drawn.update(set(table["prompt_id"].to_pylist()))
    if not any("refill/attempts" in line or "progress/retired_prompts" in line for line in untimed(run)):
        assert set(drawn.values()) == {1}  # at most 8 steps of 8 prompts: none of the 64 twice
