"""Signals in the first seconds of `grpo train`, sent to this process itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.commands import cli
from grpo.run import folder as run_folder
from grpo.run import resume
from grpo.types import ExitCode


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("asked", "code"), [(["resume=auto"], ExitCode.RESUMABLE), ([], ExitCode.INTERNAL)])
def test_a_signal_while_modules_are_imported_ends_a_run_with_a_checkpoint_with_75(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, asked: list[str], code: int
) -> None:
    """It is held until it is known whether there is one, and the work of checking is not begun."""
    recipe = make_recipe(Path("/nowhere/model"))
    run = recipe.parent / "runs" / "run"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    find = resume.find

    def slow_find(*arguments: Any) -> resume.Origin:
        os.kill(os.getpid(), signal.SIGTERM)
        return find(*arguments)

    def never(*_: Any) -> None:
        raise AssertionError("the run goes on")

    monkeypatch.setattr(resume, "find", slow_find)
    monkeypatch.setattr(run_folder, "choose", never)
    monkeypatch.setattr(resume, "prepare", never)
    assert cli.main(["train", str(recipe), *asked]) == code
