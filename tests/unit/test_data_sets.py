"""Configured data sets: columns, filters, overlap with the evaluation, and the layouts of the public ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.config import DataConfig, DatasetConfig, EvalSetConfig, TrainSetConfig
from grpo.data import PromptSet
from grpo.data.overlap import find_overlaps
from grpo.data.prompts import limited, map_columns, read_set, without_overlaps
from grpo.data.rows import Row
from grpo.types import Prompt, UserError


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    with pytest.raises(UserError) as info:
        yield
    for part in parts:
        assert part in str(info.value), str(info.value)


def words() -> PreTrainedTokenizerFast:
    """One id a word, all of them unknown."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=template
    )  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(dataset: DatasetConfig, **data: Any) -> PromptSet:
    return read_set(dataset, data=DataConfig(train=[], **data), tokenizer=words(), option="data.train[0]")


def mapped(columns: dict[str, str], **values: Any) -> dict[str, Any]:
    [row] = map_columns([Row(index=0, values=values, where="x.jsonl:1")], columns, option="data.train[0]")
    return dict(row.values)


# ------------------------------------------------------------------------------------------------------------- columns


def test_columns_are_written_over_the_rows_own() -> None:
    row = {"Body": "He has 3.", "Question": "How many?", "n": 3, "m": {"truth": "7", "list": [1, 2]}, "answer": "old"}
    columns = {
        "question": "{Body} {Question}",
        "answer": "{m[truth]}",
        "nums": "{m[list]}",
        "second": "{m[list][1]}",
        "text": "{n}!",
        "formatted": "{n:03d}",
        "shown": "{n!s}",
        "Body": "{Question}",
    }
    assert mapped(columns, **row) == {
        **row, "question": "He has 3. How many?", "answer": "7", "nums": [1, 2], "second": 2, "text": "3!",
        "formatted": "003", "shown": "3", "Body": "How many?",
    }  # fmt: skip
    assert row["answer"] == "old"  # the row itself is untouched


@pytest.mark.parametrize(
    ("template", "values", "parts"),
    [
        ("{anwser}", {"answer": 1}, ["x.jsonl:1 has no column 'anwser'", "did you mean answer?"]),
        ("{answer}", {"answer": None}, ["x.jsonl:1: column 'answer' is null"]),
        ("{m[truth]}", {"m": {"truth": None}}, ["column 'm[truth]' is null"]),
        ("is {m[truth]}", {"m": {"truth": None}}, ["column 'm[truth]' is null"]),
        ("{m[truth]}", {"m": {"gold": 1}}, ["does not fit x.jsonl:1: 'truth'"]),
        ("{m[0][content]}", {"m": []}, ["does not fit x.jsonl:1"]),
        ("{", {"m": 1}, ["not a format string"]),
        ("{}", {"m": 1}, ["names no column"]),
    ],
)
def test_columns_that_do_not_fit_name_the_row(template: str, values: dict[str, Any], parts: list[str]) -> None:
    with refused("data.train[0].columns.answer: ", *parts):
        mapped({"answer": template}, **values)


def test_prompt_ids_are_of_the_mapped_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"q": "a"}, {"q": "b"})
    plain = read(TrainSetConfig(path=path), template="{q}")
    same = read(TrainSetConfig(path=path, columns={"q": "{q}"}), template="{q}")
    other = read(TrainSetConfig(path=path, columns={"z": "{q}"}), template="{q}")
    named = read(TrainSetConfig(path=path, name="y"), template="{q}")
    ids = [[prompt.prompt_id for prompt in made.prompts] for made in (plain, same, other, named)]
    assert ids[0] == ids[1]
    assert not set(ids[0]) & set(ids[2])
    assert ids[3] == [i.replace("x:", "y:", 1) for i in ids[0]]
    assert [(p.dataset, p.where) for p in named.prompts] == [("y", "x.jsonl:1"), ("y", "x.jsonl:2")]


# ------------------------------------------------------------------------------------------------------------- filters


