"""KL estimators, and what each choice of gradient is the gradient of: exact sums over a small vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo.objective.kl import adapted_coefficient, anchor_kl, estimate, k1, k2, k3
from grpo.objective.legal import ILLEGAL_KL

LOGITS = torch.tensor([0.9, -0.3, 0.2, -1.1, 0.4], dtype=torch.float64)
REF = torch.log_softmax(torch.tensor([-0.5, 0.8, 0.1, 0.6, -0.9], dtype=torch.float64), 0)


def expected_gradient(estimator: str, gradient: str, old_logits: Tensor = LOGITS, clamp: float | None = None) -> Tensor:
    """Gradient at LOGITS of the loss term, averaged exactly over tokens that the old policy samples."""
    logits = LOGITS.clone().requires_grad_()
    logprobs, old = torch.log_softmax(logits, 0), torch.log_softmax(old_logits, 0)
    term = anchor_kl(logprobs, old, REF, estimator=estimator, gradient=gradient, clamp=clamp)
    [found] = torch.autograd.grad((old.exp() * term).sum(), logits)
    return found


def exact_gradient(reverse: bool = False) -> Tensor:
    """Of KL(policy || reference), or of KL(reference || policy)."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    kl = (REF.exp() * (REF - logprobs)).sum() if reverse else (logprobs.exp() * (logprobs - REF)).sum()
    [found] = torch.autograd.grad(kl, logits)
    return found


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=1e-12, rtol=0))


UNBIASED = [("k1", "k2"), ("k1", "ratio_weighted"), ("k2", "autodiff"), ("k2", "k2"), ("k3", "k2"),
            ("k3", "ratio_weighted")]  # fmt: skip


@pytest.mark.parametrize(("estimator", "gradient"), UNBIASED)
def test_these_have_the_gradient_of_the_kl_to_the_reference(estimator: str, gradient: str) -> None:
    assert close(expected_gradient(estimator, gradient), exact_gradient())
    assert not close(exact_gradient(), exact_gradient(reverse=True))


def test_autodiff_k3_has_the_gradient_of_the_reversed_kl() -> None:
    found = expected_gradient("k3", "autodiff")
    assert close(found, exact_gradient(reverse=True))
    assert float((found - exact_gradient()).norm() / exact_gradient().norm()) > 0.2  # and it is far from the KL's here


def test_the_refused_pairs_are_wrong() -> None:
    assert close(expected_gradient("k1", "autodiff"), torch.zeros(5, dtype=torch.float64))
    off = expected_gradient("k2", "ratio_weighted")
    assert float((off - exact_gradient()).norm() / exact_gradient().norm()) > 0.1
    assert set(ILLEGAL_KL) == {("k1", "autodiff"), ("k2", "ratio_weighted")}


def test_only_the_ratio_makes_it_exact_after_the_policy_has_moved() -> None:
    """Tokens sampled by an older policy: k2's straight-through gradient is off, the ratio-weighted one is not."""
    old = LOGITS + torch.tensor([0.5, 0.0, -0.4, 0.3, -0.2], dtype=torch.float64)
    assert close(expected_gradient("k3", "ratio_weighted", old), exact_gradient())
    assert close(expected_gradient("k1", "ratio_weighted", old), exact_gradient())
    assert not close(expected_gradient("k3", "k2", old), exact_gradient())


@pytest.mark.parametrize("gradient", ["autodiff", "k2", "ratio_weighted"])
def test_samples_average_to_the_gradient_that_the_table_names(gradient: str) -> None:
    """200,000 sampled tokens of a fixed seed; the two KLs' gradients are 20 standard errors apart."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.multinomial(logprobs.detach().exp(), 200_000, replacement=True, generator=generator)
    taken = logprobs[tokens]
    term = anchor_kl(taken, taken.detach(), REF[tokens], estimator="k3", gradient=gradient, clamp=None)
    [found] = torch.autograd.grad(term.mean(), logits)
    forward, reverse = exact_gradient(), exact_gradient(reverse=True)
    near, far = (reverse, forward) if gradient == "autodiff" else (forward, reverse)
    assert float((found - near).norm()) < 0.1 * float((found - far).norm())


def test_values_by_hand() -> None:
    current = torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([0.0, -2.0, -0.5], dtype=torch.float64)
    assert k1(current, reference).tolist() == [0.0, 1.0, -0.5]
    assert k2(current, reference).tolist() == [0.0, 0.5, 0.125]
    assert k3(current, reference).tolist() == pytest.approx([0.0, math.exp(-1), math.exp(0.5) - 1.5], abs=1e-15)
    for name, value in (("k1", k1), ("k2", k2), ("k3", k3)):
        assert torch.equal(estimate(current, reference, estimator=name), value(current, reference))


def test_k3_is_never_negative_and_averages_to_the_kl() -> None:
    wide = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    assert (k3(wide, torch.zeros_like(wide)) >= 0).all()
    p, q = torch.log_softmax(LOGITS, 0), REF
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((p.exp() * k1(p, q)).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((p.exp() * k2(p, q)).sum()) != pytest.approx(exact, abs=1e-2)


@pytest.mark.parametrize("gradient", ["autodiff", "k2", "ratio_weighted"])
def test_the_value_is_the_estimators_whatever_the_gradient(gradient: str) -> None:
    p = torch.log_softmax(LOGITS, 0)
    assert torch.allclose(anchor_kl(p, p, REF, estimator="k3", gradient=gradient, clamp=None), k3(p, REF))


def test_beyond_the_clamp_there_is_no_gradient() -> None:
    current = torch.tensor([0.0, -5.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, -0.5], dtype=torch.float64)
    term = anchor_kl(current, current.detach(), reference, estimator="k2", gradient="autodiff", clamp=1.0)
    assert term.tolist() == [0.125, 0.5]
    [found] = torch.autograd.grad(term.sum(), current)
    assert found.tolist() == [0.5, 0.0]


def test_the_coefficient_follows_the_target_by_at_most_a_fifth() -> None:
    assert adapted_coefficient(0.1, 0.3, target=0.1, horizon=1) == pytest.approx(0.12)
    assert adapted_coefficient(0.1, 0.0, target=0.1, horizon=1) == pytest.approx(0.08)
    assert adapted_coefficient(0.1, 0.11, target=0.1, horizon=2) == pytest.approx(0.105)
    assert adapted_coefficient(0.1, 0.1, target=0.1, horizon=3) == 0.1
