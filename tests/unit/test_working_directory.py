"""Files of the user in the working directory, or beside a reward file, that are called as modules are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo.cluster.environment import learner_environment, sampler_environment
from grpo.config import RewardConfig, load
from grpo.rewards.groups import RewardItem
from grpo.rewards.imports import imported
from grpo.rewards.pool import RewardPool
from grpo.types import Scored

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "aiohttp", "datasets", "deepspeed", "math_verify", "numpy", "omegaconf", "psutil", "pyarrow", "ray", "requests",
    "rich", "safetensors", "sympy", "tokenizers", "torch", "transformers", "vllm", "yaml",
)  # fmt: skip


@pytest.fixture
def hiding(tmp_path: Path) -> Path:
    """A folder with a file called as each module of Python and each package that this one uses."""
    folder = tmp_path / "hiding"
    folder.mkdir()
    for name in (*sys.stdlib_module_names, *PACKAGES):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was imported')\n")
    return folder


def test_commands_where_every_module_has_a_namesake(
    hiding: Path, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    recipe = make_recipe(make_model("qwen2"))
    for command in (["--version"], ["options"], ["check", str(recipe)]):
        ended = subprocess.run(
            [sys.executable, "-m", "grpo", *command], cwd=hiding, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
    assert "nothing has been started" in ended.stdout


def test_a_working_directory_that_pythonpath_names_stays(tmp_path: Path) -> None:
    (tmp_path / "grpo").symlink_to(ROOT / "grpo")
    ended = subprocess.run(
        [sys.executable, "-m", "grpo", "--version"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_reward_beside_namesakes_of_pythons_modules(hiding: Path, tmp_path: Path) -> None:
    """What it imports, and what that imports, is Python's own; its own helpers are those beside it, also where a
    package is called the same."""
    (hiding / "yaml.py").write_text("HALF = 0.5\n")
    file = hiding / "f.py"
    file.write_text(
        "import fractions, string, yaml\n"
        "def f(completion, row): return fractions.Fraction(len(string.digits), 10) + yaml.HALF\n"
    )
    item = RewardItem(completion="x", row={"a": 1}, messages=None, info={}, dataset="d")
    with RewardPool([RewardConfig(file=str(file))], files=[file], workers=1, log_dir=tmp_path / "logs") as pool:
        [outcome] = pool.submit([item]).result(timeout=60)
    assert outcome == Scored(value=1.5, parts={"f": 1.5})
    assert imported(file, Path()) == {Path("yaml.py"): hiding / "yaml.py"}


def test_what_an_engine_starts_does_not_look_there(make_recipe: Callable[..., Path]) -> None:
    """vLLM inspects a model in a `python -m ...` of its own."""
    config = load(make_recipe(Path("nowhere")))
    for environment in (sampler_environment(config), learner_environment(config, 0)):
        program = "import sys; print(sys.flags.safe_path)"
        ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert ended.stdout == "True\n"
