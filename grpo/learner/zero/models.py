"""The models of one learner rank: policy and critic in DeepSpeed engines, and the frozen reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel

from grpo.config import AlgorithmConfig, Config
from grpo.learner import heads
from grpo.learner.heads import LogprobHead
from grpo.learner.protocol import Model
from grpo.learner.zero import setup
from grpo.learner.zero.weights import drop_gathered


@dataclass(slots=True, kw_only=True)
class Models:
    """Policy, critic and reference of one rank."""

    device: torch.device
    policy: Any
    head: LogprobHead
    critic: Any
    """None unless the advantages come from one."""
    reference: Any
    """An engine at ZeRO 3, else a plain model; None without a KL term."""
    reference_head: LogprobHead | None
    reference_home: str | torch.device
    """Where a plain reference is between steps: host memory with `learner.reference_offload`, else the device."""
    offloaded: bool = False
    """`offload` has left the device to the sampler."""

    def trained(self) -> dict[str, Any]:
        """Return the engines by name."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def engine(self, model: Model) -> Any:
        return self.policy if model == "policy" else self.critic

    @property
    def reference_module(self) -> Any:
        return getattr(self.reference, "module", self.reference)

    def offload(self) -> None:
        """Offload states and weights to host memory, which leaves the GPU memory to the sampler.

        A sharded reference stays. Pinned memory gains nothing on CPU and is used nevertheless: parameters then get new
        storage as they do on GPUs, so that tests on CPU find code that keeps the old storage.
        """
        if self.offloaded:
            return
        for engine in self.trained().values():
            engine.offload_states(pin_memory=True)
        if isinstance(self.reference, PreTrainedModel):
            self.reference.to("cpu")
        self.offloaded = True

    def reload(self) -> None:
        """Undo `offload`."""
        if not self.offloaded:
            return
        for engine in self.trained().values():
            engine.reload_states()
        if isinstance(self.reference, PreTrainedModel):
            self.reference.to(self.reference_home)
        self.offloaded = False


def build(config: Config, device: torch.device) -> Models:
    """Load the models and wrap those that are trained in DeepSpeed engines. A collective."""
    model = heads.load_policy(config)
    if config.learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head = heads.install(model, config)
    policy = setup.train_engine(config, model, config.optimizer)
    critic = None
    if config.algorithm.advantage == "gae":
        values = heads.load_critic(config)
        if config.learner.gradient_checkpointing:
            values.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        critic = setup.train_engine(config, values, config.critic.optimizer)
    reference, reference_head = None, None
    reference_home = "cpu" if config.learner.reference_offload else device
    if config.algorithm.kl_coef > 0:
        reference, reference_head = _load_reference(config, reference_home)
    return Models(
        device=device, policy=policy, head=head, critic=critic, reference=reference, reference_head=reference_head,
        reference_home=reference_home,
    )  # fmt: skip


def _load_reference(config: Config, home: str | torch.device) -> tuple[Any, LogprobHead]:
    """Load a frozen copy of the starting policy: sharded at ZeRO 3, else whole on every rank."""
    model = heads.load_policy(config).eval().requires_grad_(False)
    head = heads.install(model, config)
    if config.learner.zero_stage == 3:
        reference, *_ = deepspeed.initialize(
            model=model, config=setup.reference_config(config), dist_init_required=False
        )
        return reference, head
    return model.to(home), head


def reference_moves(models: Models, algorithm: AlgorithmConfig) -> bool:
    """Return whether the reference changes during the run."""
    return models.reference is not None and bool(algorithm.reference_refresh_every or algorithm.reference_average)


@torch.no_grad()
def move_reference(models: Models, algorithm: AlgorithmConfig, steps: int, zero_stage: int) -> None:
    """Copy the policy to the reference if that is due after `steps`, or move the reference towards it by
    `reference_average`.

    At ZeRO 3 each rank moves its own shards: policy and reference are sharded in the same way.
    """
    due = algorithm.reference_refresh_every and steps % algorithm.reference_refresh_every == 0
    share = 1.0 if due else algorithm.reference_average
    if not share or models.reference is None:
        return
    ours, theirs = models.policy.module.parameters(), models.reference_module.parameters()
    for p, r in zip(ours, theirs, strict=True):
        target, source = getattr(r, "ds_tensor", r).data, getattr(p, "ds_tensor", p).data
        target.lerp_(source.to(target.device), share)
    drop_gathered(list(models.reference_module.parameters()), zero_stage)