def test_between_keeps_the_closed_range_and_lists_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"question": str(n), "level": n} for n in (1, "2", 3, 3.5, 4, 5)))
    made = read(TrainSetConfig(path=path, between={"level": [2, 3.5]}))
    assert [prompt.text for prompt in made.prompts] == ["2", "3", "3.5"]
    assert made.notes == ("kept       3 of 6 rows of data.train[0] by between level 2..3.5",)
    assert [line.split(" ", 1)[1] for line in made.dropped] == ["(level 1)", "(level 4)", "(level 5)"]
    assert made.dropped[0].startswith("x:0:")
    assert made.prompts[0].prompt_id.startswith("x:1:")  # the row's own place in the file
    both = read(TrainSetConfig(path=path, between={"level": [2, 5], "question": [0, 3]}))
    assert [prompt.text for prompt in both.prompts] == ["2", "3"]
    assert both.notes[1] == "kept       2 of 5 rows of data.train[0] by between question 0..3"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"level": "Level 5"}, "x.jsonl:2 has 'Level 5', which is not a number"),
        ({"level": None}, "x.jsonl:2 has None, which is not a number"),
        ({"level": True}, "which is not a number"),
        ({"level": "nan"}, "which is not a number"),
        ({"level": [3]}, "which is not a number"),
        ({"levle": 3}, "x.jsonl:2 has no such column; it has question, levle"),
    ],
)
def test_between_needs_numbers(tmp_path: Path, value: dict[str, Any], part: str) -> None:
    path = write(tmp_path / "x.jsonl", {"question": "a", "level": 3}, {"question": "b", **value})
    with refused("data.train[0].between.level: ", part):
        read(TrainSetConfig(path=path, between={"level": [1, 5]}))


def test_between_that_leaves_nothing_says_what_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"question": "a", "level": n} for n in (2, 4, 3)))
    with refused("data.train[0].between.level=[5, 9] leaves no row; the values lie between 2 and 4"):
        read(TrainSetConfig(path=path, between={"level": [5, 9]}))


def test_a_mapped_column_can_be_filtered_by(tmp_path: Path) -> None:
    """MATH writes its difficulty as `Level 5`: the character at place 6 is the number."""
    path = write(tmp_path / "x.jsonl", *({"question": str(n), "level": f"Level {n}"} for n in range(1, 6)))
    made = read(TrainSetConfig(path=path, columns={"level": "{level[6]}"}, between={"level": [4, 5]}))
    assert [prompt.text for prompt in made.prompts] == ["4", "5"]


def test_the_limit_comes_after_the_filters(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"question": "w " * n + str(n), "n": n} for n in range(8)))
    made = read(TrainSetConfig(path=path, between={"n": [2, 9]}), max_prompt_tokens=6, overlong_prompts="drop")
    cut = limited(made, 2)
    assert [prompt.row["n"] for prompt in cut.prompts] == [2, 3]
    assert [note.split()[0] for note in cut.notes] == ["kept", "dropped", "limit"]
    assert cut.notes[1].startswith("dropped    2 prompts of data.train[0] with more than 6 tokens: x:6:")
    assert cut.notes[2] == "limit      the first 2 of 4 prompts of data.train[0]"
    assert limited(made, 4) is made
    assert limited(made, None) is made


def test_a_split_of_a_file_has_no_effect_and_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"question": "a"})
    with refused("data.train[0].split=test has no effect", "is a file"):
        read(TrainSetConfig(path=path, split="test"))
    assert len(read(EvalSetConfig(path=path)).prompts) == 1


# ------------------------------------------------------------------------------------------------------------- overlap


def prompts(name: str, *texts: str) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"{name}:{i}", token_ids=(1,), text="", row={"question": text}, messages=None, dataset=name,
            where=f"{name}[{i}]",
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip


def overlaps(train: list[Prompt], held_out: list[Prompt], **data: Any) -> list[tuple[str, str, bool]]:
    found = find_overlaps(train, held_out, DataConfig(train=[], **data))
    return [(o.prompt.prompt_id, o.held_out.prompt_id, o.exact) for o in found]


