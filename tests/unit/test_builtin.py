"""Recipes and reward functions that are given by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grpo import builtin
from grpo.config import RewardConfig, find_recipe, load
from grpo.rewards.imports import locate
from grpo.types import UserError

ROOT = Path(__file__).resolve().parents[2]
REWARDS = "arithmetic, countdown, format, gsm8k, math_answer, multiple_choice, remote"


def refused(text: str, recipe: Path = Path("r.yaml")) -> str:
    with pytest.raises(UserError) as caught:
        locate([RewardConfig(file=text)], recipe)
    return str(caught.value).removeprefix(f"rewards[0].file={text} ")


def test_every_recipe_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    assert len(files) == 16
    assert builtin.names("recipes") == [file.stem if file.stem.isalpha() else file.name[:-5] for file in files]
    for file in files:
        assert find_recipe(file.name[: -len(".yaml")]) == file
    assert load("gsm8k_qwen2.5_0.5b").model.path == "Qwen/Qwen2.5-0.5B-Instruct"


def test_every_reward_of_a_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the copy of the recipe in a run folder, from which a run is evaluated and resumed."""
    monkeypatch.chdir(tmp_path)
    for name in builtin.names("recipes"):
        listed = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["rewards"]
        expected = [ROOT / "reward_fns" / f"{reward['file']}.py" for reward in listed]
        assert locate(load(name).rewards, tmp_path / "runs" / "a" / "config.yaml") == expected


def test_a_file_of_that_name_comes_first_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k", "arithmetic_cpu"):
        (tmp_path / name).mkdir()
    gsm8k = [RewardConfig(file="gsm8k")]
    assert locate(gsm8k, Path("r.yaml")) == [ROOT / "reward_fns" / "gsm8k.py"]
    assert find_recipe("arithmetic_cpu") == ROOT / "recipes" / "arithmetic_cpu.yaml"
    for name in ("gsm8k", "arithmetic_cpu"):
        (tmp_path / name).rmdir()
        (tmp_path / name).touch()
    assert locate(gsm8k, Path("r.yaml")) == [Path("gsm8k")]
    assert find_recipe("arithmetic_cpu") == Path("arithmetic_cpu")
    (tmp_path / "mine").mkdir()
    assert refused("mine") == "is a folder; it must be a Python file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gsm8", f"does not exist; built-in reward functions: {REWARDS}; did you mean gsm8k?"),
        ("math", f"does not exist; built-in reward functions: {REWARDS}; did you mean math_answer?"),
        ("zzz", f"does not exist; built-in reward functions: {REWARDS}"),
        ("mine", f"does not exist; built-in reward functions: {REWARDS}; did you mean mine.py?"),
        ("min", f"does not exist; built-in reward functions: {REWARDS}; did you mean mine.py?"),
        ("format2", f"does not exist; built-in reward functions: {REWARDS}; did you mean format2.py?"),
        ("gsm8k.py", "does not exist; did you mean gsm8k?"),
        ("reward_fns/gsm8k.py", "does not exist; did you mean gsm8k?"),
        ("./gsm8k", "does not exist; did you mean gsm8k?"),
    ],
)
def test_a_reward_that_is_not_there(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if said.endswith(".py?"):
        (tmp_path / said.split()[-1].rstrip("?")).touch()
    assert refused(text) == said


@pytest.mark.parametrize(
    ("text", "near", "listed"),
    [
        ("arithmetic_gpu", "arithmetic_cpu", True),
        ("gsm8k", "gsm8k_qwen2.5_0.5b", True),
        ("gsm8k_qwen2.5_1b", "gsm8k_qwen2.5_1.5b", True),
        ("zzz", None, True),
        ("recipes/arithmetic_cpu.yaml", "arithmetic_cpu", False),
        ("arithmetic_cpu.yaml", "arithmetic_cpu", False),
        ("zzz.yaml", None, False),
    ],
)
def test_a_recipe_that_is_not_there(
    text: str, near: str | None, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(text)
    listing = f"; built-in recipes: {', '.join(builtin.names('recipes'))}" if listed else ""
    assert str(caught.value) == f"recipe {text} does not exist{listing}{f'; did you mean {near}?' if near else ''}"


def test_the_script_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout; test_wheel has the installed package."""
    monkeypatch.chdir(ROOT)
    assert builtin.script_command("arithmetic") == "python recipes/arithmetic.py"
    monkeypatch.chdir(tmp_path)
    assert builtin.script_command("arithmetic") == f"python {ROOT}/recipes/arithmetic.py"
    assert builtin.script_command("mine") is None
