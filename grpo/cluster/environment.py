"""The environment of the engines' processes, which must be set before they import torch, vllm or deepspeed."""

from __future__ import annotations

from grpo.config import Config
from grpo.machine import usable_cpus

CPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    # waiting threads sleep: spinning would slow down everything else on these cores
    "OMP_WAIT_POLICY": "PASSIVE",
}

COMMON = {
    "PYTHONSAFEPATH": "1",  # vLLM starts `python -m ...`, which would let the working directory shadow modules
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # from torch, about calls that DeepSpeed makes in every step
}


def sampler_environment(config: Config) -> dict[str, str]:
    """Return the environment of a sampler process. It must be set before the process imports vllm or torch."""
    environment = COMMON | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the actor's process, where its model is accessible
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if not config.on_gpu:
        threads = config.sampler.threads or usable_cpus()
        environment |= CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
        if config.sampler_workers > 1:  # otherwise vLLM requires a NUMA node for each worker
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return environment


def learner_environment(config: Config, rank: int) -> dict[str, str]:
    """Return the environment of a learner process. It must be set before the process imports torch or deepspeed."""
    environment = COMMON | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(config.cluster.learner_ranks)}
    if not config.on_gpu:
        threads = config.learner.threads or max(1, usable_cpus() // config.cluster.learner_ranks)
        environment |= CPU_ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return environment
