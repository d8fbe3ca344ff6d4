"""Time the pages of `grpo view` on a run of 500 steps with 1,024 completions each.

    python -m benchmarks.view [--steps 500] [--rows 1024] [--folder FOLDER]

Makes the run in FOLDER (by default in the temporary folder), with lengths as of answers to word problems: 200 tokens
and 900 characters in the mean, and a tail of ten times that. Files that are there already are kept, so an interrupted
benchmark continues. Then starts the server and times each page once, in the order in which a reader opens them; the
search looks for a text that occurs once, in the first step. The last line is one JSON object with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.result import print_result
from grpo.run.samples import SAMPLE_SCHEMA, list_column

GROUP = 8
VOCABULARY = 50_000
MEAN_TOKENS, SIGMA, MOST_TOKENS = 200, 0.7, 4096
"""Mean of the lengths, standard deviation of their logarithm, and maximum."""
NEEDLE = "once and nowhere else"
CONFIG = """\
model: {path: base}
data: {train: [{path: train.jsonl}], template: "{question}"}
algorithm: {prompts_per_step: 128, group_size: 8}
rewards: [{file: judge.py}]
run: {steps: 500}
"""
METRICS = 120
"""Metrics of a step."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--folder", type=Path)
    parsed = parser.parse_args(arguments)
    folder = parsed.folder or Path(tempfile.gettempdir()) / "grpo-benchmark-view"
    run = folder / f"run-{parsed.steps}x{parsed.rows}"
    make_run(run, parsed.steps, parsed.rows)
    size_mb = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 1e6
    print(f"{run}: {parsed.steps} steps of {parsed.rows} completions, {size_mb:.0f} MB")
    figures = measure(run, parsed.steps)
    figures |= export(run, parsed.steps, folder)
    for name, value in figures.items():
        print(f"{name:24} {value:10.3f}")
    print_result("view", steps=parsed.steps, rows_per_step=parsed.rows, run_mb=size_mb, **figures)


