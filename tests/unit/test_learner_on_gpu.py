"""What a learner rank does on GPUs only, with CUDA's calls replaced by ones that are written down."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grpo.cluster import actors
from grpo.config import ClusterConfig, Config, DataConfig, LearnerConfig, ModelConfig, RunConfig
from grpo.config.schema import AlgorithmConfig
from grpo.learner import heads
from grpo.learner.zero.setup import Ranks
from grpo.learner.zero.synced import SyncedPolicy


def config_of(device: str, dtype: str = "bfloat16", *, threads: int | None = None) -> Config:
    return Config(
        model=ModelConfig(path="model", dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(train=[]),
        learner=LearnerConfig(threads=threads),
        algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2),
        run=RunConfig(steps=1),
        cluster=ClusterConfig(device=device, learner_ranks=2),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("device", "times"), [("cuda", 1), ("cpu", 0)])
def test_the_cache_of_activations_is_released(device: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the memory of a step's activations, in which the sampler's weights must find room."""
    released: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(True))
    models: Any = SimpleNamespace(device=torch.device(device))
    ranks: Any = None
    SyncedPolicy(models, ranks, zero_stage=2).drop_cache()
    assert len(released) == times


def test_ranks_wait_for_each_other_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier of NCCL is a kernel that turns on the GPU for as long as the sampler works there."""
    made: list[str] = []
    waited: list[object] = []

    def new_group(*, backend: str, timeout: object) -> str:
        made.append(backend)
        return f"group of {backend}"

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "barrier", lambda group: waited.append(group))
    monkeypatch.setattr(dist, "all_gather_object", lambda found, ours, group: waited.append(group))
    ranks = Ranks(config_of("gpu"), 0, torch.device("cuda"))
    ranks.barrier()
    ranks.gathered(None)
    assert made == ["gloo"]
    assert waited == ["group of gloo", "group of gloo"]


@pytest.mark.parametrize(
    ("device", "given", "threads"), [("gpu", None, [12]), ("gpu", 5, [5]), ("cpu", None, []), ("cpu", 5, [])]
)
def test_the_threads_of_a_rank(
    device: str, given: int | None, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs Ray allows one thread, with which AdamW in host memory would step: each of eight ranks gets an eighth of
    96 CPUs, before its engine is built. On CPU its environment says how many."""
    said: list[int] = []
    built: list[list[int]] = []
    monkeypatch.setattr(actors, "_log_to", lambda path: None)
    monkeypatch.setattr(actors, "network_environment", lambda host: {})
    monkeypatch.setattr(actors.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(actors, "_resources", lambda: {"CPU": 96.0, "GPU": 8.0})
    monkeypatch.setattr(actors, "join_store", lambda *_: None)
    monkeypatch.setattr(actors, "freeze_garbage", lambda: None)
    monkeypatch.setattr(actors, "set_threads", said.append)
    engine = ModuleType("grpo.learner.zero.engine")
    engine.__dict__["Learner"] = lambda *_: built.append(said.copy())
    monkeypatch.setitem(sys.modules, "grpo.learner.zero.engine", engine)
    monkeypatch.setattr("grpo.learner.zero.setup.init_process_group", lambda *_: torch.device("cpu"))
    actors.LearnerActor(config_of(device, threads=given), 1, "runs/run/logs/learner-1.log").start("127.0.0.1", 1)
    assert built == [threads]


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "chosen"),
    [
        ("gpu", "bfloat16", {2, 3}, "flash_attention_3"),
        ("gpu", "bfloat16", {2}, "flash_attention_2"),
        ("gpu", "bfloat16", set(), "sdpa"),
        ("gpu", "float32", {2, 3}, "sdpa"),  # both compute in 16 bits only
        ("cpu", "bfloat16", {2, 3}, "sdpa"),
    ],
)
def test_attention_is_chosen_by_what_is_installed(
    device: str, dtype: str, installed: set[int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "is_flash_attn_2_available", lambda: 2 in installed)
    monkeypatch.setattr(heads, "is_flash_attn_3_available", lambda: 3 in installed)
    from transformers import Qwen2Config

    assert heads.attention_of(config_of(device, dtype), Qwen2Config()) == chosen
