"""Token weights by hand, their sums, and that they do not depend on how a step is laid out."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.objective.aggregation import aggregation_weights
from grpo.objective.compatibility import Aggregation

ALL: tuple[Aggregation, ...] = get_args(Aggregation)
MEANS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "prompt_mean")

LENGTHS, PROMPTS = [1, 4, 5], [7, 7, 3]
BY_HAND: dict[Aggregation, list[float]] = {
    "token_mean": [1 / 10, 1 / 10, 1 / 10],
    "sequence_mean": [1 / 3, 1 / 12, 1 / 15],
    "sequence_sum": [1 / 3, 1 / 3, 1 / 3],
    "constant_length": [1 / 24, 1 / 24, 1 / 24],
    "prompt_mean": [1 / 10, 1 / 10, 1 / 10],
}

rows = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=12)


def weigh(lengths: list[int], prompts: list[int], aggregation: Aggregation) -> list[float]:
    return aggregation_weights(lengths, prompts, aggregation=aggregation, constant_length=8)


@pytest.mark.parametrize("aggregation", ALL)
def test_weights_by_hand(aggregation: Aggregation) -> None:
    assert weigh(LENGTHS, PROMPTS, aggregation) == pytest.approx(BY_HAND[aggregation], abs=1e-15)


def test_prompt_mean_by_hand_with_prompts_of_unequal_size() -> None:
    # three prompts with 3, 6 and 1 tokens
    weights = weigh([1, 6, 2, 1], [0, 1, 0, 5], "prompt_mean")
    assert weights == pytest.approx([1 / 9, 1 / 18, 1 / 9, 1 / 3], abs=1e-15)


@pytest.mark.parametrize("aggregation", ALL)
def test_loss_is_the_mean_that_its_name_says(aggregation: Aggregation) -> None:
    losses = [[2.0], [1.0, 3.0, 5.0, 7.0], [1.0, 1.0, 1.0, 1.0, 6.0]]  # row sums 2, 16, 10
    expected = {
        "token_mean": 28 / 10,
        "sequence_mean": (2 + 4 + 2) / 3,
        "sequence_sum": 28 / 3,
        "constant_length": 28 / (3 * 8),
        "prompt_mean": (18 / 5 + 10 / 5) / 2,
    }[aggregation]
    weights = weigh(LENGTHS, PROMPTS, aggregation)
    assert sum(w * sum(row) for w, row in zip(weights, losses, strict=True)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("aggregation", MEANS)
@given(rows)
def test_means_add_up_to_one(aggregation: Aggregation, step: list[tuple[int, int]]) -> None:
    lengths, prompts = [length for length, _ in step], [prompt for _, prompt in step]
    weights = weigh(lengths, prompts, aggregation)
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("aggregation", ALL)
@given(rows, st.data())
def test_row_order_and_prompt_names_do_not_matter(
    aggregation: Aggregation, step: list[tuple[int, int]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(step))))
    names = data.draw(st.permutations(range(10, 14)))
    before = weigh([n for n, _ in step], [p for _, p in step], aggregation)
    after = weigh([step[i][0] for i in order], [names[step[i][1]] for i in order], aggregation)
    assert after == pytest.approx([before[i] for i in order], abs=1e-15)


@pytest.mark.parametrize("aggregation", MEANS)
def test_a_split_step_needs_the_weights_of_the_whole(aggregation: Aggregation) -> None:
    lengths, prompts, values = [2, 3, 9, 1], [0, 0, 1, 1], [1.0, -2.0, 0.5, 4.0]
    weights = weigh(lengths, prompts, aggregation)
    parts = [sum(weights[i] * lengths[i] * values[i] for i in part) for part in ([0, 2], [1], [3])]
    whole = {
        "token_mean": (2 - 6 + 4.5 + 4) / 15,
        "sequence_mean": (1 - 2 + 0.5 + 4) / 4,
        "prompt_mean": (-4 / 5 + 8.5 / 10) / 2,
    }[aggregation]
    assert sum(parts) == pytest.approx(whole, abs=1e-12)
    of_parts = [
        w
        for part in ([0, 1], [2, 3])
        for w in weigh([lengths[i] for i in part], [prompts[i] for i in part], aggregation)
    ]
    assert of_parts != pytest.approx(weights)


def test_only_constant_length_reads_the_constant() -> None:
    for aggregation in ALL:
        other = aggregation_weights(LENGTHS, PROMPTS, aggregation=aggregation, constant_length=16)
        scale = 0.5 if aggregation == "constant_length" else 1.0
        assert other == pytest.approx([scale * w for w in weigh(LENGTHS, PROMPTS, aggregation)], abs=1e-15)
