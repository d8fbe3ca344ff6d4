"""The same loop with sampler and learner sharing one GPU. Written against documented interfaces; see docs/gpu.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo.weight_sync import checksum

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_checksum_on_the_device_sees_swaps() -> None:
    tensor = torch.arange(1000.0, device="cuda")
    swapped = tensor.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor) != checksum(swapped)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_one_shared_gpu(dtype: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe(
        make_model("qwen2"), model={"dtype": dtype}, learner={"zero_stage": 2},
        cluster={"device": "gpu", "sampler_cpus": 0.5, "learner_cpus": 0.5},
        algorithm={"kl_coef": 0.01},
    )  # fmt: skip
    subprocess.run([sys.executable, "-m", "grpo", "train", str(recipe)], check=True, cwd=ROOT, timeout=900)
    run = recipe.parent / "runs" / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["policy/ratio_max"] == 1.0 for line in metrics)
