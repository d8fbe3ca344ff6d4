"""A training from a checked recipe to its summary, without engines."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo import config as module
from grpo.checks.check import CheckedRun, check
from grpo.lifecycle import evaluate as evaluation
from grpo.lifecycle import train as lifecycle
from grpo.run.checkpoints import Manifest
from grpo.run.progress import Progress
from grpo.run.resume import Origin, Resumed
from grpo.types import ExitCode


@pytest.fixture
def plan(make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path) -> CheckedRun:
    recipe = make_recipe(make_model("qwen2"))
    options = ["cluster.reward_workers=2", f"run.dir={tmp_path / 'runs'}", "run.name=a", "run.tensorboard=false"]
    return check(module.load(recipe, options), recipe, tmp_path / "logs")


def trained(plan: CheckedRun, origin: Origin, step: int, monkeypatch: pytest.MonkeyPatch) -> lifecycle.Outcome:
    """Train from `step` on, with engines that are done at once."""
    manifest: Any = None
    if step:
        manifest = Manifest(
            format=1, step=step, config={}, fingerprints={}, versions={}, driver={}, learner={}, metrics={}, files={}
        )
    progress = Progress.start(plan.config, plan.prompts)
    progress.step = step
    resumed = Resumed(progress=progress, folder=None, manifest=manifest, lines=("resumed    it",) if step else ())
    monkeypatch.setattr(lifecycle, "run_with_restarts", lambda training: True)
    return lifecycle.train(plan, resumed, origin, Path("r.yaml"), time.monotonic() - 100)


def test_the_first_prompt_is_shown_at_the_first_start_and_the_time_of_all_sessions_at_the_end(
    plan: CheckedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = trained(plan, Origin(), 0, monkeypatch)
    assert outcome.code == ExitCode.DONE
    shown = capsys.readouterr().out.splitlines()
    [first] = [line for line in shown if line.startswith("first ")]
    assert plan.prompts[0].prompt_id in first
    assert re.fullmatch(r"wall time 1\d\d s", shown[-2])
    assert shown[-1] == f"run folder {outcome.run}"
    trained(plan, Origin(run=outcome.run, state=lifecycle.resume.state_of(outcome.run)), 1, monkeypatch)
    again = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("first ") for line in again)
    assert [line for line in plan.lines if line not in plan.shown] == list(plan.repeated_lines)
    assert "resumed    it" in again
    assert re.fullmatch(r"wall time 1\d\d s; 2\d\d s in 2 sessions", again[-2])
    summary = json.loads((outcome.run / "summary.json").read_text())
    assert summary["sessions"] == 2
    assert 100 <= summary["wall_s"] < 160
    assert 200 <= summary["wall_s_all_sessions"] < 320


@pytest.mark.parametrize("done", [0, 1])
def test_an_evaluation_shows_the_first_prompt_unless_it_has_begun(
    plan: CheckedRun, done: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = dataclasses.replace(plan, eval_prompts=plan.prompts[:3])
    left = {"d": plan.prompts[done:3]}
    monkeypatch.setattr(evaluation, "model_fingerprint", lambda path: "m")
    monkeypatch.setattr(evaluation, "sample", lambda *arguments: {})
    folder = evaluation.evaluation_folder
    monkeypatch.setattr(folder, "key_of", lambda *arguments: {})
    monkeypatch.setattr(folder, "unfinished", lambda *arguments: left)
    monkeypatch.setattr(folder, "report", lambda result: [])
    evaluation.evaluate(evaluated, "m", tmp_path / "evals")
    assert any(line.startswith("first ") for line in capsys.readouterr().out.splitlines()) == (done == 0)