def make_run(run: Path, steps: int, rows: int) -> None:
    """Write the run; files that exist are kept."""
    (run / "samples").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(CONFIG)
    words = np.array([f"{'bcdfghklmnprst'[i % 14]}{'aeiou'[i % 5]}{i:x}" for i in range(5000)])
    random = np.random.default_rng(0)
    book = " ".join(random.choice(words, 2_000_000))
    lines = []
    for step in range(1, steps + 1):
        values = {f"part/metric_{i}": float(value) for i, value in enumerate(random.normal(size=METRICS))}
        values |= {"reward/mean": step / steps, "group/count": rows / GROUP, "policy/entropy": 1.0}
        lines.append(json.dumps({"step": step, "time": "2026-01-01T00:00:00+00:00", **values}))
        file = run / "samples" / f"step-{step:06d}.parquet"
        if not file.exists():
            table = make_table(step, rows, book, np.random.default_rng(step))
            pq.write_table(table, file.with_suffix(".partial"), compression="zstd", write_page_checksum=True)
            file.with_suffix(".partial").replace(file)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def make_table(step: int, rows: int, book: str, random: np.random.Generator) -> pa.Table:
    """Return the samples of a step."""
    lengths = random.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, rows).astype(int).clip(1, MOST_TOKENS)
    starts = random.integers(0, len(book) - 6 * MOST_TOKENS, rows)
    texts = [book[start : start + 9 * length // 2] for start, length in zip(starts, lengths, strict=True)]
    if step == 1:
        texts[0] += NEEDLE
    prompts = random.integers(0, 5000, -(-rows // GROUP)).repeat(GROUP)[:rows]
    questions = [book[1000 * prompt : 1000 * prompt + 300] for prompt in prompts]
    reward = random.integers(0, 2, rows).astype(float)
    tokens = random.integers(0, VOCABULARY, lengths.sum()).astype(np.int32)
    logprobs = -random.exponential(0.3, lengths.sum()).astype(np.float32)
    ends = np.cumsum(lengths)[:-1]
    columns = {
        "step": [step] * rows, "dataset": ["made"] * rows, "prompt_id": [f"made:{p}:hash" for p in prompts],
        "sample_index": [i % GROUP for i in range(rows)], "prompt": questions, "completion": texts,
        "extracted": [text[-4:] for text in texts], "gold": ["42"] * rows,
        "row": [json.dumps({"question": text, "answer": "42", "solution": text}) for text in questions],
        "reward": reward, "advantage": reward - 0.5, "failed": [None] * rows, "failed_detail": [None] * rows,
        "finish_reason": ["stop"] * rows, "policy_version": [step - 1] * rows,
        "seed": random.integers(0, 2**62, rows), "prompt_token_ids": [list(range(80))] * rows,
        "completion_token_ids": list_column(np.split(tokens, ends)),
        "sampler_logprobs": list_column(np.split(logprobs, ends)),
        "sampler_logprob_sum": [0.0] * rows, "learner_logprob_sum": [0.0] * rows,
    }  # fmt: skip
    return pa.table(columns, schema=SAMPLE_SCHEMA).append_column("reward_part/judge", pa.array(reward))


def measure(run: Path, steps: int) -> dict[str, float]:
    """Return the seconds of each page, and the memory of the server."""
    command = [sys.executable, "-m", "grpo", "view", str(run), "--port", "0"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = urllib.parse.urlsplit(server.stdout.readline().split()[-1])
            address, token = f"http://{url.netloc}", url.query.removeprefix("token=")
            wait_for(address, token)
            figures = {"start_s": time.perf_counter() - began, "start_mib": memory_mib(server.pid)}
            last, middle = f"/api/runs/0/samples/step-{steps:06d}", f"/api/runs/0/samples/step-{steps // 2 + 1:06d}"
            pages: dict[str, tuple[str, ...]] = {
                "first_page_s": ("/", "/static/app.js", "/api/runs", "/api/runs/0", "/api/runs/0/series"),
                "step_page_s": (last,),
                "step_page_filtered_s": (
                    f"{middle}?sort=spread&order=desc&filter="
                    + urllib.parse.quote('reward < 0.5 and length > 100 and completion contains "ba"'),
                ),
                "group_s": (f"{last}/groups/100",) if steps else (),
                "completion_s": (f"{last}/groups/1/0",),
                "search_s": (f"/api/search?run=0&q={urllib.parse.quote(NEEDLE)}",),
                "prompts_s": ("/api/runs/0/prompts",),
                "prompts_again_s": ("/api/runs/0/prompts?sort=change",),
                "compare_s": (f"/api/compare?a=0&b=0&file_a=step-000001&file_b=step-{steps:06d}",),
            }
            for name, paths in pages.items():
                begun = time.perf_counter()
                answers = [fetch(address, token, path) for path in paths]
                figures[name] = time.perf_counter() - begun
                if name == "search_s":
                    found = json.loads(answers[0])
                    assert [hit["file"] for hit in found["hits"]] == ["step-000001"], found
                    figures["rows_searched"] = found["rows_searched"]
                if name == "step_page_s":
                    figures["step_page_kb"] = len(answers[0]) / 1e3
            return figures | {"peak_mib": memory_mib(server.pid)}
        finally:
            server.terminate()


def wait_for(address: str, token: str) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            fetch(address, token, "/api/describe")
            return
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def fetch(address: str, token: str, path: str) -> bytes:
    request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as response:
        return bytes(response.read())


def memory_mib(process: int) -> float:
    """Return the largest amount of memory that a process has used."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def export(run: Path, steps: int, folder: Path) -> dict[str, float]:
    """Return seconds and size of the HTML page of a step."""
    target = folder / "step.html"
    began = time.perf_counter()
    command = [sys.executable, "-m", "grpo", "view", str(run), "--html", str(target), "--step", str(steps)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return {"html_s": time.perf_counter() - began, "html_mb": target.stat().st_size / 1e6}


if __name__ == "__main__":
    main()
