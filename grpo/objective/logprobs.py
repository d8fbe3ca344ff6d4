"""Hidden states -> logprob of each target token and entropy of each distribution, without materializing all logits.

The vocabulary projection is computed in chunks of tokens and recomputed in the backward pass. Memory holds one chunk of
float32 logits and its gradient at a time, so it does not grow with tokens x vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear

CHUNK_ELEMENTS = 1 << 26
"""Logits in memory at a time: 256 MiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitChange:
    """A model family's change to its logits after the projection: x -> scale * cap * tanh(x / cap)."""

    scale: float = 1.0
    cap: float | None = None
    """None: x -> scale * x."""

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Change `logits` in place, in their own dtype, and return them. The operations are in vLLM's order, so that
        both round in the same way."""
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slope(self, changed: torch.Tensor, temperature: float) -> torch.Tensor | float:
        """Return the derivative of the change at the point where its output is `changed * temperature`."""
        if self.cap is None:
            return self.scale
        return changed.mul(temperature / (self.scale * self.cap)).square_().neg_().add_(1.0).mul_(self.scale)


UNCHANGED = LogitChange()


def selected_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target_ids: torch.Tensor,
    *,
    temperature: float,
    float32_head: bool,
    change: LogitChange = UNCHANGED,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log softmax(change(hidden @ weight^T) / temperature) at the targets, and the entropy of that distribution.

    The sampler reports its logprobs after the same division (`logprobs_mode=processed_logprobs`). The projection and
    `change` are computed in the dtype of `hidden`, or in float32 with `float32_head`. Everything after them is computed
    in at least float32.

    Args:
        hidden: [B,T,H].
        weight: [V,H]; bias: [V].
        target_ids: [B,T] int64.
        change: the model family's change to its logits after the projection.
        chunk_elements: bound on tokens x V of a chunk; a chunk has at least one token.

    Returns:
        logprobs [B,T] and entropy [B,T] in nats, both with gradient to hidden, weight and bias.
    """
    size = max(1, chunk_elements // weight.shape[0])
    logprobs, entropy = _SelectedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), weight, bias, target_ids.flatten(), temperature, float32_head, change, size
    )
    return logprobs.view(target_ids.shape), entropy.view(target_ids.shape)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, change: LogitChange, temperature: float
) -> torch.Tensor:
    """Return the changed logits divided by the temperature, [n,H] -> [n,V], in at least float32.

    The result is a new tensor, which the caller may overwrite.
    """
    logits = change.apply_(linear(hidden, weight, bias))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _Context(Protocol):
    """torch's context, with what `_SelectedLogprobs.forward` stores for `backward`."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    settings: tuple[float, bool, LogitChange, int]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...


class _SelectedLogprobs(torch.autograd.Function):
    """d logprob / d logit_j = [j = target] - p_j;  d entropy / d logit_j = -p_j (log p_j + entropy)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        float32_head: bool,
        change: LogitChange,
        size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        matrix, offset = _in_head_dtype(weight, bias, float32_head)
        logprobs, entropies, norms = [], [], []
        for part, ids in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
            logits = _logits(part.to(matrix.dtype), matrix, offset, change, temperature)
            norm = torch.logsumexp(logits, dim=-1)
            logprobs.append(logits.gather(-1, ids[:, None])[:, 0] - norm)
            all_logprobs = logits.sub_(norm[:, None])
            entropies.append(-torch.linalg.vecdot(all_logprobs.exp(), all_logprobs))
            norms.append(norm)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, torch.cat(norms))
        ctx.settings = (temperature, float32_head, change, size)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: _Context, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, norms = ctx.saved_tensors
        temperature, float32_head, change, size = ctx.settings
        matrix, offset = _in_head_dtype(weight, bias, float32_head)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        with_entropy = bool(grad_entropy.any())
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            part = hidden[here].to(matrix.dtype)
            logits = _logits(part, matrix, offset, change, temperature)
            slope = change.slope(logits, temperature)
            all_logprobs = logits.sub_(norms[here, None])
            upstream = grad_logprobs[here].to(wide)
            if with_entropy:
                probabilities = all_logprobs.exp()
                scale = grad_entropy[here].to(wide)[:, None]
                grad = all_logprobs.add_(entropy[here, None]).mul_(scale).add_(upstream[:, None]).mul_(probabilities)
                grad = grad.neg_()
            else:
                grad = all_logprobs.exp_().mul_(-upstream[:, None])
            rows = torch.arange(len(part), device=part.device)
            grad[rows, targets[here]] += upstream
            if temperature != 1.0:
                grad.div_(temperature)
            if change != UNCHANGED:
                grad.mul_(slope)
            narrow = grad.to(matrix.dtype)
            grad_hidden[here] = narrow @ matrix
            if grad_weight is not None:
                if narrow.dtype == wide:
                    grad_weight.addmm_(narrow.t(), part)
                else:
                    grad_weight += narrow.t() @ part
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _in_head_dtype(
    weight: torch.Tensor, bias: torch.Tensor | None, float32_head: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the projection's weight and bias in the dtype in which it is computed."""
    if not float32_head or weight.dtype == torch.float64:
        return weight, bias
    return weight.float(), None if bias is None else bias.float()
