"""What a step needs of the models and their optimizers; `grpo.learner.engine.Learner` is it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch

if TYPE_CHECKING:
    from grpo.types import Batch
    from grpo.update.prepare import Prepared

Model = Literal["policy", "critic"]


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
        """Apply the accumulated gradient and clear it. Returns its global norm before clipping; where that is not
        finite, nothing was applied, on any rank."""
        ...

    def set_aside(self, minibatch: Sequence[Batch], prepared: Sequence[Prepared], kl_coef: float) -> None:
        """Keep what an update was made of whose loss or gradient was not finite. A collective."""
        ...

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """The numbers added up over all ranks."""
        ...
