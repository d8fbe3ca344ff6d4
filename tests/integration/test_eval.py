"""`grpo eval` with real samplers: training's own numbers, from the cache, and after an interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import write_recipe, write_spread

ROOT = Path(__file__).resolve().parents[2]


def grpo(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "grpo", *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def result_in(said: str) -> tuple[Path, dict[str, Any]]:
    folder = Path(said.strip().splitlines()[-1].removeprefix("evaluation "))
    return folder, json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A run of two steps with evaluations."""
    root = tmp_path_factory.mktemp("eval")
    recipe = write_recipe(
        root,
        make_model("qwen2"),
        rewards=[write_spread(root)],
        data={"eval": {"sets": str(root / "eval.jsonl"), "samples_per_prompt": 4, "by": ["sum"]}},
    )
    grpo("train", str(recipe))
    return root / "runs" / "run"


@pytest.fixture(scope="module")
def evaluated(run: Path) -> tuple[Path, dict[str, Any]]:
    return result_in(grpo("eval", str(run), "--out", str(run.parent / "evals")))


def test_a_finished_run_is_evaluated_as_it_was_in_training(run: Path, evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, result = evaluated
    summary = json.loads((run / "summary.json").read_text())
    found = result["sets"]["eval"]
    assert found["avg"]["mean"] == pytest.approx(summary["accuracy_after"], abs=1e-12)
    assert found["prompts"] == 16
    assert found["failed"] == 0
    assert sum(part["prompts"] for part in found["by sum"].values()) == 16
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name: last[f"eval/accuracy/eval/sum/{name}"] for name in found["by sum"]} == {
        name: pytest.approx(part["avg"]["mean"], abs=1e-12) for name, part in found["by sum"].items()
    }
    columns = ["prompt_id", "sample_index", "completion_token_ids", "seed"]
    [ours] = (folder / "samples").glob("*.parquet")
    both = [
        sorted(pq.read_table(file, columns=columns).to_pylist(), key=lambda r: (r["prompt_id"], r["sample_index"]))
        for file in (ours, run / "samples" / "eval-000002.parquet")
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 64


def test_what_was_evaluated_is_not_evaluated_again(run: Path, evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, result = evaluated
    said = grpo("eval", str(run), "--out", str(folder.parent))
    assert f"evaluated before: {folder}" in said
    assert result_in(said)[1] == result
    said = grpo("eval", str(run), "--out", str(folder.parent), "data.eval.by=[]")
    assert f"evaluated before: {folder}" in said  # only the report is another
    assert "by sum" not in result_in(said)[1]["sets"]["eval"]
    other, fresh = result_in(grpo("eval", str(run), "--out", str(folder.parent), "data.eval.temperature=0.5"))
    assert other != folder
    assert fresh["sets"] != result["sets"]
    compared = grpo("compare", str(folder), str(other))
    assert [line.split() for line in compared.splitlines() if "temperature" in line] == [
        ["data.eval.temperature", "1.0", "0.5"]
    ]
    assert any(line.split()[:3] == ["eval", "16", "avg"] for line in compared.splitlines())


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was_cut(run: Path, evaluated: tuple[Path, dict[str, Any]]) -> None:
    """From a folder that holds some of the prompts, a file that was being written, and one that is damaged. That it
    holds a result, too, does not make it whole."""
    folder, result = evaluated
    copy = folder.parent.parent / "cut"
    subprocess.run(["cp", "-r", str(folder.parent), str(copy)], check=True)
    there = copy / folder.name
    (there / "evaluation.json").write_text("{}")
    [file] = (there / "samples").glob("*.parquet")
    pq.write_table(pq.read_table(file).slice(0, 5 * 4), there / "samples" / "000000.parquet")
    (there / "samples" / "000001.parquet").write_bytes(b"PAR1 and no more")
    (there / "samples" / "000002.parquet.partial").write_bytes(b"PAR1")
    said = grpo("eval", str(run), "--out", str(copy))
    assert "eval: 5 of 16 prompts have been evaluated before" in said
    assert "000001.parquet cannot be read" in said
    assert result_in(said)[1] == result
    assert not list((there / "samples").glob("*.partial"))


def test_a_signal_leaves_what_was_sampled(run: Path) -> None:
    out = run.parent / "stopped"
    command = [sys.executable, "-m", "grpo", "eval", str(run), "--out", str(out), "data.eval.samples_per_prompt=4000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as process:  # waits for its end
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("sampling"):
                    break
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read()
            assert process.wait(60) == 75, rest
        finally:
            process.kill()
    assert "the same command continues" in rest
    assert not list(out.glob("*/evaluation.json"))


@pytest.mark.slow
def test_after_an_outage_the_same_command_goes_on(run: Path, tmp_path: Path) -> None:
    """What was scored is kept, the rest is sampled again with the same seeds: the result is that of a judge that was
    never away. A judge that is away at the start is refused."""
    judge, away = tmp_path / "judge.py", tmp_path / "away"
    judge.write_text(
        "import pathlib\n\n\ndef judge(completion, row):\n"
        f"    if (away := pathlib.Path({str(away)!r})).exists() and row['sum'] >= int(away.read_text()):\n"
        "        raise ConnectionError('no route to the judge')\n"
        "    return float(len(completion) % 2)\n"
    )
    sums = sorted(json.loads(line)["sum"] for line in (run.parent.parent / "eval.jsonl").read_text().splitlines())
    command = ["eval", str(run), "--reward", str(judge), "--out"]
    away.write_text("0")
    said = grpo(*command, str(tmp_path / "evals"), code=2)
    assert "judge on data.eval.sets[0] (eval) fails on every row tried" in said
    away.write_text(str(sums[10]))
    kept = sum(value < sums[10] for value in sums)
    said = grpo(*command, str(tmp_path / "evals"), code=75)
    assert "no route to the judge" in said
    assert f"grpo: {kept} prompts have been evaluated and are kept; the same command continues" in said
    files = tmp_path.glob("evals/*/samples/*.parquet")
    failed = [kind for file in files for kind in pq.read_table(file)["failed"].to_pylist()]
    assert failed.count("exception") == 4 * (16 - kept)  # they can still be read
    away.unlink()
    said = grpo(*command, str(tmp_path / "evals"))
    assert f"eval: {kept} of 16 prompts have been evaluated before" in said
    result = result_in(said)[1]
    assert result["sets"]["eval"]["failed"] == 0
    assert result == result_in(grpo(*command, str(tmp_path / "others")))[1]


def test_bad_input_is_named(run: Path, tmp_path: Path) -> None:
    assert "no held-out data" in grpo("eval", str(run.parent.parent), code=2)
    data = str(run.parent.parent / "eval.jsonl")
    assert "names no reward (rewards); give it with --reward FILE" in grpo("eval", "a/b", "--data", data, code=2)
    reward = str(run.parent.parent / "spread.py")
    assert "is not a folder" in grpo("eval", "./nosuch", "--data", data, "--reward", reward, code=2)
    assert "does not exist" in grpo("eval", str(run), "--data", str(tmp_path / "x.jsonl"), code=2)
    assert "unknown option data.eval.tmperature" in grpo("eval", str(run), "data.eval.tmperature=1", code=2)
    (run / "model").rename(run / "elsewhere")
    try:
        assert "a run without a final model" in grpo("eval", str(run), code=2)
    finally:
        (run / "elsewhere").rename(run / "model")
