"""The filter language: what it selects, against a plain evaluation in Python, and the errors it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.types import UserError
from grpo.view.filters import Filter, FilterError, parse
from grpo.view.rows import matches

COLUMNS = {"reward": pa.float64(), "length": pa.int64(), "failed": pa.string(), "judge/right": pa.bool_()}
LIST = {"completion_token_ids": pa.list_(pa.int32())}
Row = Mapping[str, Any]
Condition = tuple[str, Callable[[Row], bool]]
"""A filter, and the same condition in Python."""


def selected(text: str, rows: list[dict[str, Any]]) -> list[bool]:
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(COLUMNS.items())))
    return [bool(one) for one in matches(table, parse(text, COLUMNS))]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("reward < 0.5", [0]),
        ("reward <= 0.5 and length > 3", [1]),
        ("reward == 0.5", [1]),
        ("reward=0.5", [1]),
        ("reward != 0.5", [0, 3]),
        ("not reward == 0.5", [0, 2, 3]),
        ("reward is null", [2]),
        ("reward is not null", [0, 1, 3]),
        ('failed == "timeout"', [2]),
        ("failed == 'timeout' or length >= 9", [2, 3]),
        ('failed in ("x", "timeout")', [2]),
        ('failed not in ("x", "timeout")', [0, 1, 3]),
        ('failed contains "time"', [2]),
        ('failed not contains "time"', [0, 1, 3]),
        ("length in (2, 9)", [0, 3]),
        ("length > 4.5", [1, 3]),
        ("length > -1 and (reward < 1e-3 or reward > .9)", [0, 3]),
        ("`judge/right` == true", [1]),
        ("judge/right != true", [0]),
        ("not not reward < 0.5", [0]),
        ("not reward == 0.5 or length == 5", [0, 1, 2, 3]),
        ("not (reward == 0.5 or length == 2)", [2, 3]),
        ("length == 99999999999999999999", []),
        ("length < 99999999999999999999", [0, 1, 2, 3]),
        ("reward<0.5 AND length<3 OR length==9", [0, 3]),
        ("length == 9 or reward < 0.5 and length == 9", [3]),
    ],
)
def test_what_a_filter_selects(text: str, chosen: list[int]) -> None:
    rows: list[dict[str, Any]] = [
        {"reward": 0.0, "length": 2, "failed": None, "judge/right": False},
        {"reward": 0.5, "length": 5, "failed": None, "judge/right": True},
        {"reward": None, "length": 4, "failed": "timeout", "judge/right": None},
        {"reward": 1.0, "length": 9, "failed": None, "judge/right": None},
    ]
    assert [i for i, one in enumerate(selected(text, rows)) if one] == chosen


def test_text_is_compared_as_it_is() -> None:
    rows = [{"failed": text} for text in ('say "hi"', "a\\b", "a\nb", "über", "a%b", "")]
    assert selected(r'failed == "say \"hi\""', rows) == [True, False, False, False, False, False]
    assert selected(r"failed == 'a\\b'", rows) == [False, True, False, False, False, False]
    assert selected(r'failed contains "\n"', rows) == [False, False, True, False, False, False]
    assert selected('failed == "über"', rows) == [False, False, False, True, False, False]
    assert selected('failed contains "%"', rows) == [False, False, False, False, True, False]
    assert selected('failed == ""', rows) == [False, False, False, False, False, True]


def test_large_whole_numbers_are_compared_exactly() -> None:
    rows = [{"length": 2**60}, {"length": 2**60 + 1}]
    assert selected(f"length == {2**60 + 1}", rows) == [False, True]


NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([-1.5, -0.5, 0.0, 0.5, 1.5]))
TEXTS = st.text(alphabet="ab\"'\\ \n", max_size=3)
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@st.composite
def comparisons(draw: st.DrawFn) -> Condition:
    name = draw(st.sampled_from([*COLUMNS]))
    form = draw(st.sampled_from(["compare", "null", "in", "contains"]))
    negated = draw(st.booleans())
    if form == "null":
        word = "is not null" if negated else "is null"
        return f"`{name}` {word}", lambda row: (row[name] is None) != negated
    kind = TEXTS if name == "failed" else st.booleans() if name == "judge/right" else NUMBERS

    def shown(value: Any) -> str:
        return quoted(value) if isinstance(value, str) else str(value).lower()

    if form == "in":
        values = draw(st.lists(kind, min_size=1, max_size=3))
        word = "not in" if negated else "in"
        text = f"`{name}` {word} ({', '.join(map(shown, values))})"
        return text, lambda row: (row[name] is not None and row[name] in values) != negated
    if form == "contains" and name == "failed":
        part = draw(TEXTS)
        word = "not contains" if negated else "contains"
        return f"failed {word} {quoted(part)}", lambda row: (row[name] is not None and part in row[name]) != negated
    value, operator = draw(kind), draw(st.sampled_from([*OPERATORS]))
    if name == "judge/right":
        operator = draw(st.sampled_from(["==", "!="]))
    text = f"`{name}` {operator} {shown(value)}"
    return text, lambda row: row[name] is not None and OPERATORS[operator](row[name], value)


def joined(inner: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
    def both(word: str, pair: tuple[Condition, Condition]) -> Condition:
        (a, first), (b, second) = pair
        if word == "and":
            return f"({a}) and ({b})", lambda row: first(row) and second(row)
        return f"({a}) or ({b})", lambda row: first(row) or second(row)

    def opposite(one: Condition) -> Condition:
        return f"not ({one[0]})", lambda row: not one[1](row)

    return st.builds(both, st.sampled_from(["and", "or"]), st.tuples(inner, inner)) | st.builds(opposite, inner)


ROWS = st.lists(
    st.fixed_dictionaries({
        "reward": st.none() | st.sampled_from([-1.5, -0.5, 0.0, 0.5, 1.0]), "length": st.none() | st.integers(-3, 3),
        "failed": st.none() | TEXTS, "judge/right": st.none() | st.booleans(),
    }),
    min_size=1, max_size=6,
)  # fmt: skip


@given(condition=st.recursive(comparisons(), joined, max_leaves=6), rows=ROWS)
def test_a_filter_selects_what_python_would(condition: Condition, rows: list[dict[str, Any]]) -> None:
    text, holds = condition
    assert selected(text, rows) == [holds(row) for row in rows]


@given(st.text(max_size=60) | st.text(alphabet="()<>=!\"'`ab1.,- \nnotandorisreward", max_size=60))
def test_any_text_is_a_filter_or_an_error_of_one_line(text: str) -> None:
    found = outcome(text)
    if isinstance(found, FilterError):
        assert str(found).startswith("filter: ")
        assert "\n" not in str(found)
        assert found.position is None or 0 <= found.position <= len(text)
    else:
        assert {*found.columns} <= {*COLUMNS, *LIST}


def outcome(text: str) -> Filter | FilterError:
    """The filter, or the error that it gives."""
    try:
        return parse(text, COLUMNS | LIST)
    except FilterError as error:
        return error


@pytest.mark.parametrize(
    ("text", "sentence", "position"),
    [
        ("rewrd < 1", "filter: there is no column 'rewrd'; did you mean reward?", 0),
        ("reward < 1 and lenght > 2", "filter: there is no column 'lenght'; did you mean length?", 15),
        ("zzzz == 1", "filter: there is no column 'zzzz'; columns: completion_token_ids, failed, judge/right", 0),
        ("reward <", "filter: expected a value, and the filter ends", 8),
        ("reward < 'a'", "filter: reward is a number, and 'a' is a text", 9),
        ('failed == 1', "filter: failed is a text, and '1' is a number", 10),
        ("judge/right == 1", "filter: judge/right is a truth value, and '1' is a number", 15),
        ("failed == timeout",
         "filter: expected a value (a text is put in quotation marks) at character 11, not 'timeout'", 10),
        ("failed == null", "filter: write `failed is null` for a missing value", 10),
        ("reward contains 'a'", "filter: contains is for texts, and reward is a number", 16),
        ("completion_token_ids == 1",
         "filter: completion_token_ids is a list; it can only be tested with `is null`", 0),
        ("(reward < 1", "filter: expected ), and the filter ends", 11),
        ("reward < 1 2", "filter: expected \"and\", \"or\" or the end at character 12, not '2'", 11),
        ("reward", "filter: expected <, <=, >, >=, ==, !=, is, in or contains after reward, and the filter ends", 6),
        ("< 1", "filter: expected a column at character 1, not '<'", 0),
        ("failed == \"a", "filter: the quotation mark \" at character 11 is not closed", 10),
        ("reward < 1; import os", "filter: '; import os' at character 11 is no column, value or operator", 10),
        ("__import__('os')", "filter: there is no column '__import__'", 0),
    ],
)  # fmt: skip
def test_errors_name_the_place_and_the_nearest_column(text: str, sentence: str, position: int) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, COLUMNS | LIST)
    assert str(caught.value).startswith(sentence)
    assert isinstance(caught.value, FilterError)
    assert caught.value.position == position


def test_long_and_deep_filters_are_refused() -> None:
    with pytest.raises(FilterError, match="it has 2001 characters; at most 2000 are allowed"):
        parse("reward < 1".ljust(2000) + ")", COLUMNS)
    with pytest.raises(FilterError, match="may be nested 50 deep"):
        parse("(" * 60 + "reward < 1" + ")" * 60, COLUMNS)
    with pytest.raises(FilterError, match="may be nested 50 deep"):
        parse("not " * 60 + "reward < 1", COLUMNS)
