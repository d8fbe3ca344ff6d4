"""Every benchmark ends with one JSON object; the bare torch floor has the gradient of the plain way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import (
    equality,
    evaluation,
    families,
    gpu_day,
    graders,
    logprobs,
    objectives,
    overhead,
    plan_memory,
    reasoning,
    recipe_hours,
    weight_check,
)
from benchmarks.result import print_result
from grpo.batching import TrainingRow, rank_steps
from grpo.cluster.cuda import LOADED_DRIVER
from grpo.config import Config, load
from grpo.types import Batch

ROOT = Path(__file__).resolve().parents[2]
HELPERS = {"__init__", "call_recorder", "curves", "result", "tiny_families"}
TESTED = {
    "overhead", "logprobs", "objectives", "reasoning", "graders", "evaluation", "recipe_hours", "plan_memory",
    "weight_check", "gpu_day", "families", "equality", "hops", "view",
}  # fmt: skip
"""`hops` in tests/unit/test_hops.py."""


def last_line(output: str) -> dict[str, Any]:
    """The JSON object that ends `output`."""
    assert output.endswith("\n")
    found = json.loads(output.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def figures(name: str, *arguments: str) -> dict[str, Any]:
    """The last line of `python -m benchmarks.<name>`, from the repository's root."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return last_line(done.stdout)


def test_every_benchmark_is_tested_here() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - HELPERS == TESTED


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_json_does_not_have_is_refused(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        print_result("some", rows=[{"ratio": value}])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", equality.cases())
def test_the_options_of_an_equality_case_are_valid(name: str) -> None:
    config = load(ROOT / equality.RECIPE, equality.cases()[name])
    assert config.run.steps == 3
    assert config.cluster.samplers + config.cluster.learner_ranks <= 4


def test_equality_sees_one_bit(tmp_path: Path) -> None:
    """Two runs that are the same but for their times are equal; one bit that differs is named."""

    def write(name: str, weights: str = "a", reward: float = 0.1, zero: float = 0.0, **more: float) -> Path:
        run = tmp_path / name
        (run / "samples").mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"weights_sha256": weights, "wall_s": len(name)}))
        line = {"step": 1, "time": 5.0, "time/step_s": float(len(name)), "reward/mean": reward, **more}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        table = pa.table({"seed": [1, 2], "sampler_logprobs": [[-0.5, float("nan")], [zero]]})
        pq.write_table(table, run / "samples" / "step-000001.parquet")
        return run

    first = write("first")
    assert equality.differences(first, write("the same")) == []
    assert equality.differences(first, write("weights", weights="b")) == ["summary.json: weights_sha256: a and b"]
    assert equality.differences(first, write("bit", zero=-0.0)) == ["step-000001.parquet: column sampler_logprobs"]
    other = float(np.nextafter(0.1, 1))
    assert equality.differences(first, write("metric", reward=other)) == [f"step 1: reward/mean: 0.1 and {other}"]
    assert equality.differences(first, write("more", **{"policy/loss": 1.0})) == ["step 1: policy/loss: None and 1.0"]


