"""k3 and selected logprobs against naive sums."""

from __future__ import annotations

import math

import pytest
import torch

from grpo import logprobs as module
from grpo.kl import k3
from grpo.logprobs import selected_logprobs


def test_k3_by_hand() -> None:
    current = torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([0.0, -2.0, -0.5], dtype=torch.float64)
    expected = [0.0, math.exp(-1) + 1 - 1, math.exp(0.5) - 0.5 - 1]
    assert k3(current, reference).tolist() == pytest.approx(expected, abs=1e-15)


def test_k3_is_an_unbiased_estimate_of_the_kl() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    assert float((p * k3(p.log(), q.log())).sum()) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("chunk", [1, 13, 1 << 26])
def test_selected_logprobs_equal_a_naive_loop(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (2, 3), generator=generator)
    logprobs, entropy = selected_logprobs(logits, targets, temperature=temperature)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            shares = [w / sum(weights) for w in weights]
            assert logprobs[b, t].item() == pytest.approx(math.log(shares[int(targets[b, t])]), abs=1e-12)
            assert float(entropy[b, t]) == pytest.approx(-sum(s * math.log(s) for s in shares), abs=1e-12)
    assert not entropy.requires_grad
    logprobs.sum().backward()
    assert logits.grad is not None


def test_half_precision_logits_are_reduced_in_float32() -> None:
    logits = torch.full((1, 1, 1000), 3.0, dtype=torch.bfloat16)
    logprobs, _ = selected_logprobs(logits, torch.zeros(1, 1, dtype=torch.int64), temperature=1.0)
    assert logprobs.dtype == torch.float32
    assert float(logprobs) == pytest.approx(-math.log(1000), abs=1e-5)
