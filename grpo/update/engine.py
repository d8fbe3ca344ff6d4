"""What a step needs of the models and their optimizers; `grpo.learner.engine.Learner` is it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

Model = Literal["policy", "critic"]


class NonFiniteError(RuntimeError):
    """A loss, logprob or gradient is NaN or infinite; nothing of this step has been published."""


class StepEngine(Protocol):
    """One rank's models. Everything here is called by all ranks together, the same number of times."""

    def logprobs(self, input_ids: torch.Tensor, target_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B,T] ids -> logprobs of the targets and entropy, [B,T], under the policy at the sampling temperature."""
        ...

    def ref_logprobs(self, input_ids: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """[B,T] logprobs of the targets under the frozen reference; never with gradient."""
        ...

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[B,S] ids -> [B,S] the critic's value of the state after each token."""
        ...

    def backward(self, model: Model, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, a share of the global sum; `last` ends the optimizer step's accumulation."""
        ...

    def optimizer_step(self, model: Model) -> float:
        """Apply the accumulated gradient and clear it. Returns its global norm before clipping."""
        ...

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """The numbers added up over all ranks."""
        ...
