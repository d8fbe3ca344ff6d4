"""KL estimators by hand, and the gradient of each named choice against the exact one of an enumerated vocabulary."""

from __future__ import annotations

import math
from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from padded import rewards_to_go

from grpo.objective.compatibility import ILLEGAL_KL, Estimator, Gradient
from grpo.objective.kl import adapted_coefficient, anchor_kl, estimate, k1, k2, k3
from grpo.objective.losses import reinforce

ALL_PAIRS: list[tuple[Estimator, Gradient]] = list(product(get_args(Estimator), get_args(Gradient)))
LEGAL = [pair for pair in ALL_PAIRS if pair not in ILLEGAL_KL]

POLICY_LOGITS = torch.tensor([0.2, -1.1, 0.9, 0.0, -0.4], dtype=torch.float64)
REF = torch.log_softmax(torch.tensor([-0.6, 0.4, 0.1, 0.8, -1.5], dtype=torch.float64), 0)
POLICY = torch.log_softmax(POLICY_LOGITS, 0)
OTHER = torch.log_softmax(torch.tensor([1.0, -0.3, -0.2, 0.5, 0.3], dtype=torch.float64), 0)
"""Another policy, that sampled: old_logprobs after a first update."""

P, Q = POLICY.exp().tolist(), REF.exp().tolist()
D = [math.log(p / q) for p, q in zip(P, Q, strict=True)]


def through_softmax(slopes: list[float], sampling: list[float]) -> torch.Tensor:
    """sum over tokens a of sampling_a * slope_a * d log softmax_a / d logits."""
    total = sum(s * w for s, w in zip(slopes, sampling, strict=True))
    rows = [w * s - p * total for s, w, p in zip(slopes, sampling, P, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


KL = sum(p * d for p, d in zip(P, D, strict=True))

POLICY_TO_REF = torch.tensor([p * (d - KL) for p, d in zip(P, D, strict=True)], dtype=torch.float64)
"""Gradient of KL(policy || reference) = sum p log(p / q): p_j (d_j - KL)."""
REF_TO_POLICY = torch.tensor([p - q for p, q in zip(P, Q, strict=True)], dtype=torch.float64)
"""Gradient of KL(reference || policy) = -sum q log p + constant: p_j - q_j."""


def expected_gradient(estimator: Estimator, gradient: Gradient, sampled_by: torch.Tensor) -> torch.Tensor:
    """Of `anchor_kl` over all tokens as often as `sampled_by` draws them, with respect to the policy's logits."""
    logits = POLICY_LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)[None]
    value = anchor_kl(logprobs, sampled_by[None], REF[None], estimator=estimator, gradient=gradient, clamp=None)
    [grad] = torch.autograd.grad((sampled_by.exp() * value).sum(), logits)
    return grad


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() < 1e-12)


def test_estimators_by_hand() -> None:
    current = torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([0.0, -2.0, -0.5], dtype=torch.float64)
    by_hand = {
        "k1": [0.0, 1.0, -0.5],
        "k2": [0.0, 0.5, 0.125],
        "k3": [0.0, math.exp(-1) + 1 - 1, math.exp(0.5) - 0.5 - 1],
    }
    functions = {"k1": k1, "k2": k2, "k3": k3}
    for name, expected in by_hand.items():
        assert functions[name](current, reference).tolist() == pytest.approx(expected, abs=1e-15)
        assert estimate(current, reference, estimator=name).tolist() == pytest.approx(expected, abs=1e-15)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    assert float((POLICY.exp() * k1(POLICY, REF)).sum()) == pytest.approx(KL, abs=1e-12)
    assert float((POLICY.exp() * k3(POLICY, REF)).sum()) == pytest.approx(KL, abs=1e-12)
    expected_k2 = sum(p * d * d / 2 for p, d in zip(P, D, strict=True))
    assert float((POLICY.exp() * k2(POLICY, REF)).sum()) == pytest.approx(expected_k2, abs=1e-12)
    assert abs(expected_k2 - KL) > 0.005


logprob = st.floats(-40, 0)


