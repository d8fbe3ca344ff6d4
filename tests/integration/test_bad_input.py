"""The user's mistakes: one clear sentence, exit code 2, before any engine or Ray starts, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from grpo.commands import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("qwen2")


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *overrides: str, command: str = "train") -> str:
    capsys.readouterr()
    code = cli.main([command, str(recipe), *overrides])
    said = capsys.readouterr().err.strip()
    assert code == 2, said
    assert said.startswith("grpo: ")
    assert "Traceback" not in said
    assert not (recipe.parent / "runs").exists()
    return said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.group_sice=4"], "did you mean algorithm.group_size?"),
        (["data.train=nowhere/trian.jsonl"], "data.train"),
        (["model.path=./no_such_model"], "model.path=./no_such_model is not a folder"),
        (["data.template={quastion}="], "question"),
        (["data.max_prompt_tokens=5"], "data.max_prompt_tokens"),
        (["sampling.max_tokens=100", "learner.tokens_per_microbatch=4096"], "64 positions"),
        (["algorithm.prompts_per_step=1000"], "more than the number of prompts in data.train (64)"),
        (["rewards.0.file=reward_fns/arithmetics.py"], "did you mean"),
        (["rewards.0.name=arithmetics"], "did you mean arithmetic?"),
        (["data.gold_template=answer {answer}"], "gold"),
        (["cluster.sampler_cpus=100"], "ask for 101 CPUs"),
        (["cluster.device=gpu"], "no NVIDIA driver is loaded"),
        (["cluster.device=gpu", "cluster.gpus=0"], "of 0 GPUs"),
        (["cluster.tensor_parallel=5"], "does not divide the model's 2 attention heads; nearest: 2"),
        (["cluster.samplers=99"], "99 samplers and 1 learner ranks, colocated, ask for 100 CPUs"),
        (["data.answer_column=gold"], "data.answer_column=gold"),
        (["sampler.kv_cache_gib=99999"], "99999 GiB; this machine has"),
        (["rewards.0.file=reward_fns"], "rewards[0].file=reward_fns is a folder"),
        (["run.dir=~nobody_here/runs"], "begins with ~"),
        (["data.train=~nobody_here/x.jsonl"], "begins with ~"),
        (["model.path=~nobody_here/model"], "begins with ~"),
        (["data.template={question}\0="], "data.template must not hold a NUL character"),
        (["resme=auto"], "did you mean resume=?"),
        (["run.save_every=5", "run.keep_best=eval/accuracy"], "run.keep_best=eval/accuracy needs an evaluation"),
    ],
)
def test_mistakes_are_named(
    overrides: list[str], words: str, model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, make_recipe(model), *overrides)


def test_a_malformed_line_is_numbered(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    data = recipe.parent / "train.jsonl"
    lines = data.read_text().splitlines()
    lines[16] = lines[16][:-3]
    data.write_text("\n".join(lines) + "\n")
    assert "train.jsonl:17" in refused(capsys, recipe)


def test_a_secret_in_the_recipe_is_refused_and_not_repeated(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-31415926")
    recipe = make_recipe(model, data={"gold_template": "${oc.env:JUDGE_API_KEY}"})
    said = refused(capsys, recipe)
    assert "contains the value of the environment variable JUDGE_API_KEY" in said
    assert "31415926" not in said


def test_over_long_prompts_are_listed(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    with (recipe.parent / "train.jsonl").open("a") as data:
        data.write(json.dumps({"question": "123456+1", "answer": "7", "sum": 1}) + "\n")
    said = refused(capsys, recipe)
    assert "train.jsonl:65" in said
    assert "data.max_prompt_tokens" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def arithmetic(completion, row)\n    return 1.0\n", "arithmetic.py:1"),
        ("def arithmetic(completion, row):\n    return 0.0\n", "gold"),
        ("def arithmetic(completion, row):\n    return 1.0\n", "corrupted"),
        ("def arithmetic(completion, row):\n    raise RuntimeError('no')\n", "RuntimeError: no"),
    ],
)
def test_reward_files_are_tried(
    text: str, words: str, model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    path = recipe.parent / "arithmetic.py"
    path.write_text(text)
    assert words in refused(capsys, recipe, f"rewards.0.file={path}", command="check")


def test_a_taken_run_name_is_refused(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    taken = recipe.parent / "elsewhere" / "run"
    taken.mkdir(parents=True)
    (taken / "summary.json").write_text("{}")
    for command in ("train", "check"):
        said = refused(capsys, recipe, f"run.dir={taken.parent}", command=command)
        assert "exists already; choose another run.name" in said
    assert (taken / "summary.json").read_text() == "{}"


def test_a_run_folder_that_cannot_be_made_is_refused(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    (recipe.parent / "file").write_text("")
    assert "cannot be made: Not a directory" in refused(capsys, recipe, f"run.dir={recipe.parent / 'file'}")


def test_a_cluster_that_is_not_there_is_refused(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    started = time.monotonic()
    said = refused(capsys, make_recipe(model), f"cluster.address=127.0.0.1:{free}", command="check")
    assert f"cluster.address=127.0.0.1:{free}: nothing answers there" in said
    assert time.monotonic() - started < 30
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free}")  # as a shell's profile may set it
    said = refused(capsys, make_recipe(model), command="check")
    assert f"the environment variable RAY_ADDRESS=127.0.0.1:{free}: nothing answers there" in said
    assert "without it, a run starts a private Ray" in said


@pytest.mark.parametrize(
    "damage", ["cut short", "not safetensors", "a pointer", "gone", "a shard is gone", "bad index"]
)
def test_damaged_weights_are_refused(
    damage: str, model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    weights, index, named = copy / "model.safetensors", copy / "model.safetensors.index.json", "model.safetensors"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "not safetensors":
        weights.write_bytes(b"\x80\x02}q\x00.")
    elif damage == "a pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        named += " is a Git LFS pointer instead of the file"
    elif damage == "gone":
        weights.unlink()
    elif damage == "a shard is gone":
        named = "model-00002-of-00002.safetensors"
        weights.rename(copy / "model-00001-of-00002.safetensors")
        index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": named}}))
    else:
        weights.unlink()
        index.write_text("{}")
    for command in ("check", "train"):
        assert f"{copy}/{named}" in refused(capsys, make_recipe(copy), command=command)


def test_a_critic_that_cannot_be_is_refused(
    model: Path, make_model: Callable[..., Path], make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    for path, words in (
        ("/nonexistent", "critic.path=/nonexistent"),
        (str(make_model("llama", vocab_size=50)), "has a vocabulary of 50 and model.path one of"),
    ):
        said = refused(capsys, recipe, "algorithm.advantage=gae", f"critic.path={path}", command="check")
        assert words in said


def test_a_sharded_model_is_taken(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    transformers.AutoModelForCausalLM.from_pretrained(model).save_pretrained(copy, max_shard_size="100KB")
    (copy / "model.safetensors").unlink()
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    assert cli.main(["check", str(make_recipe(copy))]) == 0


def test_prompts_that_stand_there_twice_are_said(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    data = recipe.parent / "train.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines, lines[3], lines[3], lines[9]]) + "\n")
    assert cli.main(["check", str(recipe)]) == 0
    assert "3 of 67 prompts of data.train occur more than once" in capsys.readouterr().out


def test_a_model_with_dropout_is_refused(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(make_model("llama", attention_dropout=0.1))
    assert "attention_dropout=0.1" in refused(capsys, recipe)


def test_check_prints_the_plan(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(make_recipe(model))]) == 0
    said = capsys.readouterr().out
    assert "8 prompts x 4 completions = 32 rollouts" in said
    assert "gold 1, corrupted 0" in said
    assert "group_normalized, ppo_clip, token_mean" in said
    assert "no reference" in said
    assert "the ratio is exactly 1" in said


def test_a_dump_that_is_none_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said_of(folder: Path) -> str:
        assert cli.main(["replay", str(folder)]) == 2
        return capsys.readouterr().err.strip()

    assert "is not a complete dump of an update: it has no rank-0.safetensors" in said_of(tmp_path / "nowhere")
    (tmp_path / "rank-0.safetensors").write_bytes(b"rubbish")
    assert "it has no config.yaml" in said_of(tmp_path)
    (tmp_path / "config.yaml").write_text("run: {}\n")
    assert "it has no model/config.json" in said_of(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "config.yaml: data.train is required" in said_of(tmp_path)
    assert "Traceback" not in said_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_the_recipe_is_checked_ends_it_with_a_sentence(
    number: signal.Signals, model: Path, make_recipe: Callable[..., Path]
) -> None:
    reward = "import pathlib, time\npathlib.Path('{}').touch()\ntime.sleep(60)\ndef f(completion, row): return 0.0\n"
    recipe = make_recipe(model)
    (recipe.parent / "f.py").write_text(reward.format(recipe.parent / "loading"))
    command = [sys.executable, "-m", "grpo", "train", str(recipe), f"rewards.0.file={recipe.parent / 'f.py'}",
               "rewards.0.gold=false"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (recipe.parent / "loading").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert said == "grpo: interrupted before anything was started\n"
    assert not (recipe.parent / "runs").exists()
