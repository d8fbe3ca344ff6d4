"""The user's mistakes: one clear sentence, exit code 2, before any engine or Ray starts, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo import cli


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
        (["algorithm.prompts_per_step=1000"], "more than data.train has prompts (64)"),
        (["rewards.0.file=reward_fns/arithmetics.py"], "did you mean"),
        (["rewards.0.name=arithmetics"], "did you mean arithmetic?"),
        (["data.gold_template=answer {answer}"], "gold"),
        (["sampler.cpus=100"], "ask for 101 CPUs"),
        (["learner.gpus=1", "sampler.gpus=1"], "GPUs"),
        (["sampler.num_samplers=99"], "99 samplers and 1 learner ranks ask for 100 CPUs"),
        (["data.answer_column=gold"], "data.answer_column=gold"),
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
    assert "exists already; choose another run.name" in refused(capsys, recipe, f"run.dir={taken.parent}")
    assert (taken / "summary.json").read_text() == "{}"


def test_a_run_folder_that_cannot_be_made_is_refused(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model)
    (recipe.parent / "file").write_text("")
    assert "cannot be made: Not a directory" in refused(capsys, recipe, f"run.dir={recipe.parent / 'file'}")


def test_a_cluster_that_is_not_there_is_refused(
    model: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, make_recipe(model), "cluster.address=127.0.0.1:1", command="check")
    assert "cluster.address=127.0.0.1:1" in said


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
    assert "the ratio is exactly 1" in said
