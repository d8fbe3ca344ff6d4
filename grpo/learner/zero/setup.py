"""Set-up of a learner rank: process group, DeepSpeed config, optimizer, schedule, and a check of the gradient scale."""

from __future__ import annotations

import logging
import math
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.distributed import Store  # type: ignore[attr-defined]

from grpo.config import Config, OptimizerConfig
from grpo.learner.zero.extensions import sole_build
from grpo.sync.weights import torch_dtype


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


def plain_grad_norm(module: torch.nn.Module) -> float:
    """Return the global gradient norm at ZeRO 0, where DeepSpeed computes none.

    ZeRO 0 trains in float32, and every rank has the complete gradients after the last `backward`.
    """
    norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm())


def backward(engine: Any, loss: torch.Tensor, *, last: bool, world_size: int) -> None:
    """Accumulate the gradient of `loss`, a share of the sum over the ranks; `last` ends the accumulation.

    DeepSpeed averages gradients over the ranks. The factor `world_size` turns the average into the sum.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * world_size)


def prove_gradient_scale(config: Config) -> None:
    """Check that `backward` on shares of a loss accumulates the gradient of their sum, and does so in float32.

    The check trains a temporary parameter w under the run's DeepSpeed config. Each rank contributes a microbatch of
    w/ranks and four of w/(512 ranks). One SGD step at lr 1 must then move w by exactly -(1 + 1/128). A sum in bfloat16,
    whose numbers above 1 differ by 1/128, would stay at 1.

    Raises RuntimeError, with the actual movement of w, if it does not.
    """
    world = config.cluster.learner_ranks

    class Scalar(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(8, dtype=torch_dtype(config.model.dtype)))

        def forward(self) -> torch.Tensor:
            return self.w.float().sum()

    model = Scalar()
    settings = deepspeed_config(config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config=settings,
        dist_init_required=False,
    )
    for share in (1.0, 1 / 512, 1 / 512, 1 / 512):
        backward(engine, engine() * share / world, last=False, world_size=world)
    backward(engine, engine() / (512 * world), last=True, world_size=world)
    engine.step()
    with deepspeed.zero.GatheredParameters([engine.module.w], enabled=config.learner.zero_stage == 3):
        moved = engine.module.w.detach().float().cpu()
    engine.destroy()
    if not torch.equal(moved, torch.full((8,), -1 - 1 / 128)):
        raise RuntimeError(
            f"DeepSpeed made {-float(moved[0]):g} of gradients that add up to {1 + 1 / 128:g} at ZeRO "
            f"{config.learner.zero_stage} with {world} ranks; the learner's steps would be wrong by that factor"
        )