def test_overlaps_by_hand() -> None:
    held_out = prompts("e", "What is 3 + 4 ?", "a b c d e f", "short")
    train = prompts(
        "t",
        "WHAT is\n3+4?",  # the same but for case and white space
        "what is 3 - 4 ?",  # another sign is another text
        "x, b; C d! y",  # b c d in a row
        "b c x d e x f",  # two in a row at most
        "Short",
        "shorter",
        "nothing",
    )
    assert overlaps(train, held_out, overlap_ngram=3) == [
        ("t:0", "e:0", True), ("t:1", "e:0", False), ("t:2", "e:1", False), ("t:4", "e:2", True),
    ]  # fmt: skip
    assert overlaps(train, held_out, overlap_ngram=4) == [
        ("t:0", "e:0", True),
        ("t:1", "e:0", False),
        ("t:4", "e:2", True),
    ]
    assert overlaps(train, held_out, overlap_ngram=5) == [("t:0", "e:0", True), ("t:4", "e:2", True)]
    assert overlaps(train, held_out, overlap_ngram=0) == [("t:0", "e:0", True), ("t:4", "e:2", True)]


text = st.lists(st.sampled_from("abc"), max_size=7).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(train=st.lists(text, max_size=5), held_out=st.lists(text, max_size=4), n=st.integers(0, 5))
def test_overlaps_are_those_of_a_naive_search(train: list[str], held_out: list[str], n: int) -> None:
    def share(a: str, b: str) -> bool:
        return n > 0 and any(
            a.split()[i : i + n] == b.split()[j : j + n] for i in range(len(a.split()) - n + 1)
            for j in range(len(b.split()) - n + 1)
        )  # fmt: skip

    expected = {
        f"t:{i}": a in held_out for i, a in enumerate(train) if a in held_out or any(share(a, b) for b in held_out)
    }
    found = overlaps(prompts("t", *train), prompts("e", *held_out), overlap_ngram=n)
    assert {prompt_id: exact for prompt_id, _, exact in found} == expected
    for prompt_id, other, exact in found:
        a, b = train[int(prompt_id[2:])], held_out[int(other[2:])]
        assert a == b if exact else share(a, b)


def test_the_words_of_the_template_are_not_compared(tmp_path: Path) -> None:
    template = "Solve this problem and write the answer in a box, step by step, thank you: {question} [{source}]"
    path = write(tmp_path / "t.jsonl", {"question": "one", "source": "a"}, {"question": "two", "source": "b"})
    other = write(tmp_path / "e.jsonl", {"question": "three", "source": "a"}, {"question": "two", "source": "b"})
    data = {"template": template, "overlap_ngram": 2}
    train, held_out = read(TrainSetConfig(path=path), **data), read(EvalSetConfig(path=other), **data)
    assert overlaps(list(train.prompts), list(held_out.prompts), **data) == [
        (train.prompts[1].prompt_id, held_out.prompts[1].prompt_id, True)
    ]


def test_of_messages_the_last_user_turn_is_compared(tmp_path: Path) -> None:
    def turns(*said: str) -> dict[str, Any]:
        return {"m": [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(said)]}

    path = write(tmp_path / "t.jsonl", turns("same start", "ok", "one"), turns("other", "ok", "two"))
    other = write(tmp_path / "e.jsonl", turns("same start", "ok", "three"), turns("TWO"))
    data: dict[str, Any] = {"style": "chat", "messages_column": "m"}
    train, held_out = read(TrainSetConfig(path=path), **data), read(EvalSetConfig(path=other), **data)
    found = overlaps(list(train.prompts), list(held_out.prompts), **data)
    assert [(a.split(":")[1], b.split(":")[1], exact) for a, b, exact in found] == [("1", "1", True)]


def test_overlaps_are_reported_or_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *({"question": f"what is {i} ?"} for i in range(14)))
    train = read(TrainSetConfig(path=path))
    held_out = prompts("e", *(f"What is {i}?" for i in range(12)))
    data = DataConfig(train=[])
    reported = without_overlaps(train, held_out, data)
    assert reported.prompts == train.prompts
    assert reported.dropped == ()
    [note] = reported.notes
    assert note.startswith(
        "warning    12 of 14 prompts of data.train[0] overlap with data.eval.sets, 12 as the same text and 0 by 13 "
        f"words in a row: {train.prompts[0].prompt_id} with e:0, "
    )
    assert note.endswith(f"{train.prompts[9].prompt_id} with e:9 and 2 more")
    drop = DataConfig(train=[], contaminated="drop")
    dropped = without_overlaps(train, held_out, drop)
    assert [prompt.text for prompt in dropped.prompts] == ["what is 12 ?", "what is 13 ?"]
    assert dropped.notes[0].startswith("dropped    12 of 14 prompts")
    assert dropped.dropped[11] == f"{train.prompts[11].prompt_id} (overlaps with e:11)"
    assert without_overlaps(train, prompts("e", "else"), drop) is train
    with refused("data.train[0]: data.contaminated=drop leaves no prompt: all 14 overlap", "the first one with f:0"):
        without_overlaps(train, prompts("f", *(f"what is {i} ?" for i in range(14))), drop)