def test_families_continues_after_the_last_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def outcome_of(family: str, folder: Path) -> families.Result:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(family)
        return families.Result("refused", f"{folder}/model has | in it") if len(tried) == 1 else families.Result(
            "trained", difference=2e-6
        )  # fmt: skip

    monkeypatch.setattr(families, "outcome_of", outcome_of)
    monkeypatch.setattr(families, "import_engines", lambda: None)
    monkeypatch.setattr(families, "SHARED", ["one", "two", "three"])
    monkeypatch.setattr(sys, "argv", ["families", "--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        families.main()
    assert tried == ["one", "two"]
    tried.clear()
    families.main()
    assert tried == ["three"]
    found = last_line(capsys.readouterr().out)
    assert found == {"benchmark": "families", "families": 3, "tried": 3, "refused": 2, "trained": 1}
    table = (tmp_path / "families.md").read_text()
    assert "| `one` | refused | /model has / in it |" in table
    assert "| `two` | trained | 2e-06 |" in table


def test_recipe_hours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe_hours"])
    recipe_hours.main()
    found = last_line(capsys.readouterr().out)
    assert found["benchmark"] == "recipe_hours"
    assert set(found["recipes"]) == set(recipe_hours.ASSUMED)
    assert all(recipe["gpus"] >= 1 and recipe["hours"] > 0 for recipe in found["recipes"].values())


@pytest.mark.parametrize(
    "pieces",
    [
        ["kernels", "rows_16k"],
        pytest.param([], marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
    ids=["two pieces", "the whole day"],
)
def test_gpu_day_at_toy_sizes(pieces: list[str], tmp_path: Path) -> None:
    found = figures("gpu_day", "--toy", "--out", str(tmp_path), *pieces)
    assert found["failed"] == {}
    assert set(found["pieces"]) == set(pieces or gpu_day.PIECES)
    assert found["pieces"]["rows_16k"]["tokens_per_s"] > 0
    assert 0 < found["pieces"]["kernels"]["attention_error"] < 0.05
    page = (tmp_path / "README.md").read_text()
    assert all(f"## {piece}" in page for piece in found["pieces"])
    if not pieces:
        assert found["pieces"]["arithmetic"]["steps"] == found["pieces"]["smollm2"]["steps"] == 2
        (tmp_path / "kernels.json").unlink()
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
        assert figures("gpu_day", "--toy", "--out", str(tmp_path))["failed"] == {}  # makes what is missing
        assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
        assert (tmp_path / "kernels.json").exists()


def test_each_test_of_a_gpu_is_in_one_piece_of_a_gpu_day() -> None:
    """A piece that is over its limit is begun anew: with all tests in one, it might never end."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:xdist", "-m", "gpu", "tests/gpu"]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    here = [line for line in collected.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    assert collected.returncode == 0, collected.stdout
    assert len(here) == 6
    assert sorted(f"{gpu_day.GPU_TESTS}::{name}" for names in gpu_day.TESTS.values() for name in names) == sorted(here)
    assert max(sum("run" in name for name in names) for names in gpu_day.TESTS.values()) == 1
    assert gpu_day.TESTS.keys() < gpu_day.PIECES.keys()
    assert gpu_day.LIMIT_S <= 8 * 60


def test_gpu_day_reports_a_piece_that_fails_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"kernels": "it ended with 1", "rows_16k": ""}

    def run_piece(name: str, arguments: Sequence[str], out: Path) -> str:
        if not said[name]:
            (out / f"{name}.json").write_text(json.dumps({"machine": gpu_day.machine("cpu"), "figures": {"mfu": 0.5}}))
        return said[name]

    monkeypatch.setattr(gpu_day, "run_piece", run_piece)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--toy", "--out", str(tmp_path), "kernels", "rows_16k"])
    assert gpu_day.main() == 1
    assert "| mfu | 0.5 |" in (tmp_path / "README.md").read_text()


@pytest.mark.skipif(LOADED_DRIVER.exists(), reason="a machine with an NVIDIA driver: nothing is refused")
def test_gpu_day_without_a_gpu_says_what_is_missing() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_day"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no NVIDIA driver is loaded on this machine" in done.stderr
    assert "--toy runs everything on CPU" in done.stderr


def run_logprobs(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int], plain_limit: int) -> None:
    sizes = ["--vocabulary", "50", "--hidden", "4", "--pairs", "2", "--plain-limit", str(plain_limit)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["logprobs", *sizes, "--tokens", *map(str, tokens)])
    logprobs.main()


def test_logprobs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_logprobs(monkeypatch, [8], 4)
    found = last_line(capsys.readouterr().out)
    assert (found["benchmark"], found["vocabulary"], found["pairs"]) == ("logprobs", 50, 2)
    assert [row["tokens"] for row in found["memory"]] == [found["timed_tokens"]] == [8]
    assert found["memory"][0]["plain_mib"] is None
    assert 0 < found["ratio_low"] <= found["ratio"] <= found["ratio_high"]


def test_logprobs_marks_what_is_extrapolated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout=command[-1])  # a MiB a token

    monkeypatch.setattr(logprobs.subprocess, "run", measured)
    run_logprobs(monkeypatch, [8, 16, 64], 16)
    found = last_line(capsys.readouterr().out)
    assert [row["fused_mib"] for row in found["memory"]] == [8, 16, 64]
    assert [row["plain_mib"] for row in found["memory"]] == [8, 16, None]
    assert [row["plain_extrapolated_mib"] for row in found["memory"]] == [None, None, 64]


def test_graders(tmp_path: Path) -> None:
    row = {"question": "1 + 1", "answer": "2", "solution": "So it is \\boxed{2}.\n#### 2"}
    for name in (name for names in graders.SETS.values() for name in names):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    case = {"mode": "math", "core": True, "prediction": "\\boxed{3}", "gold": "3"}
    cases = [case | {"expected": expected} for expected in (1, 1, 0)]
    (tmp_path / "grader_cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in cases))
    found = figures("graders", str(tmp_path))
    assert (found["benchmark"], found["cases"], found["cases_as_expected"]) == ("graders", 3, 2)
    assert len(found["answers"]) == 6
    for answers in found["answers"].values():
        assert (answers["rows"], answers["right"], answers["changed_wrong"]) == (2, 2, 2)
        assert 0 < answers["median_ms"] <= answers["p99_ms"]


def test_reasoning(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "docs" / "results" / "reasoning", tmp_path / "reasoning")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["reasoning", "--table-only", "--out", str(tmp_path)])
    reasoning.main()
    found = last_line(capsys.readouterr().out)
    assert (found["benchmark"], found["recipe"]) == ("reasoning", "recipes/reasoning_cpu.yaml")
    assert found["runs"] == sum(len(variant["seeds"]) for variant in found["variants"].values()) > 0
    assert found["variants"]["grpo"]["after_less_first_mean"] == 0
    assert 0 < found["variants"]["grpo"]["after_mean"] <= 1


def test_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((ROOT / "docs" / "results" / "objectives" / "results.json").read_text())
    objectives.report(results, "recipes/arithmetic_cpu.yaml")
    found = last_line(capsys.readouterr().out)
    assert (found["benchmark"], found["recipe"]) == ("objectives", "recipes/arithmetic_cpu.yaml")
    assert list(found["variants"]) == list(results)
    for name, variant in found["variants"].items():
        assert (variant["after"] < found["bar"]) == (name in found["below_bar"])
        assert variant["gain_low"] <= variant["after"] - variant["before"] <= variant["gain_high"]
        assert variant["wall_s"] > 0


def test_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.report([(3.0, 2.0), (2.0, 2.0), (5.0, 4.0)], model="a/model", data="rows.jsonl", prompts=7, tokens=70)
    assert last_line(capsys.readouterr().out) == {
        "benchmark": "evaluation", "model": "a/model", "data": "rows.jsonl", "prompts": 7, "tokens": 70, "pairs": 3,
        "grpo_eval_s": 3.0, "bare_vllm_s": 2.0, "ratio": 1.25, "ratio_low": 1.0, "ratio_high": 1.5, "bar": 1.15,
    }  # fmt: skip


def test_plan_memory(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"model": "134M", "process": "learner", "predicted_gb": 1.0, "measured_gb": 1.25, "ratio": 0.8},
        {"model": "134M", "process": "sampler", "predicted_gb": 1.1, "measured_gb": 1.0, "ratio": 1.1},
    ]
    plan_memory.report(rows, 2048)
    assert last_line(capsys.readouterr().out) == {
        "benchmark": "plan_memory", "tokens_per_microbatch": 2048, "furthest_off": 0.25, "rows": rows,
    }  # fmt: skip


def test_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    def row(step: float, tokens: int) -> dict[str, float]:
        parts = dict.fromkeys(overhead.PARTS, 0.5)
        return {"step_s": step, **parts, "bare_vllm_s": 1.0, "bare_torch_s": 1.0, "microbatch_tokens": tokens}

    overhead.report([row(2.0, 64), row(3.0, 128), row(2.5, 64)], recipe="some.yaml", model="a/model", overrides=[])
    assert last_line(capsys.readouterr().out) == {
        "benchmark": "overhead", "recipe": "some.yaml", "model": "a/model", "overrides": [], "steps": 3, "step_s": 2.5,
        "sample_s": 0.5, "reward_s": 0.5, "batch_s": 0.5, "update_s": 0.5, "sync_s": 0.5, "bare_vllm_s": 1.0,
        "bare_torch_s": 1.0, "bare_torch_microbatch_tokens": 64, "ratio": 1.25, "ratio_low": 1.0, "ratio_high": 1.5,
    }  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors on one thread: several would wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def minibatch() -> tuple[Batch, ...]:
    """Microbatches of 13 rows of different lengths, one of them with tokens that were not sampled, and a filler."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(13):
        length = int(random.integers(1, 9))
        sampled = np.ones(length, dtype=np.bool_)
        sampled[1 : 3 if i == 4 else 1] = False
        rows.append(
            TrainingRow(
                rollout_index=i, prompt_ids=random.integers(1, 12, int(random.integers(2, 7))).tolist(), prompt=i // 4,
                completion_ids=random.integers(1, 12, length, dtype=np.int32), advantage=float(random.normal()),
                sampler_logprobs=np.full(length, -2.0, dtype=np.float32), sampled_mask=sampled, reward=0.0,
                has_spread=True, truncated=False,
            )
        )  # fmt: skip
    layout = {"ranks": 2, "tokens_per_microbatch": 40, "aggregation": "token_mean", "constant_length": 8, "epochs": 1}
    return tuple(batch for step in rank_steps([rows], **layout, kl_coef=0.0) for batch in step.minibatches[0])  # type: ignore[arg-type]


def plain_gradient(c: Config, model: Any, reference: Any, minibatch: Sequence[Batch]) -> Mapping[str, torch.Tensor]:
    """parameter -> gradient of the loss through all logits [B,T,V], batch by batch as they come."""

    def logprobs(of: Any, batch: Batch) -> torch.Tensor:
        logits = of(input_ids=batch.input_ids, use_cache=False).logits / c.sampling.temperature
        return torch.log_softmax(logits, -1).gather(-1, batch.target_ids[..., None])[..., 0]

    model.zero_grad()
    for batch in minibatch:
        now = logprobs(model, batch)
        loss = -torch.exp(now - now.detach()) * batch.advantages
        with torch.no_grad():
            ref = logprobs(reference, batch)
        k3 = torch.exp(ref - now) - 1 - (ref - now)
        ((loss + c.algorithm.kl_coef * k3) * batch.token_weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("family", "kl_coef", "checkpointing"), [("qwen2", 0.0, False), ("llama", 0.3, False), ("qwen2", 0.3, True)]
)
def test_the_bare_torch_floor_has_the_gradient_of_the_plain_way(
    family: str, kl_coef: float, checkpointing: bool, minibatch: tuple[Batch, ...], make_model: Callable[..., Path]
) -> None:
    options = [f"model.path={make_model(family)}", f"algorithm.kl_coef={kl_coef}", "sampling.temperature=0.7"]
    options.append(f"learner.gradient_checkpointing={str(checkpointing).lower()}")
    c = load(ROOT / "recipes" / "arithmetic_cpu.yaml", options)
    vocabulary = 4 * 5 * 15
    learner = overhead.BareLearner(c, [24], chunk_bytes=vocabulary)
    assert 1 < learner.chunk < 10
    reference = learner.reference if kl_coef else learner.model
    if kl_coef:
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = plain_gradient(c, learner.model, reference, minibatch)
    learner.model.zero_grad()
    learner.gradient(minibatch, 24)
    for name, parameter in learner.model.named_parameters():
        least = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=least)


def test_microbatches_of_the_floor_keep_to_the_budget_and_hold_every_weighted_token(
    minibatch: tuple[Batch, ...],
) -> None:
    parts = list(overhead.microbatches(minibatch, 24))
    assert all(weights.numel() <= 24 or len(weights) == 1 for _, _, _, weights in parts)
    widths = [weights.shape[1] for _, _, _, weights in parts]
    assert widths == sorted(widths, reverse=True)
    assert sum(len(weights) for _, _, _, weights in parts) == 13
    ours = sorted(float(w) for _, _, _, weights in parts for w in weights[weights != 0])
    assert ours == sorted(float(w) for b in minibatch for w in b.token_weights[b.token_weights != 0])


def test_weight_check(capsys: pytest.CaptureFixture[str]) -> None:
    """A fault is caught by either check, at whatever group."""
    common = {"plain_q90": 1.0, "plain_rms": 2.0, "full_q90": 3.0}
    rows = [
        weight_check.Row(fault="none", plain=False, full="", **common),
        weight_check.Row(fault="stale:a", plain=False, full="0", **common),
        weight_check.Row(fault="roll:b", plain=True, full="", **common),
    ]
    weight_check.report("folder", "bfloat16", 372, rows, {"a": 1.5})
    found = last_line(capsys.readouterr().out)
    assert (found["benchmark"], found["model"], found["probe_tokens"]) == ("weight_check", "folder", 372)
    assert [row["caught"] for row in found["rows"]] == [False, True, True]


def test_faults_of_a_tied_and_an_untied_model() -> None:
    names = [f"model.layers.{i}.mlp.{part}.weight" for i in range(12) for part in ("gate_proj", "up_proj")]
    tied, untied = weight_check.usual_faults(names), weight_check.usual_faults([*names, "lm_head.weight"])
    assert "packed-head" in tied
    assert "packed-head" not in untied
    assert "stale:lm_head" in untied
    for fault in (
        "stale:model.layers.6.",
        "swap:model.layers.11.mlp.gate_proj.weight,model.layers.11.mlp.up_proj.weight",
    ):
        assert fault in tied


@pytest.mark.usefixtures("one_thread")
def test_the_floor_steps_once_a_minibatch_at_every_budget(
    minibatch: tuple[Batch, ...], make_model: Callable[..., Path]
) -> None:
    from grpo.types import RankStep

    c = load(ROOT / "recipes" / "arithmetic_cpu.yaml", [f"model.path={make_model('qwen2')}"])
    learner = overhead.BareLearner(c, [16, 64])
    before = [parameter.clone() for parameter in learner.model.parameters()]
    seconds = learner.run(RankStep(minibatches=(minibatch,), epochs=2, kl_coef=0.0))
    assert set(seconds) == {16, 64}
    assert all(value > 0 for value in seconds.values())
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {4}
    assert all(map(torch.equal, before, learner.model.parameters()))  # weight decay, too, is times the rate of 0


def test_view(tmp_path: Path) -> None:
    found = figures("view", "--steps", "3", "--rows", "1024", "--folder", str(tmp_path))
    assert {name: found[name] for name in ("benchmark", "steps", "rows_per_step", "rows_searched")} == {
        "benchmark": "view", "steps": 3, "rows_per_step": 1024, "rows_searched": 3 * 1024,
    }  # fmt: skip
    assert all(found[name] > 0 for name in ("first_page_s", "step_page_s", "search_s", "peak_mib", "html_mb"))
    assert found["html_mb"] < 10
