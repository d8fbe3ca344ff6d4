"""Weight sync into a real vLLM engine: what arrives is used, and whatever is not is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("sync_process.py")


def run(model: Path, *, fixed: bool | str) -> dict[str, Any]:
    mode = fixed if isinstance(fixed, str) else str(int(fixed))
    done = subprocess.run([sys.executable, str(SCRIPT), str(model), mode], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_sync_is_complete_and_verified(family: str, make_model: Callable[..., Path]) -> None:
    result = run(make_model(family), fixed=True)
    assert result["first"] < 1e-4
    assert result["moved"].startswith("ok")
    assert result["cache_dropped"]
    assert [key for key in result if key.startswith("tensor")] == []  # each tensor alone arrives and is used
    assert "no slot for model.layers.0.nothing.weight" in result["extra"]
    assert "unfilled weights: model.norm.weight" in result["skipped"]
    assert "other data than was sent for model.norm.weight" in result["corrupt"]
    assert result["recovered"].startswith("ok")
    assert result["perturbed"] > 1e-3  # one percent on the norms, a hundred times what rounding explains
    assert result["crowd"] == [800, 800]  # 9,600 tokens of prompts at once, of which vLLM takes 8,192 in a step


def test_without_repacking_a_tied_head_the_sync_is_refused(make_model: Callable[..., Path]) -> None:
    result = run(make_model("qwen2"), fixed=False)
    assert "does not use them" in result["moved"]


def test_experts_are_packed_anew_at_each_sync(make_model: Callable[..., Path]) -> None:
    """Its head is not tied, so taking out what packs a tied one anew changes nothing."""
    result = run(make_model("qwen3_moe"), fixed=False)
    assert result["first"] < 1e-4
    assert result["moved"].startswith("ok")


def test_a_sync_through_the_buffer_of_a_gpu(make_model: Callable[..., Path]) -> None:
    """vLLM pads the model's vocabulary of 13 to 64 rows, and holds its layers' tensors until the end of the sync, when
    many other buckets have been in the buffer."""
    result = run(make_model("llama"), fixed="ipc")
    assert result["first"] < 1e-4
    assert result["moved"].startswith("ok")
    assert result["exports"] == 1
    assert result["used"] < 1e-4


def test_a_float32_head_is_one_in_the_sampler_too(make_model: Callable[..., Path]) -> None:
    result = run(make_model("qwen2"), fixed="head")
    assert result["sampler"] < 1e-4
    assert result["rounding"] > 1e-3  # what the projection in bfloat16 would be off by