def test_overlaps_of_large_sets_take_seconds() -> None:
    train = prompts("t", *(f"{i} " + " ".join(f"w{(i * 31 + k) % 9973}" for k in range(60)) for i in range(10_000)))
    held_out = prompts("e", *(" ".join(f"v{(i * 17 + k) % 9973}" for k in range(60)) for i in range(2_000)))
    started = time.process_time()
    assert overlaps(train, held_out) == []
    assert time.process_time() - started < 5


# ------------------------------------------------------------------------------- the layouts of the public data sets

README = """---
configs:
{configs}
---
# card
"""


def hub_folder(root: Path, name: str, configs: dict[str, dict[str, list[dict[str, Any]]]], kind: str) -> Path:
    """A repository as the hub has it: a card with configurations, and shards of their splits."""
    import pyarrow
    import pyarrow.parquet

    folder, lines = root / name, []
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            for i, part in enumerate((rows[:2], rows[2:])):  # two shards
                shard = folder / config / f"{split}-0000{i}-of-00002.{kind}"
                write(shard, *part)
                if kind == "parquet":
                    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), shard)
    (folder / "README.md").write_text(README.format(configs="\n".join(lines)))
    return folder


def three(**columns: Any) -> list[dict[str, Any]]:
    """Three rows; a text with N in it has the row's number there."""

    def fill(value: Any, n: int) -> Any:
        if isinstance(value, str):
            return value.replace("N", str(n))
        if isinstance(value, dict):
            return {key: fill(inner, n) for key, inner in value.items()}
        return [fill(inner, n) for inner in value] if isinstance(value, list) else value

    return [{name: fill(value, n) for name, value in columns.items()} for n in (1, 2, 3)]


