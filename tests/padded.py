"""The objective's functions on padded [B,T] tensors with a mask: the tokens on the mask are their flat axis.

Results are put back at the mask, with what a function without effect would return elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grpo.objective import advantages as family
from grpo.objective import losses
from grpo.objective.losses import Rows


def rows_of(mask: torch.Tensor) -> Rows:
    return Rows(mask.nonzero()[:, 0], len(mask))


def put_back(values: torch.Tensor, mask: torch.Tensor, elsewhere: float = 0.0) -> torch.Tensor:
    return torch.full(mask.shape, elsewhere, dtype=values.dtype).masked_scatter(mask, values)


def policy_term(loss: Any, *, mask: torch.Tensor, **arguments: Any) -> losses.PolicyTerm:
    flat = {name: x[mask] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    term = losses.policy_term(loss, rows=rows_of(mask), **flat)
    return losses.PolicyTerm(
        loss=put_back(term.loss, mask),
        clipped_low=put_back(term.clipped_low, mask),
        clipped_high=put_back(term.clipped_high, mask),
    )


def importance_weight(old: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, *, level: Any) -> torch.Tensor:
    return put_back(losses.importance_weight(old[mask], sampler[mask], rows_of(mask), level=level), mask, 1.0)


def kept_sequences(
    old: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, *, low: float, high: float
) -> torch.Tensor:
    return losses.kept_sequences(old[mask], sampler[mask], rows_of(mask), low=low, high=high)


def rewards_to_go(token_rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    return put_back(family.rewards_to_go(token_rewards[mask], rows_of(mask), gamma=gamma), mask)


def generalized_advantages(
    token_rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    advantages, returns = family.generalized_advantages(token_rewards[mask], values[mask], rows_of(mask), **options)
    return put_back(advantages, mask), put_back(returns, mask)


def at_last_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return put_back(family.at_last_token(values, rows_of(mask)), mask)


def whiten(
    advantages: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    *,
    eps: float,
    all_sum: Callable[[Sequence[float]], list[float]],
) -> list[torch.Tensor]:
    flat = [values[mask] for values, mask in zip(advantages, masks, strict=True)]
    whitened = family.whiten(flat, eps=eps, all_sum=all_sum)
    return [put_back(values, mask) for values, mask in zip(whitened, masks, strict=True)]
