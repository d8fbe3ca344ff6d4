"""Nested columns get the line that makes them columns, and columns with dots in their names are columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_data_sets import read, refused, write

from grpo.config import TrainSetConfig
from grpo.data.columns import hint, nested
from grpo.data.prompts import map_columns
from grpo.data.rows import Row
from grpo.data.template import render_template
from grpo.rewards.golds import gold_text
from grpo.rewards.preflight import nested_hint
from grpo.types import Prompt, UserError

VERL: dict[str, Any] = {
    "data_source": "gsm8k",
    "prompt": [{"role": "user", "content": "How many?"}],
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 3, "question": "How many apples?", "meta": {"level": 5}},
}
"""A row as verl's parquet files have them."""


def proposed(error: str) -> dict[str, str]:
    """The columns that a message proposes, as a recipe would have them."""
    found = re.search(r"columns: \{.*?\"\}", error)
    assert found, error
    columns: dict[str, str] = yaml.safe_load(found[0])["columns"]
    return columns


@pytest.mark.parametrize(
    ("template", "written"),
    [("{question}", "How many apples?"), ("{ground_truth} {level}", "4 5"), ("Q: {content}", "Q: How many?")],
)
def test_the_proposed_line_works(template: str, written: str) -> None:
    """Added line by line, until the template fits."""
    row, columns = Row(index=0, values=VERL, where="x.jsonl:1"), dict[str, str]()
    for _ in re.findall(r"\{", template):
        [made] = map_columns([row], columns, option="data.train[0]")
        with pytest.raises(UserError) as caught:
            render_template(template, made, option="data.template")
        columns |= proposed(str(caught.value))
    [made] = map_columns([row], columns, option="data.train[0]")
    assert render_template(template, made, option="data.template") == written


def test_every_option_that_names_a_column_is_told_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", VERL | {"extra_info": {"turns": VERL["prompt"], "level": 5}})

    def mended(error: str, **more: Any) -> TrainSetConfig:
        return TrainSetConfig(path=path, columns=proposed(error), **more)

    chat = {"style": "chat", "messages_column": "extra_info.turns"}
    with pytest.raises(UserError) as caught:
        read(TrainSetConfig(path=path), **chat)
    assert read(mended(str(caught.value)), **chat).prompts[0].messages == tuple(VERL["prompt"])
    between = {"between": {"level": [5, 5]}}
    with pytest.raises(UserError) as caught:
        read(TrainSetConfig(path=path, **between), template="{data_source}")  # type: ignore[arg-type]
    assert len(read(mended(str(caught.value), **between), template="{data_source}").prompts) == 1
    prompt = Prompt(prompt_id="x", token_ids=(1,), text="", row=VERL, messages=None, dataset="x", where="x.jsonl:1")
    with pytest.raises(UserError, match=r'columns: \{ground_truth: "\{reward_model\[ground_truth\]\}"\}'):
        gold_text(prompt, "rewards[0]", "{answer}", "ground_truth")


@pytest.mark.parametrize("field", ["reward_model.ground_truth", "reward_model['ground_truth']"])
def test_a_nested_field_in_another_spelling_is_written_out(field: str) -> None:
    row = Row(index=0, values=VERL, where="x.jsonl:1")
    with refused("x.jsonl:1", f"write {{reward_model[ground_truth]}} for {{{field}}}"):
        render_template(f"Q: {{{field}}}", row, option="data.template")
    prompt = Prompt(prompt_id="x", token_ids=(1,), text="", row=VERL, messages=None, dataset="x", where="x.jsonl:1")
    with refused("data.gold_template", "x.jsonl:1"):
        gold_text(prompt, "rewards[0]", f"{{{field}}}", "data_source")


@pytest.mark.parametrize(
    ("template", "line", "written"),
    [
        ("{prompt}", {"prompt": "{prompt[0][content]}"}, "How many?"),
        ("{reward_model} ", {"reward_model": "{reward_model[style]}"}, "rule "),
    ],
)
def test_named_parts_are_not_written_as_python(template: str, line: dict[str, str], written: str) -> None:
    row = Row(index=0, values=VERL, where="x.jsonl:1")
    with pytest.raises(UserError) as caught:
        render_template(template, row, option="data.template")
    assert "x.jsonl:1: column" in str(caught.value)
    assert ("data.messages_column=prompt" in str(caught.value)) == ("prompt" in template)
    assert proposed(str(caught.value)) == line
    [made] = map_columns([row], line, option="data.train[0]")
    assert render_template(template, made, option="data.template") == written


def test_a_reward_that_misses_a_nested_column_is_told_the_line() -> None:
    """In the words of Python, and in those of the graders here."""
    for detail in (
        "polite: KeyError: 'ground_truth' at polite.py:3",
        "math_answer: KeyError: \"the row has no column 'ground_truth', only ['prompt']\" at math_answer.py:87",
    ):
        assert proposed(nested_hint(detail, VERL)) == {"ground_truth": "{reward_model[ground_truth]}"}
    for detail in ("KeyError: 'JUDGE_KEY'", "KeyError: 'data_source'", "ValueError: 'ground_truth'"):
        assert nested_hint(detail, VERL) == ""


def test_lists_of_numbers_are_written() -> None:
    row = Row(index=0, values={"nums": [1, 2]}, where="x.jsonl:1")
    assert render_template("{nums}", row, option="data.template") == "[1, 2]"


def test_a_column_with_a_dot_is_a_column(tmp_path: Path) -> None:
    rows = [{"a.b": "what", "a": {"b": "other"}, "a.n": 3, "a[0]": "x", "in": {"c.d": "deep"}}]
    path = write(tmp_path / "x.jsonl", *rows)
    made = read(TrainSetConfig(path=path, between={"a.n": [3, 3]}), template="{a.b} {a[b]} {a[0]} {in[c.d]} {a.n:03d}")
    assert made.prompts[0].text == "what other x deep 003"
    made = read(TrainSetConfig(path=path, columns={"q": "{a.b}", "x.y": "{a.n}"}), template="{q} {x.y}")
    assert made.prompts[0].text == "what 3"
    assert made.prompts[0].row["x.y"] == 3
    assert json.loads(Path(path).read_text())["a.b"] == "what"


def test_a_column_that_no_format_string_can_name_is_refused() -> None:
    row = Row(index=0, values={"a:b": "x"}, where="x.jsonl:1")
    with refused("x.jsonl:1 has no column 'a'", "'a:b' cannot be named in a format string"):
        render_template("{a:b}", row, option="data.template")


def test_hints() -> None:
    assert hint("questoin", {"question": 1}) == "; did you mean question?"
    assert hint("zzz", VERL) == ""
    assert hint("a.b", {"a": {"b": 1}}) == '; it is inside another: columns: {"a.b": "{a[b]}"}'
    assert nested("prompt.0.content", VERL) == "prompt[0][content]"
    assert nested("x", {"a": [{"b": [{"x": 1}]}]}) == "a[0][b][0][x]"
    assert nested("prompt", VERL) is None