TURN = {"role": "user", "content": "Solve N."}
LAYOUTS: dict[str, tuple[str, str, list[dict[str, Any]], dict[str, str], str, Any]] = {
    # repository:configuration -> split, form of the files, rows, columns, question and answer of the first row
    "openai/gsm8k:main": (
        "train", "parquet", three(question="How many N?", answer="It is N.\n#### N"), {},
        "How many 1?", "It is 1.\n#### 1",
    ),
    "HuggingFaceH4/MATH-500:default": (
        "test", "jsonl",
        three(problem="Find N.", solution="$N$", answer="N", subject="Algebra", level=5, unique_id="test/N.json"),
        {"question": "{problem}"}, "Find 1.", "1",
    ),
    "EleutherAI/hendrycks_math:algebra": (
        "train", "parquet", three(problem="Find N.", level="Level 5", type="Algebra", solution=r"So \boxed{N}."),
        {"question": "{problem}", "answer": "{solution}"}, "Find 1.", r"So \boxed{1}.",
    ),
    "BytedTsinghua-SIA/DAPO-Math-17k:default": (
        "train", "parquet",
        three(
            data_source="math_dapo", prompt=[TURN], ability="MATH",
            reward_model={"ground_truth": "N", "style": "rule-lighteval/MATH_v2"}, extra_info={"index": "N"},
        ),
        {"question": "{prompt[0][content]}", "answer": "{reward_model[ground_truth]}"}, "Solve 1.", "1",
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": (
        "train", "json", three(problem="Find N.", answer="N", solution=""), {"question": "{problem}"}, "Find 1.", "1",
    ),
    "open-r1/DAPO-Math-17k-Processed:all": (
        "train", "parquet", three(prompt="Find N.", solution="N", data_source="math_dapo", source_prompt=[TURN]),
        {"question": "{prompt}", "answer": "{solution}"}, "Find 1.", "1",
    ),
    "HuggingFaceH4/aime_2024:default": (
        "train", "parquet",
        three(id=60, problem="Find N.", solution="N", answer="00N", url="https://x", year="2024"),
        {"question": "{problem}"}, "Find 1.", "001",
    ),
    "math-ai/aime25:default": (
        "test", "jsonl", three(problem="Find N.", answer="N", id="N"), {"question": "{problem}"}, "Find 1.", "1",
    ),
    "math-ai/amc23:default": (
        "test", "parquet", three(id=0, answer="N.0", question="Find N.", url="https://x"), {}, "Find 1.", "1.0",
    ),
    "math-ai/minervamath:default": ("test", "jsonl", three(question="Find N.", answer="N"), {}, "Find 1.", "1"),
    "Hothan/OlympiadBench:OE_TO_maths_en_COMP": (
        "train", "parquet", three(id=1606, question="Find N.", final_answer=["N"], is_multiple_answer=False),
        {"answer": "{final_answer[0]}"}, "Find 1.", "1",
    ),
    "ChilleD/SVAMP:default": (
        "train", "parquet",
        three(ID="chal-N", Body="He has N.", Question="How many?", Equation="( N + 0 )", Answer="N.0", Type="Addition"),
        {"question": "{Body} {Question}", "answer": "{Answer}"}, "He has 1. How many?", "1.0",
    ),
    "Jiayi-Pan/Countdown-Tasks-3to4:default": (
        "train", "parquet", three(target=44, nums=[19, 36, 61]),
        {"question": "Make {target} of {nums}."}, "Make 44 of [19, 36, 61].", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("hub_id", LAYOUTS)
def test_public_layouts_become_question_and_answer(
    hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the code that reads hub ids, from a folder that is laid out as the hub's repository."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    repository, _, config = hub_id.partition(":")
    split, kind, rows, columns, question, answer = LAYOUTS[hub_id]
    other = three(question="other", answer="other")
    if kind == "json":  # one file that is one list, and a card that says nothing of it
        write(tmp_path / repository / "README.md")
        (tmp_path / repository / "deepscaler.json").write_text(json.dumps(rows))
    else:
        hub_folder(tmp_path, repository, {config: {split: rows}, "other": {split: other}}, kind)
    made = read(TrainSetConfig(path=hub_id, split=split, columns=columns))
    assert [prompt.text for prompt in made.prompts] == [question.replace("1.", f"{n}.").replace("1?", f"{n}?") if
        answer is not None else question for n in (1, 2, 3)]  # fmt: skip
    assert made.prompts[0].row.get("answer") == answer
    assert made.prompts[0].row.keys() >= rows[0].keys()
    name = hub_id.partition("/")[2]
    assert [prompt.where for prompt in made.prompts] == [f"{name}[{i}]" for i in range(3)]
    if answer is None:
        assert made.prompts[0].row["nums"] == [19, 36, 61]


def test_configurations_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    main, socratic = three(question="main N", answer="N"), three(question="socratic N", answer="N")
    folder = hub_folder(tmp_path, "gsm8k", {"main": {"train": main}, "socratic": {"train": socratic}}, "jsonl")
    for config in ("main", "socratic"):
        made = read(TrainSetConfig(path=f"{folder}:{config}"))
        assert [prompt.text for prompt in made.prompts] == [f"{config} {n}" for n in (1, 2, 3)]
        assert made.name == f"gsm8k:{config}"
    with refused(f"data.train[0]: folder {folder} cannot be loaded: it has no configuration 'socratc'; it has main, "
                 "socratic; did you mean socratic?"):  # fmt: skip
        read(TrainSetConfig(path=f"{folder}:socratc"))
    with refused("cannot be loaded", "main", "socratic"):
        read(TrainSetConfig(path=str(folder)))
    with refused("cannot be loaded", "train"):
        read(TrainSetConfig(path=f"{folder}:main", split="trian"))
    with refused("gsm9k:main does not exist"):
        read(TrainSetConfig(path=f"{tmp_path}/gsm9k:main"))
    datasets.Dataset.from_list(main).save_to_disk(str(tmp_path / "saved"))
    with refused("was written by save_to_disk and has no configuration"):
        read(TrainSetConfig(path=f"{tmp_path}/saved:main"))
