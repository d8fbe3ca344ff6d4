"""Data sets with weights: shares, order, retired prompts and resuming."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import DataConfig, TrainSetConfig
from grpo.data import Cursor, MixedCursor, most_in_one_draw, restore_cursor, start_cursor
from grpo.types import Prompt, UserError


def prompts_of(**sizes: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"{name}:{i}:h", token_ids=(1,), text="", row={}, messages=None, dataset=name, where="")
        for name, size in sizes.items()
        for i in range(size)
    ]  # fmt: skip


def data_of(*weights: float | None, seed: int = 0) -> DataConfig:
    return DataConfig(train=[TrainSetConfig(path=f"{i}.jsonl", weight=w) for i, w in enumerate(weights)], seed=seed)


def sets_of(indices: list[int], sizes: list[int]) -> list[int]:
    ends = list(accumulate(sizes))
    return [next(i for i, end in enumerate(ends) if index < end) for index in indices]


def test_turns_by_hand() -> None:
    """Shares 1/2, 1/3, 1/6. The m-th draw of a may come from draw 2m - 1 on and is due at 2m; of b from 3m - 2 on, due
    at 3m; of c from 6m - 5 on, due at 6m."""
    cursor = MixedCursor({"a": 50, "b": 50, "c": 50}, [3, 2, 1], seed=0)
    turns = "".join("abc"[i] for i in sets_of(cursor.draw(12, ()), [50, 50, 50]))
    assert turns == "ababac" * 2


def test_without_weights_all_rows_are_one_pool() -> None:
    mixed = start_cursor(prompts_of(a=3, b=4), data_of(None, None, seed=5))
    alone = Cursor(7, seed=5)
    assert [mixed.draw(4, ()) for _ in range(5)] == [alone.take(4) for _ in range(5)]
    assert mixed.epochs_by_set == {}


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1, 2, 3, 7, 19, 0.1, 0.25, 0.7, 1e-3]), min_size=2, max_size=9),
    takes=st.lists(st.integers(0, 12), min_size=1, max_size=25),
)
def test_shares_hold_to_within_one_after_every_draw(weights: list[float], takes: list[int]) -> None:
    sizes = [20 + i for i in range(len(weights))]
    cursor = MixedCursor({str(i): size for i, size in enumerate(sizes)}, weights, seed=1)
    exact = [Fraction(str(w)) for w in weights]
    drawn, n = Counter[int](), 0
    for count in takes:
        got = cursor.draw(count, ())
        assert len(set(got)) == count
        for i in sets_of(got, sizes):
            drawn[i] += 1
            n += 1
            for j, weight in enumerate(exact):
                assert abs(drawn[j] - n * weight / sum(exact)) < 1


def test_the_set_that_is_furthest_behind_would_not_do() -> None:
    """Why the rule is by due dates: with these weights the simpler one falls short by more than one prompt."""
    weights = [1, 7, 17, 15, 19, 1, 1, 21]
    total, drawn, worst = sum(weights), [0] * 8, Fraction(0)
    for n in range(1, 2 * total):
        i = max(range(8), key=lambda i: n * weights[i] - drawn[i] * total)
        drawn[i] += 1
        worst = max(worst, *(Fraction(n * w, total) - x for w, x in zip(weights, drawn, strict=True)))
    assert worst > 1


def test_each_set_goes_through_its_own_epochs() -> None:
    cursor = MixedCursor({"a": 4, "b": 6}, [1, 1], seed=3)
    seen = [index for _ in range(6) for index in cursor.draw(4, ())]
    a, b = [i for i in seen if i < 4], [i - 4 for i in seen if i >= 4]
    assert [sorted(a[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert [sorted(b[k : k + 6]) for k in (0, 6)] == [[0, 1, 2, 3, 4, 5]] * 2
    assert cursor.epochs_by_set == {"a": 3.0, "b": 2.0}
    assert cursor.epochs == 24 / 10
    other = MixedCursor({"a": 4, "b": 6}, [1, 1], seed=4)
    assert [index for _ in range(6) for index in other.draw(4, ())] != seen
    same = MixedCursor({"a": 40, "b": 40}, [1, 1], seed=3)
    drawn = same.draw(80, ())
    assert [i for i in drawn if i < 40] != [i - 40 for i in drawn if i >= 40]  # orders of their own


@settings(max_examples=60, deadline=None)
@given(
    takes=st.lists(st.integers(0, 6), min_size=2, max_size=20),
    cut=st.integers(0, 20),
    retired=st.sets(st.integers(0, 14), max_size=9),
)
def test_it_goes_on_where_it_was(takes: list[int], cut: int, retired: set[int]) -> None:
    prompts = prompts_of(a=5, b=3, c=7)
    cursor = start_cursor(prompts, data_of(2, 1, 4, seed=7))
    for count in takes[:cut]:
        cursor.draw(count, retired)
    state = json.loads(json.dumps(cursor.state()))
    other = restore_cursor(prompts, state)
    assert other.state() == state
    assert (other.epochs, other.epochs_by_set) == (cursor.epochs, cursor.epochs_by_set)
    for count in takes[cut:]:
        got = cursor.draw(count, retired)
        assert got == other.draw(count, retired)
        assert len(set(got)) == count
        assert not retired.intersection(got)


def test_a_set_without_prompts_left_gives_its_turns_to_the_others() -> None:
    cursor = MixedCursor({"a": 4, "b": 8, "c": 8}, [2, 1, 1], seed=0)
    assert Counter(sets_of(cursor.draw(8, ()), [4, 8, 8])) == {0: 4, 1: 2, 2: 2}
    retired = {0, 1, 2}
    for _ in range(5):  # one prompt of a is left, which cannot come twice in a draw
        drawn = cursor.draw(7, retired)
        assert drawn.count(3) == 1
        assert Counter(sets_of(drawn, [4, 8, 8])) == {0: 1, 1: 3, 2: 3}
    retired = {0, 1, 2, 3}
    for _ in range(5):
        assert Counter(sets_of(cursor.draw(6, retired), [4, 8, 8])) == {1: 3, 2: 3}
    assert cursor.draw(0, set(range(20))) == []
    with pytest.raises(ValueError, match="cannot draw 2 different prompts out of 1"):
        cursor.draw(2, set(range(19)))
    with pytest.raises(ValueError, match="cannot draw 2 different prompts out of 1"):
        Cursor(3, seed=0).draw(2, {0, 1})


def test_other_sets_are_refused() -> None:
    state = start_cursor(prompts_of(a=3, b=4), data_of(1, 1)).state()
    with pytest.raises(UserError, match=r"data\.train has the data sets a, c now and had a, b"):
        restore_cursor(prompts_of(a=3, c=4), state)
    with pytest.raises(UserError, match="gives 5 prompts now and gave 4"):
        restore_cursor(prompts_of(a=3, b=5), state)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=4), count=st.integers(1, 12), sizes=st.booleans())
def test_the_most_that_one_draw_needs(weights: list[int], count: int, sizes: bool) -> None:
    """Never less than what is really drawn, in draws of one size and of any."""
    cursor = MixedCursor({str(i): 99 for i in range(len(weights))}, weights, seed=0)
    bound = most_in_one_draw(weights, count, any_start=sizes)
    for k in range(80):
        if sizes:
            cursor.draw(k % count, ())
        drawn = Counter(sets_of(cursor.draw(count, ()), [99] * len(weights)))
        assert all(drawn[i] <= most for i, most in enumerate(bound))


def test_the_most_that_one_draw_needs_by_hand() -> None:
    assert most_in_one_draw([1, 1], 8, any_start=False) == [4, 4]  # every draw begins with even shares
    assert most_in_one_draw([1, 1], 8, any_start=True) == [5, 5]  # from 0.5 to 4.5: between 0 and 5
    assert most_in_one_draw([1, 2], 2, any_start=False) == [2, 2]  # from 2/3 to 4/3: between 0 and 2
    assert most_in_one_draw([], 8, any_start=True) == []
