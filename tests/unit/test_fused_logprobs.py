"""Logprobs and entropy by chunks with recomputation, against the plain way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.objective.logprobs import selected_logprobs

ROWS, POSITIONS, HIDDEN, VOCABULARY = 2, 5, 3, 7


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight, bias = draw(ROWS, POSITIONS, HIDDEN), draw(VOCABULARY, HIDDEN), draw(VOCABULARY)
    return hidden, weight, bias, torch.randint(VOCABULARY, (ROWS, POSITIONS), generator=generator)


def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"temperature": 1.0, "float32_head": False, **changes}
    return selected_logprobs(hidden, weight, bias, targets, **settings)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_the_plain_way(temperature: float, tokens: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs()
    generator = torch.Generator().manual_seed(1)
    up = [torch.randn(ROWS, POSITIONS, generator=generator, dtype=torch.float64) for _ in range(2)]
    logits = hidden @ weight.t() + (bias if with_bias else 0.0)
    every = torch.log_softmax(logits / temperature, -1)
    plain = (every.gather(-1, targets[..., None])[..., 0], -(every.exp() * every).sum(-1))
    ours = call(
        hidden, weight, bias if with_bias else None, targets, temperature=temperature,
        chunk_elements=tokens * VOCABULARY,
    )  # fmt: skip
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    for use in ((up[0], None), (None, up[1]), (up[0], up[1])):
        sums = [
            sum((u * value).sum() for u, value in zip(use, pair, strict=True) if u is not None)
            for pair in (plain, ours)
        ]
        expected, found = (torch.autograd.grad(s, leaves, retain_graph=True) for s in sums)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_against_a_loop_without_torch() -> None:
    hidden, weight, bias, targets = inputs()
    logprobs, entropy = call(hidden, weight, bias, targets, temperature=0.7, chunk_elements=2 * VOCABULARY)
    for b in range(ROWS):
        for t in range(POSITIONS):
            logits = [
                sum(h * w for h, w in zip(hidden[b, t].tolist(), weight[v].tolist(), strict=True)) + bias[v].item()
                for v in range(VOCABULARY)
            ]
            weights = [math.exp(x / 0.7) for x in logits]
            shares = [w / sum(weights) for w in weights]
            assert logprobs[b, t].item() == pytest.approx(math.log(shares[int(targets[b, t])]), abs=1e-12)
            assert entropy[b, t].item() == pytest.approx(-sum(s * math.log(s) for s in shares), abs=1e-12)


def test_gradcheck() -> None:
    hidden, weight, bias, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w, b: call(h, w, b, targets, temperature=0.8, chunk_elements=3 * VOCABULARY), (hidden, weight, bias)
    )


def test_half_precision_is_reduced_in_float32_and_the_head_can_be_too() -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    wide = torch.log_softmax(hidden.double() @ weight.double().t() + bias.double(), -1)
    exact = wide.gather(-1, targets[..., None])[..., 0]
    rough, _ = call(hidden, weight, bias, targets)
    fine, _ = call(hidden, weight, bias, targets, float32_head=True)
    assert rough.dtype == fine.dtype == torch.float32
    assert float((fine - exact).detach().abs().max()) < 1e-6
    assert 1e-4 < float((rough - exact).detach().abs().max()) < 0.1
    gradients = torch.autograd.grad(fine.sum(), [hidden, weight, bias])
    expected = torch.autograd.grad(exact.sum(), [hidden, weight, bias])
    assert all(g.dtype == torch.bfloat16 for g in gradients)
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g.double(), e.double(), atol=0.02, rtol=0.02)


def test_a_frozen_projection_and_no_grad() -> None:
    hidden, weight, _, targets = inputs()
    logprobs, _ = call(hidden, weight.detach(), None, targets)
    logprobs.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        logprobs, entropy = call(hidden, weight, None, targets)
    assert not logprobs.requires_grad
    assert not entropy.requires_grad
