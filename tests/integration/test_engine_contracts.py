"""What the GPU paths rely on in vLLM, torch and DeepSpeed, against the sources that are installed.

The CPU build of vLLM carries the GPU's model runner, sleep mode and scheduler, which can be imported and asked.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from grpo.checks import families

VLLM = """
import inspect, json, os, sys
from types import SimpleNamespace
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
from vllm import EngineArgs, LLMEngine
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.executor.abstract import SLEEP_TAGS
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu.sample import gumbel, sampler, states
from grpo.config import AlgorithmConfig, ClusterConfig, Config, DataConfig, ModelConfig, RunConfig
from grpo.sampler.vllm import transfer
from grpo.sampler.vllm.engine import completion_of, engine_arguments

OURS = ("async_scheduling", "enforce_eager", "enable_chunked_prefill", "enable_sleep_mode", "kv_cache_memory_bytes")

def given(device, layout, transport):
    config = Config(
        model=ModelConfig(path=sys.argv[1]), data=DataConfig(train=[]), run=RunConfig(steps=1),
        algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2),
        cluster=ClusterConfig(device=device, layout=layout),
    )
    arguments = engine_arguments(config, transport, 0)
    return [getattr(arguments, name) for name in OURS] + [arguments.weight_transfer_config.backend]

def ended(reason, ids, logprobs):
    output = SimpleNamespace(token_ids=ids, logprobs=SimpleNamespace(logprobs=logprobs), finish_reason=reason)
    ids, logprobs, said = completion_of(output)
    return [list(ids), list(logprobs), said]

arguments = dict(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=32, load_format="safetensors")
on, off = (EngineArgs(async_scheduling=value, **arguments).create_engine_config() for value in (True, False))
ours = (transfer.SharedMemoryEngine, transfer.IpcEngine, transfer.BroadcastEngine)
print("RESULT " + json.dumps({
    "unsupported_by_the_new_runner": on._get_v2_model_runner_unsupported_features(),
    "async_on_cpu": [on.scheduler_config.async_scheduling, off.scheduler_config.async_scheduling],
    "given": [given("gpu", "colocated", "ipc"), given("gpu", "disaggregated", "nccl"),
              given("cpu", "colocated", "shared_memory")],
    "sleep_tags": sorted(SLEEP_TAGS),
    "head_sizes": CPUAttentionBackend.get_supported_head_sizes(),
    "wake_up": list(inspect.signature(LLMEngine.wake_up).parameters),
    "pools": [tag for tag in SLEEP_TAGS if f'tag="{tag}"' in inspect.getsource(gpu_worker)],
    "seeds_of_requests": inspect.getsource(states.SamplingStates.add_request),
    "seeds_in_the_kernel": inspect.getsource(sampler.Sampler._sample_random),
    "gumbel": list(inspect.signature(gumbel.gumbel_sample).parameters),
    "abstract": sorted(WeightTransferEngine.__abstractmethods__),
    "ended": [ended("stop", [5, 2], [-0.5, -0.25]), ended("abort", [5, 7], [-0.5]), ended("stop", [], [])],
    "missing": {engine.__name__: sorted(engine.__abstractmethods__) for engine in ours},
    "worker": [name for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights",
                                 "finish_weight_update") if not hasattr(gpu_worker.Worker, name)],
}))
"""


@pytest.fixture(scope="module")
def vllm(make_model: Callable[..., Path]) -> dict[str, Any]:
    return result_of(VLLM, make_model("qwen2"))


def result_of(script: str, model: Path) -> dict[str, Any]:
    """What a script with the model's folder as its argument prints behind RESULT."""
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def test_heads_that_are_computed_on_cpu(vllm: dict[str, Any]) -> None:
    assert tuple(vllm["head_sizes"]) == families.CPU_HEAD_SIZES


def test_seeds_are_drawn_in_the_sampling_kernel(vllm: dict[str, Any]) -> None:
    """No Python loop over completions: each request's seed is a row of a tensor that the kernel reads. An unseeded one
    draws its seed from numpy's generator, which no checkpoint keeps; so ours are seeded on GPUs, too."""
    assert "sampling_params.seed" in vllm["seeds_of_requests"]
    assert "np.random" in vllm["seeds_of_requests"]
    assert "self.sampling_states.seeds.gpu" in vllm["seeds_in_the_kernel"]
    assert "seed" in vllm["gumbel"]


def test_the_runner_is_the_new_one_where_triton_is(vllm: dict[str, Any]) -> None:
    assert vllm["unsupported_by_the_new_runner"] == []


def test_scheduling_beside_the_gpu_is_off_on_cpu_whatever_is_asked(vllm: dict[str, Any]) -> None:
    assert vllm["async_on_cpu"] == [False, False]


def test_what_vllm_is_given_on_each_device(vllm: dict[str, Any]) -> None:
    """In turn: scheduling beside the GPU, not eager (so with CUDA graphs), prompts in chunks, sleep, a KV cache of its
    own size, and the transport."""
    assert vllm["given"] == [
        [True, False, True, True, None, "grpo_ipc"],
        [True, False, True, False, None, "grpo_broadcast"],
        [False, True, False, False, 2**28, "grpo_shared_memory"],
    ]


def test_what_sleeps_and_wakes(vllm: dict[str, Any]) -> None:
    """The two tags that the samplers wake by, in turn; each is a pool of the GPU's worker."""
    assert vllm["sleep_tags"] == sorted(vllm["pools"]) == ["kv_cache", "weights"]
    assert vllm["wake_up"] == ["self", "tags"]


def test_a_request_that_ended_early_keeps_the_tokens_that_have_logprobs(vllm: dict[str, Any]) -> None:
    assert vllm["ended"] == [[[5, 2], [-0.5, -0.25], "stop"], [[5], [-0.5], "aborted"], [[], [], "aborted"]]


def test_our_engines_are_whole(vllm: dict[str, Any]) -> None:
    assert vllm["abstract"] == [
        "finish_weight_update", "init_transfer_engine", "receive_weights", "shutdown", "start_weight_update",
    ]  # fmt: skip
    assert vllm["missing"] == {"SharedMemoryEngine": [], "IpcEngine": [], "BroadcastEngine": []}
    assert vllm["worker"] == []


LOADING = """
import gc, json, sys
from pathlib import Path
from grpo.config import AlgorithmConfig, Config, DataConfig, ModelConfig, RunConfig
from grpo.learner.heads import load_policy

def own():
    gc.collect()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10

config = Config(model=ModelConfig(path=sys.argv[1], dtype="bfloat16"), data=DataConfig(train=[]),
                algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2), run=RunConfig(steps=1))
before = own()
model = load_policy(config)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print("RESULT " + json.dumps({"share": (own() - before) / size, "size": size}))
"""


def test_ranks_of_a_node_share_the_memory_of_the_model_that_they_load() -> None:
    """In its file's dtype a model is the mapped file: no rank has a copy of its own in host memory."""
    found = result_of(LOADING, stand_in.make_wide())
    assert found["size"] > 200e6
    assert found["share"] < 0.2


def test_where_torch_takes_the_number_of_the_device() -> None:
    """`grpo.sync.transport.IpcReceiver` puts its own there."""
    assert list(inspect.signature(rebuild_cuda_tensor).parameters)[6] == "storage_device"
