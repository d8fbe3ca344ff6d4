"""Sums along rows by hand, and that no quantity of the objective depends on the layout or on other rows.

A layout is the order of the rows on the flat axis: padded rows are read row after row, packed rows in the order in
which they were packed. Sums and recurrences must be the same bits in every layout. The exponential of a number may
differ in its last bit with the number's place in memory.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import put_back, rows_of

from grpo.config import AlgorithmConfig
from grpo.learner.step import objective_terms
from grpo.objective.advantages import at_last_token, generalized_advantages, rewards_to_go, whiten
from grpo.objective.compatibility import LEGAL_AGGREGATIONS, PolicyLoss
from grpo.objective.losses import (
    Rows,
    aggregation_weights,
    clipped_value_loss,
    importance_weight,
    kept_sequences,
    policy_term,
)

Tensors = dict[str, torch.Tensor]
LOSSES: tuple[PolicyLoss, ...] = get_args(PolicyLoss)
OPTIONS: dict[str, Any] = {
    "eps_low": 0.2, "eps_high": 0.3, "dual_clip": 1.7, "tau_positive": 1.0, "tau_negative": 1.4,
}  # fmt: skip
BY_TOKEN = ("logprobs", "old", "sampler", "ref", "advantages", "rewards", "values", "old_values", "weights")
ALGORITHM = {"prompts_per_step": 1, "group_size": 2}
TERMS = {
    "token weights": AlgorithmConfig(**ALGORITHM, kl_coef=0.1, entropy_coef=0.1),
    "sequence weights": AlgorithmConfig(**ALGORITHM, importance_level="sequence", importance_mode="mask"),
    "rejected rows": AlgorithmConfig(**ALGORITHM, loss="gspo", rejection_low=0.9, rejection_high=1.1),
    "gmpo": AlgorithmConfig(**ALGORITHM, loss="gmpo", kl_coef=0.1, kl_gradient="ratio_weighted"),
}


EXACT = ("sum", "mean", "returns to go", "kl in the reward", "last", "gae", "gae returns", "value loss")
"""Quantities without an exponential."""


def layout(lengths: list[int]) -> Rows:
    return Rows(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), len(lengths))


def test_sums_and_means_by_hand() -> None:
    rows = Rows(torch.tensor([2, 2, 2, 0]), 4)  # rows 1 and 3 have no token
    values = torch.tensor([1.0, 2.0, 6.0, -4.0])
    assert rows.sum(values).tolist() == [-4.0, 0.0, 9.0, 0.0]
    assert rows.mean(values).tolist() == [-4.0, 0.0, 3.0, 0.0]
    assert rows.last_tokens().tolist() == [False, False, True, True]


def test_no_tokens_at_all() -> None:
    rows, none = Rows(torch.zeros(0, dtype=torch.int64), 1), torch.zeros(0)
    assert rows.sum(none).tolist() == rows.mean(none).tolist() == [0.0]
    assert rows.last_tokens().tolist() == []
    assert rewards_to_go(none, rows, gamma=0.9).tolist() == []
    assert at_last_token(torch.ones(1), rows).tolist() == []


def test_a_sum_of_many_small_numbers_keeps_them() -> None:
    """In float32, 2^24 + 1 is 2^24."""
    values = torch.ones(1001)
    values[0] = 2.0**24
    assert float(layout([1001]).sum(values)) == 2.0**24 + 1000


def test_gradients_of_sums_and_means() -> None:
    values = torch.zeros(5, requires_grad=True)
    rows = layout([2, 3])
    [slope] = torch.autograd.grad((torch.tensor([1.0, 10.0]) * rows.sum(values)).sum(), values)
    assert slope.tolist() == [1.0, 1.0, 10.0, 10.0, 10.0]
    [slope] = torch.autograd.grad((torch.tensor([1.0, 9.0]) * rows.mean(values)).sum(), values)
    assert slope.tolist() == [0.5, 0.5, 3.0, 3.0, 3.0]


def draw(lengths: list[int], seed: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Inputs by token, rows one after another, and inputs by row. Some ratios are far outside the clip range."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(count, generator=generator, dtype=dtype)

    total = sum(lengths)
    tokens = {name: normal(total, 1.0) for name in BY_TOKEN}
    for name in ("old", "sampler", "ref"):
        tokens[name] = tokens["logprobs"] + normal(total, 0.5)
    return tokens, {"reward": normal(len(lengths), 1.0), "final": normal(len(lengths), 1.0)}


def quantities(tokens: Tensors, of_rows: Tensors, rows: Rows) -> tuple[Tensors, Tensors]:
    """Every quantity of the objective with one value by token, and with one value by row."""
    t, by_token = tokens, Tensors()
    for loss in LOSSES:
        new = t["logprobs"].clone().requires_grad_()
        term = policy_term(
            loss, logprobs=new, old_logprobs=t["old"], advantages=t["advantages"], rows=rows, **OPTIONS
        )  # fmt: skip
        [gradient] = torch.autograd.grad((t["weights"] * term.loss).sum(), new)
        by_token |= {f"{loss} {name}": getattr(term, name) for name in ("loss", "clipped_low", "clipped_high")}
        by_token[f"{loss} gradient"] = gradient
    by_row = Tensors()
    for name, algorithm in TERMS.items():
        new = t["logprobs"].clone().requires_grad_()
        terms = objective_terms(
            logprobs=new, entropy=-new, old_logprobs=t["old"], ref_logprobs=t["ref"], sampler_logprobs=t["sampler"],
            advantages=t["advantages"], rows=rows, kl_coef=algorithm.kl_coef, algorithm=algorithm,
        )  # fmt: skip
        by_token |= {f"{name} {part}": getattr(terms, part) for part in ("total", "weight", "raw_weight")}
        [by_token[f"{name} gradient"]] = torch.autograd.grad((t["weights"] * terms.total).sum(), new)
        by_row[f"{name} rejected"] = terms.rejected
    for level in ("none", "token", "sequence"):
        by_token[f"{level} importance"] = importance_weight(t["old"], t["sampler"], rows, level=level)
    by_row["kept"] = kept_sequences(t["old"], t["sampler"], rows, low=0.8, high=1.25)
    by_row |= {"sum": rows.sum(t["values"]), "mean": rows.mean(t["values"])}
    by_token["returns to go"] = rewards_to_go(t["rewards"], rows, gamma=0.9)
    by_token["kl in the reward"] = rewards_to_go(t["ref"] - t["logprobs"], rows, gamma=1.0)
    by_token["last"] = at_last_token(of_rows["reward"], rows)
    advantages, returns = generalized_advantages(
        t["rewards"], t["values"], rows, gamma=0.9, lam=0.8, final_values=of_rows["final"]
    )
    by_token |= {"gae": advantages, "gae returns": returns}
    by_token["value loss"], by_token["value clipped"] = clipped_value_loss(
        t["values"], t["old_values"], returns, eps=0.4
    )
    return {n: x.detach() for n, x in by_token.items()}, {n: x.detach() for n, x in by_row.items()}


def spans(lengths: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]


some_lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@every_dtype
@settings(deadline=None, max_examples=25)
@given(some_lengths, st.integers(0, 10**6), st.data())
def test_packed_rows_in_any_order_equal_padded_ones(
    dtype: torch.dtype, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    tokens, of_rows = draw(lengths, seed, dtype)
    # padded: each row at a place of its own in [B,T], with padding before and after, and holes
    left = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    width = 2 * max(lengths) + 4
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, (start, length) in enumerate(zip(left, lengths, strict=True)):
        mask[row, start : start + 2 * length : 2] = True
    on_grid = {name: put_back(values, mask, 99.0) for name, values in tokens.items()}
    expected, expected_by_row = quantities({n: x[mask] for n, x in on_grid.items()}, of_rows, rows_of(mask))
    # packed: end to end in another order
    order = data.draw(st.permutations(range(len(lengths))))
    at = spans(lengths)
    packed = {name: torch.cat([values[at[row]] for row in order]) for name, values in tokens.items()}
    by_token, by_row = quantities(
        packed, {name: values[order] for name, values in of_rows.items()}, layout([lengths[row] for row in order])
    )
    pairs = {name: (values, expected_by_row[name][order]) for name, values in by_row.items()}
    for name, values in by_token.items():
        pairs[name] = values, torch.cat([expected[name][at[row]] for row in order])
    for name, (values, wanted) in pairs.items():
        tolerance = 0.0 if name in EXACT else {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
        torch.testing.assert_close(values, wanted, rtol=tolerance, atol=tolerance, msg=name)


@every_dtype
@pytest.mark.parametrize("strange", [7.0, float("inf"), float("nan")])
@settings(deadline=None, max_examples=15)
@given(some_lengths, st.integers(0, 10**6), st.data())
def test_a_row_never_influences_another(
    dtype: torch.dtype, strange: float, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    tokens, of_rows = draw(lengths, seed, dtype)
    rows = layout(lengths)
    before, before_by_row = quantities(tokens, of_rows, rows)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    others = rows.ids != changed
    for values in tokens.values():
        values[~others] = strange
    for values in of_rows.values():
        values[changed] = strange
    after, after_by_row = quantities(tokens, of_rows, rows)
    for name, values in after.items():
        assert torch.equal(values[others], before[name][others]), name
    for name, values in after_by_row.items():
        other_rows = torch.arange(len(lengths)) != changed
        assert torch.equal(values[other_rows], before_by_row[name][other_rows]), name


PAIRS = [(loss, aggregation) for loss in LOSSES for aggregation in LEGAL_AGGREGATIONS[loss]]


@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=6), st.integers(0, 10**6), st.data()
)
def test_the_loss_of_a_step_does_not_depend_on_the_order_of_its_rows(
    loss: PolicyLoss, aggregation: Any, step: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    """Whitened advantages, and a sum over all tokens: equal up to the order of additions."""
    order = data.draw(st.permutations(range(len(step))))
    tokens, _ = draw([length for length, _ in step], seed, torch.float64)
    at = spans([length for length, _ in step])

    def total(order: list[int]) -> float:
        t = {name: torch.cat([values[at[row]] for row in order]) for name, values in tokens.items()}
        lengths, prompts = [step[row][0] for row in order], [step[row][1] for row in order]
        rows = layout(lengths)
        weights = aggregation_weights(lengths, prompts, aggregation=aggregation, constant_length=11)
        [advantages] = whiten([t["advantages"]], eps=1e-8, all_sum=list)
        term = policy_term(
            loss, logprobs=t["logprobs"], old_logprobs=t["old"], advantages=advantages, rows=rows, **OPTIONS
        )  # fmt: skip
        return float((torch.tensor(weights, dtype=torch.float64)[rows.ids] * term.loss).sum())

    assert total(order) == pytest.approx(total(list(range(len(step)))), abs=1e-12, rel=1e-12)
