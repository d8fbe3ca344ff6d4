"""The wheel, installed outside the repository without its dependencies, and used from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = """
import json, sys
from pathlib import Path
from grpo import builtin
from grpo.cluster.upload import pack
from grpo.config import load
from grpo.rewards.imports import locate

recipe, job = Path(sys.argv[1]), Path(sys.argv[2])
job.mkdir()
pack(load(recipe), recipe, job)
print(json.dumps([str(builtin.PACKAGE), str(locate(load(recipe).rewards, recipe)[0])]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy of what it is made of."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("grpo", "recipes", "reward_fns"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    (tree / "recipes" / "tiny" / "arithmetic").mkdir(parents=True)
    (tree / "recipes" / "tiny" / "arithmetic" / "large.py").touch()
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(tree / "dist"), str(tree))
    [built] = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which it is installed."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--target", str(folder), str(wheel))
    return folder


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def pip(command: str, *arguments: str) -> None:
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


def python(site: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    """What Python prints, run in `folder` with the installed package first on its path and the repository not on it."""
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_the_recipes_and_rewards_are_in_the_package(wheel: Path) -> None:
    found = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("grpo-")}
    expected = {str(f.relative_to(ROOT)) for s in ("py", "typed", "yaml") for f in (ROOT / "grpo").rglob(f"*.{s}")}
    for folder, suffixes in (("recipes", ("py", "yaml")), ("reward_fns", ("py",))):
        expected |= {f"grpo/{folder}/{f.name}" for s in suffixes for f in (ROOT / folder).glob(f"*.{s}")}
    expected |= {str(file.relative_to(ROOT)) for file in (ROOT / "grpo" / "view" / "static").iterdir()}
    assert found == expected
    assert {"grpo/view/static/index.html", "grpo/view/static/style.css", "grpo/view/static/app.js"} <= found


def test_a_recipe_of_which_the_model_is_made_first(site: Path, empty: Path, arithmetic: Path) -> None:
    """`arithmetic` is what `python -m grpo.recipes.arithmetic` makes, in a minute."""
    said = python(site, empty, "-m", "grpo", "check", "arithmetic_cpu", code=2)
    command = "python -m grpo.recipes.arithmetic"
    assert said == f"grpo: model.path=recipes/tiny/arithmetic/base is not a folder; make it with: {command}\n"
    assert "--out" in python(site, empty, *command.split()[1:], "--help")
    (empty / "recipes" / "tiny").mkdir(parents=True)
    (empty / "recipes" / "tiny" / "arithmetic").symlink_to(arithmetic)
    said = python(site, empty, "-m", "grpo", "check", "arithmetic_cpu")
    assert "reward     arithmetic on data.train[0] (train): 3300 of 3300 gold answers score above 0" in said
    assert "nothing has been started" in said


def test_a_script_that_uses_another_writes_below_the_working_directory(site: Path, empty: Path) -> None:
    before = {path for path in site.rglob("*") if "__pycache__" not in path.parts}
    python(site, empty, "-m", "grpo.recipes.reasoning", "--untrained")
    assert (empty / "recipes" / "tiny" / "reasoning" / "base" / "config.json").is_file()
    assert "stand-ins" in python(site, empty, "-m", "grpo.recipes.stand_in", "--help")
    assert {path for path in site.rglob("*") if "__pycache__" not in path.parts} == before


def test_a_recipe_of_the_hub_is_planned_by_its_name(site: Path, empty: Path) -> None:
    assert "fits" in python(site, empty, "-m", "grpo", "plan", "gsm8k_qwen2.5_0.5b", "--gpu", "h100")


def test_a_built_in_reward_travels_with_a_job(site: Path, empty: Path) -> None:
    """And is found there by the same name, in the package that travels."""
    recipe = empty / "mine.yaml"
    recipe.write_text(
        "model: {path: /shared/model}\ndata: {train: /shared/train.jsonl}\nrewards: [{file: gsm8k}]\n"
        "algorithm: {prompts_per_step: 8, group_size: 4}\nrun: {steps: 2, dir: /shared/runs}\n"
    )
    job = empty / "job"
    packed = json.loads(python(site, empty, "-c", PACK, str(recipe), str(job)))
    assert packed == [str(site / "grpo"), str(site / "grpo" / "reward_fns" / "gsm8k.py")]
    there = json.loads(python(job, job, "-c", PACK, "mine.yaml", str(empty / "again")))
    assert there == [str(job / "grpo"), str(job / "grpo" / "reward_fns" / "gsm8k.py")]
