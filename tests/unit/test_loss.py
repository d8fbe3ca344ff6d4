"""The objective against naive loops written from the formulas, in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from grpo.loss import aggregation_weights, grpo_token_loss, truncated_importance_weight

EPS_LOW, EPS_HIGH, KL_COEF, CAP = 0.2, 0.3, 0.05, 1.5


def example(seed: int, rows: int = 5, positions: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return -torch.rand(rows, positions, generator=generator, dtype=torch.float64) * scale

    new = draw(2.0)
    lengths = torch.randint(1, positions, (rows,), generator=generator)
    return {
        "logprobs": new,
        "old_logprobs": new + 0.6 * torch.randn(rows, positions, generator=generator, dtype=torch.float64),
        "sampler_logprobs": new + 0.7 * torch.randn(rows, positions, generator=generator, dtype=torch.float64),
        "ref_logprobs": draw(2.0),
        "advantages": torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, positions).clone(),
        "completion_mask": torch.arange(positions)[None] < lengths[:, None],
    }


def token_loss(inputs: dict[str, torch.Tensor], **changes: object):
    arguments = {**inputs, "eps_low": EPS_LOW, "eps_high": EPS_HIGH, "kl_coef": KL_COEF, "importance_weight_cap": CAP}
    return grpo_token_loss(**{**arguments, **changes})


def naive_token(new: float, old: float, sampler: float, ref: float, advantage: float) -> tuple[float, float]:
    """(policy term, k3) of one token, straight from the formula."""
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - EPS_LOW), 1 + EPS_HIGH)
    policy = -min(ratio * advantage, clipped * advantage) * min(math.exp(old - sampler), CAP)
    return policy, math.exp(ref - new) - (ref - new) - 1


@pytest.mark.parametrize("seed", range(5))
def test_terms_equal_a_naive_loop(seed: int) -> None:
    inputs = example(seed)
    result = token_loss(inputs)
    for i in range(5):
        for t in range(7):
            if not inputs["completion_mask"][i, t]:
                assert result.total[i, t] == 0
                continue
            names = ("logprobs", "old_logprobs", "sampler_logprobs", "ref_logprobs", "advantages")
            policy, k3 = naive_token(*(float(inputs[name][i, t]) for name in names))
            assert float(result.policy[i, t]) == pytest.approx(policy, abs=1e-12)
            assert float(result.kl_ref[i, t]) == pytest.approx(k3, abs=1e-12)
            assert float(result.total[i, t]) == pytest.approx(policy + KL_COEF * k3, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_finite_differences(seed: int) -> None:
    inputs = example(seed)
    weights = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def value(new: torch.Tensor) -> torch.Tensor:
        return (weights * token_loss({**inputs, "logprobs": new}).total).sum()

    new = inputs["logprobs"].clone().requires_grad_()
    value(new).backward()
    step = 1e-6
    for i in range(5):
        for t in range(7):
            shift = torch.zeros(5, 7, dtype=torch.float64)
            shift[i, t] = step
            numeric = (value(new.detach() + shift) - value(new.detach() - shift)) / (2 * step)
            assert float(new.grad[i, t]) == pytest.approx(float(numeric), abs=1e-6)


def test_one_update_is_reinforce_and_clips_nothing() -> None:
    inputs = example(0)
    new = inputs["logprobs"].clone().requires_grad_()
    changes = {"kl_coef": 0.0, "ref_logprobs": None, "importance_weight_cap": 0.0}
    result = token_loss({**inputs, "logprobs": new}, old_logprobs=new.detach(), **changes)
    assert torch.equal(result.ratio, torch.ones_like(result.ratio))
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()
    result.total.sum().backward()
    torch.testing.assert_close(new.grad, torch.where(inputs["completion_mask"], -inputs["advantages"], 0.0))


def test_clip_sides_are_told_apart() -> None:
    ones = torch.ones(1, 4, dtype=torch.float64)
    ratio = torch.tensor([[0.5, 0.5, 2.0, 2.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    result = grpo_token_loss(
        logprobs=ratio.log(), old_logprobs=0 * ones, sampler_logprobs=0 * ones, advantages=advantages,
        completion_mask=ones.bool(), ref_logprobs=None, eps_low=EPS_LOW, eps_high=EPS_HIGH, kl_coef=0.0,
        importance_weight_cap=0.0,
    )  # fmt: skip
    assert result.clipped_low.tolist() == [[False, True, False, False]]
    assert result.clipped_high.tolist() == [[False, False, True, False]]


def test_padding_yields_no_nan_and_no_gradient() -> None:
    inputs = example(1)
    poison = torch.where(inputs["completion_mask"], 0.0, float("nan"))
    new = (inputs["logprobs"] + poison).requires_grad_()
    poisoned = {name: inputs[name] + poison for name in ("old_logprobs", "sampler_logprobs", "ref_logprobs")}
    total = token_loss({**inputs, **poisoned, "logprobs": new}).total
    torch.where(inputs["completion_mask"], total, 0.0).sum().backward()
    assert torch.isfinite(total).all()
    assert (new.grad[~inputs["completion_mask"]] == 0).all()


def test_importance_weight_is_truncated_above_only() -> None:
    old = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
    sampler = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    weight = truncated_importance_weight(old, sampler, cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([2.0, 1.0, math.exp(-2.0)], dtype=torch.float64))
    assert truncated_importance_weight(old, sampler, cap=0.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_weights_of_a_step_add_up_to_one_however_it_is_split(aggregation: str) -> None:
    rng = random.Random(3)
    lengths = [rng.randint(1, 9) for _ in range(11)]
    whole = {"denominator_tokens": sum(lengths), "denominator_rows": len(lengths)}
    weights = aggregation_weights(lengths, aggregation=aggregation, **whole)
    parts = [
        w for cut in (lengths[:4], lengths[4:]) for w in aggregation_weights(cut, aggregation=aggregation, **whole)
    ]
    assert parts == weights
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1.0, abs=1e-12)


def test_aggregations_by_hand() -> None:
    whole = {"denominator_tokens": 5, "denominator_rows": 2}
    assert aggregation_weights([1, 4], aggregation="token_mean", **whole) == [0.2, 0.2]
    assert aggregation_weights([1, 4], aggregation="sequence_mean", **whole) == [0.5, 0.125]
