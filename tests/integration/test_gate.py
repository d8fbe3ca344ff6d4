"""A run that learns nothing stays flat, and one that is tampered with stops within the step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("gate_process.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[str, Any]:
    """Ten steps at learning rate 0 with two minibatches each, untouched and tampered with in the third step."""
    from conftest import write_recipe

    folder = tmp_path_factory.mktemp("gate")
    recipe = write_recipe(
        folder, make_model("llama"), optimizer={"lr": 0.0}, run={"steps": 10, "tensorboard": False},
        algorithm={"minibatches_per_step": 2},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(recipe), str(folder)], capture_output=True, text=True, timeout=400
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def test_without_learning_nothing_drifts(runs: dict[str, Any]) -> None:
    assert runs["nothing"]["error"] == ""
    lines = runs["nothing"]["metrics"]
    assert len(lines) == 10
    for line in lines:
        assert line["mismatch/max"] < 1e-4
        assert abs(line["policy/ratio_mean"] - 1) < 1e-6
        assert line["policy/ratio_max"] < 1 + 1e-4  # the same weights in two passes
        assert line["policy/clip_fraction"] == 0
        assert line["policy/kl_old"] < 1e-9
    assert max(line["mismatch/mean"] for line in lines) < 3 * min(line["mismatch/mean"] for line in lines)


@pytest.mark.parametrize("how", ["swap", "perturb"])
def test_the_gate_stops_a_run_in_the_step_that_goes_wrong(how: str, runs: dict[str, Any]) -> None:
    """Two prompts' completions swapped, or one tensor of the sampler changed behind the protocol's back."""
    assert runs[how]["sampled"] == 3
    assert len(runs[how]["metrics"]) == 2
    assert "differ by" in runs[how]["error"]
