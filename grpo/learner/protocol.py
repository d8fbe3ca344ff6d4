"""The interface of a step to the models and their optimizers; `grpo.learner.zero.engine` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch

if TYPE_CHECKING:
    from grpo.learner.prepare import Prepared
    from grpo.types import Batch

Model = Literal["policy", "critic"]


class StepEngine(Protocol):
    """One rank's models. Every method is a collective: all ranks call it, the same number of times."""

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logprobs of the targets and the entropy, [B,T] each, under the policy at the sampling temperature.

        Off the completion mask they may be anything finite.
        """
        ...

    def ref_logprobs(self, batch: Batch) -> torch.Tensor:
        """Return the same logprobs under the frozen reference, [B,T], without gradient."""
        ...

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the critic's value of the state after each token, [B,S] ids -> [B,S] values."""
        ...

    def backward(self, model: Model, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`, a share of the global sum. `last` marks an optimizer step's last call."""
        ...

    def optimizer_step(self, model: Model) -> float:
        """Apply the accumulated gradient and clear it; return its global norm before clipping.

        If the norm is not finite, no rank has applied anything.
        """
        ...

    def set_aside(self, minibatch: Sequence[Batch], prepared: Sequence[Prepared], kl_coef: float) -> None:
        """Save the inputs of an update whose loss or gradient was not finite. A collective."""
        ...

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Return each number summed over all ranks."""
        ...
