"""The same loop with sampler and learner sharing one GPU. Written against documented interfaces; see docs/gpu.md."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from grpo.sync.transport import IpcReceiver, IpcSender
from grpo.sync.weights import checksum

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


def receive(connection: Connection) -> None:
    """Another process on the GPU: answers each bucket with the checksums of what it copied out, at the end."""
    receiver, copies = IpcReceiver(torch.cuda.current_device()), []
    while (bucket := connection.recv()) is not None:
        [handle] = bucket.transport["handles"].values()
        copies.append(receiver.read(handle, bucket.transport["tensors"]))
        connection.send(None)
    connection.send([[checksum(tensor) for _, tensor in bucket] for bucket in copies])


def test_cuda_ipc_carries_every_bit_to_another_process() -> None:
    """Three buckets through one buffer, the last one larger than it."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    peer = multiprocessing.get_context("spawn").Process(target=receive, args=(there,))
    peer.start()
    sender, sent = IpcSender("here", torch.device("cuda", 0)), []
    for rows in (1 << 10, 1 << 12, 1 << 15):
        tensors = [("a", torch.randn(rows, 8192, device="cuda")), ("b", torch.randn(7, device="cuda").bfloat16())]
        bucket = sender.pack(tensors)
        sent.append(list(bucket.checksums))
        here.send(bucket)
        here.recv()
    here.send(None)
    assert here.recv() == sent
    peer.join(60)
    assert peer.exitcode == 0


@pytest.mark.parametrize("sleep", ["true", "false"])
def test_engines_that_share_a_gpu_give_the_same_run_asleep_and_awake(
    sleep: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    """With a full check after each step, an offloaded optimizer, and completions that are seeded."""
    recipe = make_recipe(
        make_model("qwen2"), model={"dtype": "bfloat16"}, learner={"offload": "optimizer"}, run={"verify_every": 1},
        cluster={"device": "gpu", "sampler_cpus": 0.5, "learner_cpus": 0.5},
    )  # fmt: skip
    command = [sys.executable, "-m", "grpo", "train", str(recipe), f"cluster.sleep={sleep}"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=900)
    metrics = [json.loads(line) for line in (recipe.parent / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["sync/movement_error"] < 0.5 for line in metrics if line["step"])
    assert ("memory/residual_gib" in metrics[-1]) == (sleep == "true")


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
