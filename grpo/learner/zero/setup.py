"""Set-up of a learner rank: its process group, and the DeepSpeed config, optimizer and schedule of its engines."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.distributed import Store  # type: ignore[attr-defined]

from grpo.config import Config, OptimizerConfig
from grpo.learner.zero.extensions import sole_build


def init_process_group(config: Config, rank: int, store: Store) -> torch.device:
    """Join the learner's process group (gloo on CPU, NCCL on GPU), initialize DeepSpeed, return this rank's device."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else DeepSpeed compiles it here, for half a minute
    on_gpu = config.on_gpu
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=config.cluster.learner_ranks,
        timeout=timedelta(seconds=config.cluster.step_timeout_s),
    )
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
    return device


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's config. We set the accumulation boundary ourselves, so DeepSpeed's own count stays 1."""
    learner = config.learner
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload in ("optimizer", "parameters"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.on_gpu}
    if learner.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def reference_config(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's config of the frozen reference: a ZeRO 3 engine without optimizer, sharded like the policy."""
    whole = deepspeed_config(config)
    zero = {key: value for key, value in whole["zero_optimization"].items() if key != "offload_optimizer"}
    return whole | {"zero_optimization": zero}


def train_engine(config: Config, model: torch.nn.Module, o: OptimizerConfig) -> Any:
    """Return a DeepSpeed engine that trains `model` with the optimizer and schedule of `o`."""
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(o, model, in_host_memory=config.learner.offload != "none"),
        config=deepspeed_config(config) | {"gradient_clipping": o.max_grad_norm},
        lr_scheduler=lambda optimizer: make_schedule(config, o, optimizer),
        dist_init_required=False,
    )
    engine.train()
    return engine


def make_optimizer(o: OptimizerConfig, model: torch.nn.Module, *, in_host_memory: bool) -> torch.optim.Optimizer:
    """Return the optimizer of `o`, with weight decay on matrices only, as usual for transformers.

    `in_host_memory`: AdamW keeps its states in host memory and steps on the CPU. DeepSpeed's AdamW does this several
    times faster than torch's. It is compiled at first use; if that fails, a warning is logged and torch's is used.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if o.name == "sgd":
        return torch.optim.SGD(groups, lr=o.lr)
    if in_host_memory:
        try:
            with sole_build("cpu_adam"):
                return DeepSpeedCPUAdam(groups, lr=o.lr, betas=o.betas, eps=o.eps, adamw_mode=True)
        except (RuntimeError, OSError) as error:  # it cannot be built, or the folder of builds cannot be written
            why = f"{error} ({error.__cause__})"
            logging.getLogger(__name__).warning("torch's AdamW steps in host memory, slower than DeepSpeed's: %s", why)
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)


def lr_factor(optimizer_step: int, *, schedule: str, warmup: int, total: int) -> float:
    """Return the factor on lr for the optimizer step that follows `optimizer_step` earlier ones.

    Warm-up reaches 1 at its last step and does not start at 0, which would waste a step. After it, linear and cosine
    fall to 0 at `total`.
    """
    if optimizer_step < warmup:
        return (optimizer_step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (optimizer_step - warmup) / max(1, total - warmup)
    return max(0.0, 1 - done) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_schedule(
    config: Config, o: OptimizerConfig, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning-rate schedule over all optimizer steps of the run."""
    total = config.run.steps * config.optimizer_steps_per_step
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_factor(step, schedule=o.schedule, warmup=o.warmup_steps, total=total),
    )


class Ranks:
    """One rank's view of the group that `init_process_group` joined; `device` is that function's result.

    Every method is a collective.
    """

    def __init__(self, config: Config, rank: int, device: torch.device) -> None:
        self.rank, self.count, self._device = rank, config.cluster.learner_ranks, device
        patience = timedelta(seconds=config.cluster.step_timeout_s)
        self._control = dist.new_group(backend="gloo", timeout=patience) if config.on_gpu else dist.group.WORLD

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Return each of `values` summed over the ranks."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def barrier(self) -> None:
        """Wait for every rank. The barrier runs on the CPU: a kernel that waits would occupy the sampler's GPU."""
        dist.barrier(group=self._control)

    def gathered(self, ours: Any) -> list[Any]:
        """Return the object `ours` of every rank, in the order of the ranks. The exchange runs on the CPU."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, ours, group=self._control)
        return found