@given(logprob, logprob, st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_never_negative(current: float, reference: float, dtype: torch.dtype) -> None:
    assert float(k3(torch.tensor([current], dtype=dtype), torch.tensor([reference], dtype=dtype))) >= 0


@given(st.floats(-1e-3, 1e-3), st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_never_negative_next_to_zero(difference: float, dtype: torch.dtype) -> None:
    value = k3(torch.full((17,), difference, dtype=dtype), torch.zeros(17, dtype=dtype))
    assert (value >= 0).all()
    assert value[0].item() == pytest.approx(difference**2 / 2, rel=1e-3, abs=1e-10)


def test_exact_gradients_are_those_of_autograd() -> None:
    logits = POLICY_LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    for value, by_formula in (
        ((logprobs.exp() * (logprobs - REF)).sum(), POLICY_TO_REF),
        ((REF.exp() * (REF - logprobs)).sum(), REF_TO_POLICY),
    ):
        [exact] = torch.autograd.grad(value, logits, retain_graph=True)
        torch.testing.assert_close(exact, by_formula, rtol=0, atol=1e-12)
    assert (POLICY_TO_REF - REF_TO_POLICY).abs().max() > 0.05


ON_POLICY: dict[tuple[Estimator, Gradient], str] = {
    ("k1", "autodiff"): "zero",
    ("k1", "k2"): "policy_to_ref",
    ("k1", "ratio_weighted"): "policy_to_ref",
    ("k2", "autodiff"): "policy_to_ref",
    ("k2", "k2"): "policy_to_ref",
    ("k2", "ratio_weighted"): "neither",
    ("k3", "autodiff"): "ref_to_policy",
    ("k3", "k2"): "policy_to_ref",
    ("k3", "ratio_weighted"): "policy_to_ref",
}
"""The table of the module's docstring."""


@pytest.mark.parametrize(("estimator", "gradient"), ALL_PAIRS)
def test_on_policy_each_choice_is_what_the_table_says(estimator: Estimator, gradient: Gradient) -> None:
    actual = expected_gradient(estimator, gradient, POLICY)
    targets = {
        "zero": torch.zeros(5, dtype=torch.float64),
        "policy_to_ref": POLICY_TO_REF,
        "ref_to_policy": REF_TO_POLICY,
    }
    said = ON_POLICY[estimator, gradient]
    for name, target in targets.items():
        assert (actual - target).abs().max() < 1e-12 if name == said else (actual - target).abs().max() > 0.02


def test_exactly_the_wrong_pairs_are_illegal() -> None:
    wrong = {pair for pair, said in ON_POLICY.items() if said in ("zero", "neither")}
    assert set(ILLEGAL_KL) == wrong


def test_ratio_weighted_k2_is_off_by_the_gradient_of_half_the_squared_log_ratio() -> None:
    mean = sum(p * d * d / 2 for p, d in zip(P, D, strict=True))
    excess = torch.tensor([p * (d * d / 2 - mean) for p, d in zip(P, D, strict=True)], dtype=torch.float64)
    actual = expected_gradient("k2", "ratio_weighted", POLICY)
    torch.testing.assert_close(actual, POLICY_TO_REF + excess, rtol=0, atol=1e-12)


def test_autodiff_k3_is_off_by_the_difference_of_the_two_kls() -> None:
    actual = expected_gradient("k3", "autodiff", POLICY)
    slopes = [1 - q / p for p, q in zip(P, Q, strict=True)]
    torch.testing.assert_close(actual, through_softmax(slopes, P), rtol=0, atol=1e-12)
    torch.testing.assert_close(actual, REF_TO_POLICY, rtol=0, atol=1e-12)


def off_policy_target(estimator: Estimator, gradient: Gradient) -> torch.Tensor:
    """Expected gradient under samples of OTHER, from the formulas."""
    sampling = OTHER.exp().tolist()
    if gradient == "ratio_weighted":
        return POLICY_TO_REF
    if gradient == "k2" or estimator == "k2":
        return through_softmax(D, sampling)
    return through_softmax([1 - q / p for p, q in zip(P, Q, strict=True)], sampling)


@pytest.mark.parametrize(("estimator", "gradient"), LEGAL)
def test_off_policy_only_ratio_weighted_is_unbiased(estimator: Estimator, gradient: Gradient) -> None:
    actual = expected_gradient(estimator, gradient, OTHER)
    torch.testing.assert_close(actual, off_policy_target(estimator, gradient), rtol=0, atol=1e-12)
    bias = float((actual - POLICY_TO_REF).abs().max())
    assert bias < 1e-12 if gradient == "ratio_weighted" else bias > 0.02
    assert float((actual - REF_TO_POLICY).abs().max()) > 0.02


@pytest.mark.parametrize(("estimator", "gradient"), ALL_PAIRS)
def test_value_is_the_estimators_whatever_the_gradient(estimator: Estimator, gradient: Gradient) -> None:
    value = anchor_kl(POLICY[None], OTHER[None], REF[None], estimator=estimator, gradient=gradient, clamp=None)
    for a in range(5):
        expected = {"k1": D[a], "k2": D[a] ** 2 / 2, "k3": Q[a] / P[a] - 1 + D[a]}[estimator]
        if gradient == "ratio_weighted":
            expected *= P[a] / math.exp(float(OTHER[a]))
        assert float(value[0, a]) == pytest.approx(expected, abs=1e-12)


def test_samples_tell_the_gradient_choices_apart() -> None:
    """40,000 tokens of OTHER: the mean gradient of each choice is its own target and no other choice's."""
    count = 40_000
    tokens = torch.multinomial(OTHER.exp(), count, replacement=True, generator=torch.Generator().manual_seed(0))
    score = torch.nn.functional.one_hot(tokens, 5).double() - POLICY.exp()
    for estimator, gradient in LEGAL:
        logprobs = POLICY[tokens][None].requires_grad_()
        value = anchor_kl(
            logprobs, OTHER[tokens][None], REF[tokens][None], estimator=estimator, gradient=gradient, clamp=None
        )
        [slope] = torch.autograd.grad(value.sum(), logprobs)
        samples = slope[0][:, None] * score
        mean, error = samples.mean(0), samples.std(0) / math.sqrt(count)
        own = off_policy_target(estimator, gradient)
        assert ((mean - own).abs() < 4 * error).all(), (estimator, gradient)
        for other in get_args(Gradient):
            target = off_policy_target(estimator, other)
            if (estimator, other) in ILLEGAL_KL or other == gradient or close(own, target):
                continue
            assert ((mean - target).abs() > 8 * error).any(), (estimator, gradient, other)


def test_only_kl_in_the_reward_has_the_gradient_of_the_sequence_kl() -> None:
    """Two tokens of two: the first moves the prefix of the second."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = [torch.randn(2, generator=generator).double(), 2 * torch.randn(2, 2, generator=generator).double()]
    sequences = list(product(range(2), repeat=2))

    def of_sequences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        heads, tails = torch.log_softmax(a, 0), torch.log_softmax(b, 1)
        return torch.stack([torch.stack([heads[x], tails[x, y]]) for x, y in sequences])

    logprobs, ref = of_sequences(first, second), of_sequences(*reference)
    chance = logprobs.sum(1).exp()
    exact = torch.autograd.grad((chance * (logprobs - ref).sum(1)).sum(), [first, second], retain_graph=True)
    mask = torch.ones(4, 2, dtype=torch.bool)
    returns = rewards_to_go(-k1(logprobs, ref).detach(), mask, gamma=1.0)
    in_reward = (chance.detach()[:, None] * reinforce(logprobs, returns).loss).sum()
    found = torch.autograd.grad(in_reward, [first, second], retain_graph=True)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    near = torch.cat([head.flatten() for head in exact])
    for estimator in ("k2", "k3"):  # refused: what a reward misses of their gradient is most of it
        returns = rewards_to_go(-estimate(logprobs, ref, estimator=estimator).detach(), mask, gamma=1.0)
        in_reward = (chance.detach()[:, None] * reinforce(logprobs, returns).loss).sum()
        got = torch.cat([g.flatten() for g in torch.autograd.grad(in_reward, [first, second], retain_graph=True)])
        assert (got - near).norm() > 0.5 * near.norm()
    for gradient in ("k2", "ratio_weighted"):
        value = anchor_kl(logprobs, logprobs.detach(), ref, estimator="k3", gradient=gradient, clamp=None)
        in_loss = (chance.detach()[:, None] * value).sum()
        found = torch.autograd.grad(in_loss, [first, second], retain_graph=True)
        torch.testing.assert_close(found[1], exact[1], rtol=0, atol=1e-12)  # no token follows: the same
        assert (found[0] - exact[0]).abs().max() > 0.02


@pytest.mark.parametrize(("estimator", "gradient"), LEGAL)
def test_clamp_holds_the_log_ratio_and_stops_its_gradient(estimator: Estimator, gradient: Gradient) -> None:
    logprobs = torch.tensor([[-0.5, -3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-0.4, -3.2, -1.0]], dtype=torch.float64)
    ref = torch.tensor([[-4.0, -0.5, -1.25]], dtype=torch.float64)  # log ratios 3.5, -2.5, 0.25
    value = anchor_kl(logprobs, old, ref, estimator=estimator, gradient=gradient, clamp=2.0)
    ratios = [1.0] * 3 if gradient != "ratio_weighted" else [math.exp(-0.1), math.exp(0.2), 1.0]
    formula = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}[estimator]
    held = [formula(2.0), formula(-2.0), formula(0.25)]
    expected = [r * v for r, v in zip(ratios, held, strict=True)]
    assert value.tolist()[0] == pytest.approx(expected, abs=1e-12)
    [grad] = torch.autograd.grad(value.sum(), logprobs)
    # the ratio of `ratio_weighted` is not clamped: its own gradient stays
    beyond = expected[:2] if gradient == "ratio_weighted" else [0.0, 0.0]
    assert grad.tolist()[0][:2] == pytest.approx(beyond, abs=1e-12)
    assert abs(float(grad[0, 2])) > 0.1
    free = anchor_kl(logprobs, old, ref, estimator=estimator, gradient=gradient, clamp=None)
    assert free.tolist()[0][2] == pytest.approx(expected[2], abs=1e-12)
    assert free.tolist()[0][0] == pytest.approx(ratios[0] * formula(3.5), abs=1e-12)


def test_coefficient_follows_the_target() -> None:
    # measured / target - 1 is 0.1, then cut to 0.2 and -0.2, then 0
    settings = {"target": 2.0, "horizon": 10.0}
    assert adapted_coefficient(0.5, 2.2, **settings) == pytest.approx(0.5 * 1.01, abs=1e-12)
    assert adapted_coefficient(0.5, 200.0, **settings) == pytest.approx(0.5 * 1.02, abs=1e-12)
    assert adapted_coefficient(0.5, 0.0, **settings) == pytest.approx(0.5 * 0.98, abs=1e-12)
    assert adapted_coefficient(0.5, 1.9, **settings) == pytest.approx(0.5 * 0.995, abs=1e-12)
    assert adapted_coefficient(0.5, 2.0, **settings) == 0.5
