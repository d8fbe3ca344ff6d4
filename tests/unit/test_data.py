"""Data: reading, tokenizing, order and seeds. Real tokenizers and real files; the hub itself is out of reach here."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from documented import RECIPES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import grpo.data.hub
from grpo.checks.model_folder import check_model
from grpo.config import DataConfig, load
from grpo.data import (
    Cursor,
    PromptSet,
    completion_texts,
    dataset_name,
    end_token_ids,
    fingerprint,
    load_tokenizer,
    sample_seed,
)
from grpo.data.prompts import make_prompts
from grpo.data.rows import Row, read_rows
from grpo.data.template import render_template
from grpo.types import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CHATML = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """<eos> = 0, digits 1..10, + = 11, '=' = 12; no unknown token, no BOS."""
    vocab = {token: i for i, token in enumerate(["<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def bos_tokenizer(*, appends_eos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Like Llama: <unk> = 0, <s> = 1, </s> = 2, then <a> = 3, <u> = 4, a = 5, b = 6, c = 7; <s> is put in front."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<a>", "<u>", *"abc"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if appends_eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<a>", "<u>"],
        chat_template=chat_template,
    )


def dropping_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE of the letters a, b, c without an unknown token leaves out every other character without a word."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "</s>": 3, "ab": 4}, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def rows_of(*values: dict[str, Any]) -> list[Row]:
    return [Row(index=i, values=v, where=f"x.jsonl:{i + 1}") for i, v in enumerate(values)]


def prompts_of(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, **data: Any) -> PromptSet:
    settings_ = DataConfig(**{"train": [], "template": "{q}", **data})
    return make_prompts(rows, data=settings_, tokenizer=tokenizer, dataset="x", option="data.train")


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A UserError of one line that has every part."""
    with pytest.raises(UserError) as info:
        yield
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ---------------------------------------------------------------------------------------------------------- JSON lines


def test_json_lines_are_read_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"q": "1+2", "n": {"a": [1, null]}}\r\n{"other": "a\u2028b"}\n\n \n')
    assert read_rows(path, split="train", option="data.train") == [
        Row(index=0, values={"q": "1+2", "n": {"a": [1, None]}}, where="x.jsonl:1"),
        Row(index=1, values={"other": "a\u2028b"}, where="x.jsonl:2"),
    ]


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ('{"q": 1 "a": 2}', "not valid JSON: Expecting ',' delimiter (column 9)"),
        ('{"q": ', "not valid JSON: Expecting value"),
        ("[1, 2]", "each line must be one JSON object, not an array"),
        ("7", "not a number"),
        ("null", "not null"),
        ('{"q": 1, "q": 2}', "key 'q' occurs twice in one object"),
        ('{"q": {"z": 1, "z": 1}}', "key 'z' occurs twice in one object"),
        ('{"q": NaN}', "NaN is not a JSON value"),
        ('{"q": [-Infinity]}', "-Infinity is not a JSON value"),
        ('{"q": 1e999}', "number 1e999 is too large for a float"),
        ("", "the line is blank; blank lines are allowed only at the end"),
        ('{"q": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        (b'{"q": "\xff"}', "not UTF-8 text (invalid start byte at byte 8 of the line)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: str | bytes, reason: str) -> None:
    line = second if isinstance(second, bytes) else second.encode()
    path = write(tmp_path / "x.jsonl", b'{"q": 0}\n' + line + b'\n{"q": 3}\n')
    with refused("data.eval.sets[0]: x.jsonl:2: ", reason):
        read_rows(path, split="test", option="data.eval.sets[0]")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"q": "1"}\n{"q": "\xef\xbb\xbf2"}\n')
    assert [row.values["q"] for row in read_rows(path, split="train", option="data.train")] == ["1", "\ufeff2"]


@pytest.mark.parametrize("escaped", ['"\\ud83d"', '{"in": ["a\\uDC00b"]}', '{"\\ud83d": 1}'])
def test_half_a_character_is_refused(tmp_path: Path, escaped: str) -> None:
    """Python's JSON gives a text with it, which nothing can write: the run ended when it saved its samples."""
    path = write(tmp_path / "x.jsonl", f'{{"q": "\\ud83d\\ude00 \\\\ud83d"}}\n{{"q": {escaped}}}\n')
    with refused("data.train: x.jsonl:2: ", "half of a character"):
        read_rows(path, split="train", option="data.train")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            '[{"q": 1}, {"q": 2}]',
            "begins with an array, and each line must be one JSON object; convert it with: jq -c '.[]' x",
        ),
        ('\n[\n {"q": 1},\n {"q": 2}\n]\n', "begins with an array"),
        ('{\n "q": 1\n}\n', "begins with an object over several lines"),
    ],
)
def test_json_that_is_not_one_object_a_line(tmp_path: Path, text: str, part: str) -> None:
    with refused("data.train: ", part):
        read_rows(write(tmp_path / "x.json", text), split="train", option="data.train")


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("x.jsonl", gzip.compress(b"{}", mtime=0), "is compressed by gzip; unpack it with: gunzip"),
        ("x.jsonl.gz", gzip.compress(b"{}", mtime=0), "is compressed by gzip; unpack it with: gunzip"),
        ("x.jsonl", '{"q": 1}'.encode("utf-16"), "is text in UTF-16; write it as UTF-8 with: iconv"),
        ("x.parquet", LFS, "is a Git LFS pointer instead of the file; fetch it with: git lfs pull"),
        ("x.jsonl", LFS, "is a Git LFS pointer"),
        ("x.csv", LFS, "is a Git LFS pointer"),
        ("x.jsonl", "<!DOCTYPE html>\n<html>", "is a web page"),
        ("x.jsonl", b"PAR1\x00", "is a parquet file; its name must end in .parquet"),
        ("x.arrow", b"\xff\xff\xff\xff\x10", "is an Arrow file; give the folder that save_to_disk has written"),
        ("x.xlsx", b"PK\x03\x04", "is a zip archive (spreadsheets"),
    ],
)
def test_a_file_that_is_something_else_is_said_to_be_it(
    tmp_path: Path, name: str, text: str | bytes, part: str
) -> None:
    with refused(f"data.train: {tmp_path}/{name} {part}"):
        read_rows(write(tmp_path / name, text), split="train", option="data.train")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    """Nobody may ever write into it, and a resumed run cannot read it again."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with refused("data.train: ", "rows.jsonl is a pipe or a device, which cannot be read twice"):
        read_rows(str(tmp_path / "rows.jsonl"), split="train", option="data.train")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    with refused("data.train: ", "x.jsonl is empty"):
        read_rows(write(tmp_path / "x.jsonl", text), split="train", option="data.train")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=5), ascii=st.booleans())
def test_any_json_object_survives(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], ascii: bool) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    path = write(tmp_path_factory.mktemp("any") / "x.jsonl", text)
    read = read_rows(path, split="train", option="data.train")
    assert [row.values for row in read] == rows
    assert [row.index for row in read] == list(range(len(rows)))


# ------------------------------------------------------------------------------------------------- parquet and folders


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "p.parquet"
    turns = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    pyarrow.parquet.write_table(pyarrow.table({"q": ["a", None], "m": turns}), path)
    assert read_rows(str(path), split="train", option="data.train") == [
        Row(index=0, values={"q": "a", "m": turns[0]}, where="p.parquet[0]"),
        Row(index=1, values={"q": None, "m": turns[1]}, where="p.parquet[1]"),
    ]
    whole = path.read_bytes()
    for damaged in (b"", b"nothing of the kind", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with refused("data.train: ", "p.parquet"):
            read_rows(str(path), split="train", option="data.train")
    pyarrow.parquet.write_table(pyarrow.table({"q": pyarrow.array([], pyarrow.string())}), path)
    with refused("has no rows"):
        read_rows(str(path), split="train", option="data.train")
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["q", "q"]), path)
    with refused("two columns called q"):
        read_rows(str(path), split="train", option="data.train")


def test_saved_dataset_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list([{"q": "a"}, {"q": "b"}])
    two = datasets.Dataset.from_list([{"q": "c"}])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "held_out": two}).save_to_disk(str(tmp_path / "both"))
    assert read_rows(str(tmp_path / "one"), split="train", option="data.train") == [
        Row(index=0, values={"q": "a"}, where="one[0]"),
        Row(index=1, values={"q": "b"}, where="one[1]"),
    ]
    held_out = read_rows(str(tmp_path / "both"), split="held_out", option="data.eval.sets[0]")
    assert held_out == [Row(index=0, values={"q": "c"}, where="both[0]")]
    with refused("data.eval.sets[0]", "no split 'heldout'", "train, held_out", "did you mean held_out?"):
        read_rows(str(tmp_path / "both"), split="heldout", option="data.eval.sets[0]")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"not arrow")
    with refused("data.train", "cannot be loaded"):
        read_rows(str(tmp_path / "one"), split="train", option="data.train")
    monkeypatch.chdir(tmp_path)
    assert len(read_rows("both/train", split="train", option="data.train")) == 2  # a folder, though it reads like an id


def test_a_folder_of_files_goes_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder / "train.jsonl", '{"q": "a"}\n{"q": "b"}\n')
    write(folder / "test.jsonl", '{"q": "c"}\n')
    read = read_rows(str(folder), split="test", option="data.train")
    assert read == [Row(index=0, values={"q": "c"}, where="files[0]")]
    with refused("data.train", "files", "tset", "'train', 'test'"):
        read_rows(str(folder), split="tset", option="data.train")
    (tmp_path / "nothing").mkdir()
    with refused("data.train", "nothing"):
        read_rows(str(tmp_path / "nothing"), split="train", option="data.train")


# -------------------------------------------------------------------------------------------------- names and the hub


def test_a_missing_path_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "gsm8k_train.jsonl", '{"q": 1}\n')
    write(tmp_path / "unrelated.parquet", "")
    with refused("data.train", "gsm8k_tarin.jsonl does not exist", f"did you mean {tmp_path}/gsm8k_train.jsonl?"):
        read_rows(str(tmp_path / "gsm8k_tarin.jsonl"), split="train", option="data.train")
    with refused("does not exist; its folder", "nowhere does not exist either"):
        read_rows(str(tmp_path / "nowhere" / "x.jsonl"), split="train", option="data.train")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("x.csv", "./x", "~/x", "a/b/c"):
        with refused(f"data.train: {name} does not exist"):
            read_rows(name, split="train", option="data.train")
    assert len(read_rows("~/gsm8k_train.jsonl", split="train", option="data.train")) == 1


def test_an_unknown_ending_names_the_forms_taken(tmp_path: Path) -> None:
    for name in ("x.csv", "x.jsonl.gz", "x"):
        with refused("data.train", name, ".jsonl or .parquet file", "hub id"):
            read_rows(write(tmp_path / name, "a,b\n"), split="train", option="data.train")


def test_a_hub_id_goes_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> Any:
        seen.append((path, name, split))
        return datasets.Dataset.from_list([{"q": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(grpo.data.hub, "_hub_answers", lambda: True)
    rows = read_rows("openai/gsm8k:main", split="test", option="data.train")
    assert rows == [Row(index=0, values={"q": "a"}, where="openai/gsm8k:main[0]")]
    read_rows("gsm8k", split="train", option="data.train")
    assert seen == [("openai/gsm8k", "main", "test"), ("gsm8k", None, "train")]


def test_an_empty_path_is_not_the_working_directory() -> None:
    with refused("data.train: the path is empty"):
        read_rows("", split="train", option="data.train")


def test_a_dead_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the switch to the cache the client retries for half a minute; here it must not even be asked."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(grpo.data.hub, "_hub_answers", lambda: False)
    with refused("data.train: no-such/data is neither", "does not answer, so only the local cache was searched"):
        read_rows("no-such/data", split="train", option="data.train")
    assert constants.HF_HUB_OFFLINE is False
    assert datasets.config.HF_HUB_OFFLINE is False
    with refused("model.path", "no-such/model", "does not answer"):
        load_tokenizer("no-such/model", trust_remote_code=False)
    config = load(RECIPES["gsm8k_qwen2.5_0.5b"], ["model.path=no-such/model"])
    with refused("model.path=no-such/model", "does not answer, so only the local cache was searched"):
        check_model(config)


def test_the_hub_answers_when_anything_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ask = grpo.data.hub._hub_answers.__wrapped__
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # it answers 501 to everything
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert ask()
        thread.join()
    assert not ask()  # the port is closed now


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def ask() -> bool:
        raise AssertionError("the hub was asked in offline mode")

    monkeypatch.setattr(grpo.data.hub, "_hub_answers", ask)
    with refused("data.train: no-such/data", "offline mode is set"):
        read_rows("no-such/data", split="train", option="data.train")


def test_dataset_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.b.jsonl", "")
    (tmp_path / "dir").mkdir()
    assert dataset_name("./a.b.jsonl") == "a.b"
    assert dataset_name("dir/") == "dir"
    assert dataset_name("openai/gsm8k:main") == "openai/gsm8k:main"


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_load_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    char_tokenizer().save_pretrained(folder)
    assert load_tokenizer(str(folder), trust_remote_code=False)("1+2")["input_ids"] == [2, 11, 3]
    with refused("model.path", "modle does not exist", f"did you mean {folder}?"):
        load_tokenizer(str(tmp_path / "modle"), trust_remote_code=False)
    with refused("model.path", "it must be a folder"):
        load_tokenizer(str(folder / "tokenizer.json"), trust_remote_code=False)
    (tmp_path / "empty").mkdir()
    with refused("model.path", "empty has no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"), trust_remote_code=False)
    write(folder / "tokenizer.json", LFS)
    with refused("model.path", "tokenizer.json is a Git LFS pointer"):
        load_tokenizer(str(folder), trust_remote_code=False)
    write(folder / "tokenizer.json", "{")
    with refused("model.path", "cannot be loaded"):
        load_tokenizer(str(folder), trust_remote_code=False)


def test_end_tokens_come_from_everywhere(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    assert end_token_ids(char_tokenizer(), str(tmp_path), []) == (0,)
    assert end_token_ids(char_tokenizer(), str(tmp_path), [12, 3, 0]) == (0, 3, 12)
    write(tmp_path / "generation_config.json", '{"eos_token_id": [7, 5]}')
    assert end_token_ids(char_tokenizer(), str(tmp_path), [3]) == (0, 3, 5, 7)
    LlamaConfig(eos_token_id=9).save_pretrained(tmp_path)
    assert end_token_ids(char_tokenizer(), str(tmp_path), []) == (0, 5, 7, 9)
    LlamaConfig(eos_token_id=2).save_pretrained(tmp_path)  # the class's default, and written all the same
    assert end_token_ids(char_tokenizer(), str(tmp_path), []) == (0, 2, 5, 7)
    write(tmp_path / "config.json", '{"model_type": "llama"}')  # 2 would be the class's default: the digit 1 here
    assert end_token_ids(char_tokenizer(), str(tmp_path), []) == (0, 5, 7)
    write(tmp_path / "config.json", '{"model_type": "gemma3", "text_config": {"eos_token_id": 11}}')
    assert end_token_ids(char_tokenizer(), str(tmp_path), []) == (0, 5, 7, 11)
    write(tmp_path / "generation_config.json", "{")
    with refused("model.path", "generation_config.json cannot be read"):
        end_token_ids(char_tokenizer(), str(tmp_path), [])


def test_end_tokens_that_do_not_exist(tmp_path: Path) -> None:
    for token_id in (-1, 13, 10**20):
        with refused("sampling.stop_token_ids", f"{token_id} is not a token"):
            end_token_ids(char_tokenizer(), str(tmp_path), [0, token_id])
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with refused("model.path", "end token", "sampling.stop_token_ids"):
        end_token_ids(tokenizer, str(tmp_path), [])
    assert end_token_ids(tokenizer, str(tmp_path), [4]) == (4,)


# ------------------------------------------------------------------------------------------------------ template style


def test_template_prompts_by_hand() -> None:
    rows = rows_of({"q": "1+2", "answer": "3"}, {"q": "40+5", "answer": "45"})
    out = prompts_of(rows, char_tokenizer(), template="{q}=")
    assert [p.token_ids for p in out.prompts] == [(2, 11, 3, 12), (5, 1, 11, 6, 12)]
    assert [p.text for p in out.prompts] == ["1+2=", "40+5="]
    assert all(p.messages is None for p in out.prompts)
    assert out.prompts[0].row is rows[0].values
    assert out.dropped == ()
    # printf '{"answer":"3","q":"1+2"}' | sha256sum
    assert out.prompts[0].prompt_id == "x:0:e90583ed0ff8"


def test_prompt_ids_tell_duplicates_and_contents_apart() -> None:
    out = prompts_of(rows_of({"q": "1", "z": 1}, {"z": 1, "q": "1"}, {"q": "1", "z": 2}), char_tokenizer())
    ids = [p.prompt_id.split(":") for p in out.prompts]
    assert [i[:2] for i in ids] == [["x", "0"], ["x", "1"], ["x", "2"]]
    assert ids[0][2] == ids[1][2] != ids[2][2]
    assert all(re.fullmatch(r"[0-9a-f]{12}", i[2]) for i in ids)


def test_the_fingerprint_sees_rows_tokens_and_order() -> None:
    a, b = {"q": "1"}, {"q": "2"}
    base = fingerprint(prompts_of(rows_of(a, b), char_tokenizer()).prompts)
    assert fingerprint(prompts_of(rows_of(dict(a), dict(b)), char_tokenizer()).prompts) == base
    others = [
        fingerprint(prompts_of(rows_of(b, a), char_tokenizer()).prompts),
        fingerprint(prompts_of(rows_of(a), char_tokenizer()).prompts),
        fingerprint(prompts_of(rows_of(a, {**b, "extra": 0}), char_tokenizer()).prompts),
        fingerprint(prompts_of(rows_of(a, b), char_tokenizer(), template="{q}=").prompts),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    ("template", "values", "parts"),
    [
        ("{questoin}", {"question": "a", "answer": "b"}, ["'questoin'", "question, answer", "did you mean question?"]),
        ("{q}", {"q": None}, ["column 'q' is null"]),
        ("box{}", {"q": "a"}, ["names no column", "literal braces are written {{ and }}"]),
        ("{0}", {"q": "a"}, ["names no column"]),
        ("{q", {"q": "a"}, ["not a format string", "literal braces"]),
        ("{q[x]}", {"q": "a"}, ["does not fit x.jsonl:1"]),
        ("{q.real.x}", {"q": 1}, ["does not fit x.jsonl:1"]),
        ("{q:d}", {"q": "a"}, ["does not fit x.jsonl:1"]),
        ("{q}", {"q": " \n"}, ["x.jsonl:1: the prompt is empty"]),
    ],
)
def test_templates_that_do_not_fit(template: str, values: dict[str, Any], parts: list[str]) -> None:
    expected = ["data.train: "] if "empty" in parts[0] else ["data.train: data.template"]
    with refused(*expected, *parts):
        prompts_of(rows_of(values), char_tokenizer(), template=template)


def test_render_template_is_str_format() -> None:
    row = Row(index=0, values={"q": "{x}", "m": {"k": [1, 2]}, "f": 0.5}, where="x.jsonl:1")
    assert render_template(r"{q} \boxed{{}} {m[k][1]} {f:.2f}", row, option="data.template") == r"{x} \boxed{} 2 0.50"


def test_one_bos_whoever_writes_it() -> None:
    tokenizer = bos_tokenizer()
    assert tokenizer("<s>ab")["input_ids"] == [1, 1, 5, 6]  # the mistake to undo
    out = prompts_of(rows_of({"q": "ab"}, {"q": "<s>ab"}, {"q": "c"}), tokenizer)
    assert [p.token_ids for p in out.prompts] == [(1, 5, 6), (1, 5, 6), (1, 7)]
    first_has_it = prompts_of(rows_of({"q": "<s>ab"}, {"q": "ab"}), tokenizer)
    assert [p.token_ids for p in first_has_it.prompts] == [(1, 5, 6), (1, 5, 6)]
    with refused("data.train: x.jsonl:2", "two BOS tokens", "'<s>'", "[1, 1, 5]"):
        prompts_of(rows_of({"q": "a"}, {"q": "<s><s>a"}), tokenizer)


def test_an_appended_eos_is_taken_off() -> None:
    tokenizer = bos_tokenizer(appends_eos=True)
    assert tokenizer("ab")["input_ids"] == [1, 5, 6, 2]  # the mistake to undo
    out = prompts_of(rows_of({"q": "ab"}, {"q": "<s>c"}, {"q": "a</s>"}), tokenizer)
    assert [p.token_ids for p in out.prompts] == [(1, 5, 6), (1, 7), (1, 5, 2)]  # the text's own EOS stays


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(alphabet="abc", min_size=1, max_size=8), min_size=1, max_size=5), eos=st.booleans())
def test_ids_are_bos_and_the_text(texts: list[str], eos: bool) -> None:
    out = prompts_of(rows_of(*({"q": text} for text in texts)), bos_tokenizer(appends_eos=eos))
    expected = [(1, *({"a": 5, "b": 6, "c": 7}[ch] for ch in text)) for text in texts]
    assert [p.token_ids for p in out.prompts] == expected


@pytest.mark.parametrize("make", [char_tokenizer, dropping_tokenizer])
@pytest.mark.parametrize("bad", ["x", "1x1", "é", "\ud800"])
def test_characters_that_cannot_be_represented(make: Callable[[], PreTrainedTokenizerFast], bad: str) -> None:
    good = "1" if make is char_tokenizer else "ab"
    with refused("data.train: x.jsonl:2: "):
        prompts_of(rows_of({"q": good}, {"q": bad}, {"q": good}), make())


def test_dropped_characters_are_shown() -> None:
    tokenizer = dropping_tokenizer()
    assert tokenizer("abxyc")["input_ids"] == [4, 2]  # the silence to break
    for text, lost in {"abxyc": "xy", "abz": "z", "z": "z", "é a": "é"}.items():
        with refused(f"x.jsonl:1: the tokenizer leaves out {lost!r}"):
            prompts_of(rows_of({"q": text}), tokenizer)
    # '<', '/', 's' and '>' have no tokens of their own and need none inside of a special token
    assert prompts_of(rows_of({"q": "a</s>b"}), tokenizer).prompts[0].token_ids == (0, 3, 1)
    with refused("x.jsonl:1: the tokenizer leaves out 's'"):
        prompts_of(rows_of({"q": "a</s>bs"}), tokenizer)


def byte_level_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({ch: i for i, ch in enumerate([*alphabet, "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_half_a_character_counts_as_lost() -> None:
    """Two of the three bytes of the character have tokens: E6 95 B0 without B0."""
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("数")[0][0]
    assert len(mapped) == 3
    with refused("x.jsonl:1: the tokenizer leaves out '数'"):
        prompts_of(rows_of({"q": "a数"}), byte_level_tokenizer("a" + mapped[:2]))
    assert len(prompts_of(rows_of({"q": "a数"}), byte_level_tokenizer("a" + mapped)).prompts[0].token_ids) == 4


def test_a_byte_level_tokenizer_leaves_nothing_out() -> None:
    """Several tokens may share one character, and a character may be a special token's: neither counts as lost."""
    tokenizer = byte_level_tokenizer("".join(sorted(pre_tokenizers.ByteLevel.alphabet())))
    text = "  naïve 数学 👍🏽 \ufffd \n\n\tx\u200b</s> "
    out = prompts_of(rows_of({"q": text}), tokenizer)
    assert len(out.prompts[0].token_ids) == len(text.replace("</s>", "").encode()) + 1


def test_no_rows_is_an_error() -> None:
    with refused("data.train: there are no rows"):
        prompts_of([], char_tokenizer())


# ---------------------------------------------------------------------------------------------------------- chat style


def test_chat_prompts_by_hand() -> None:
    tokenizer = bos_tokenizer(chat_template=CHATML)
    out = prompts_of(rows_of({"q": "ab"}, {"q": "c"}), tokenizer, style="chat")
    assert [p.text for p in out.prompts] == ["<u>ab<a>", "<u>c<a>"]
    assert [p.token_ids for p in out.prompts] == [(4, 5, 6, 3), (4, 7, 3)]  # no BOS: the template has none
    assert out.prompts[0].messages == ({"role": "user", "content": "ab"},)


def test_chat_with_system_prompt_and_the_template_s_bos() -> None:
    tokenizer = bos_tokenizer(chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}<a>")
    out = prompts_of(rows_of({"q": "b"}), tokenizer, style="chat", system_prompt="ca")
    assert out.prompts[0].token_ids == (1, 7, 5, 6, 3)
    assert out.prompts[0].messages == ({"role": "system", "content": "ca"}, {"role": "user", "content": "b"})
    with refused("data.train: x.jsonl:1", "two BOS tokens"):
        prompts_of(rows_of({"q": "<s>b"}), tokenizer, style="chat")


def test_a_messages_column() -> None:
    tokenizer = bos_tokenizer(chat_template=CHATML)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    out = prompts_of(
        rows_of({"m": turns}, {"m": [{"role": "user", "content": "c", "name": None}]}),
        tokenizer,
        style="chat",
        messages_column="m",
    )
    assert [p.token_ids for p in out.prompts] == [(4, 5, 3, 6, 4, 7, 3), (4, 7, 3)]
    assert out.prompts[0].messages == tuple(turns)
    assert out.prompts[1].messages == ({"role": "user", "content": "c"},)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"messages": []}, "has no column 'm'; it has messages"),
        ({"m": "a"}, "must be a list of {role, content} turns, not 'a'"),
        ({"m": []}, "must be a list"),
        ({"m": ["a"]}, "turn 0 must have the strings role and content"),
        ({"m": [{"role": "user"}]}, "turn 0"),
        ({"m": [{"role": "user", "content": ["a"]}]}, "turn 0"),
        ({"m": [{"role": "user", "content": "a", "tool_calls": []}]}, "turn 0"),
        ({"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with an assistant"),
    ],
)
def test_bad_messages_name_the_row(values: dict[str, Any], part: str) -> None:
    good = {"m": [{"role": "user", "content": "a"}]}
    with refused("data.messages_column: x.jsonl:2", part):
        tokenizer = bos_tokenizer(chat_template=CHATML)
        prompts_of(rows_of(good, values), tokenizer, style="chat", messages_column="m")


def test_chat_templates_that_are_missing_or_refuse() -> None:
    with refused("data.style=chat needs a tokenizer with a chat template"):
        prompts_of(rows_of({"q": "a"}), bos_tokenizer(), style="chat")
    picky = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}a{% endfor %}"
    )
    with refused("data.train: x.jsonl:1: the chat template refuses the turns: no system"):
        prompts_of(rows_of({"q": "a"}), bos_tokenizer(chat_template=picky), style="chat", system_prompt="b")
    with refused("x.jsonl:1: the chat template leaves out the user turn 'a'"):
        prompts_of(rows_of({"q": "a"}), bos_tokenizer(chat_template="{{ '' }}"), style="chat")


# -------------------------------------------------------------------------------------------------------------- length


def test_a_turn_that_the_template_leaves_out_is_refused() -> None:
    users = bos_tokenizer(
        chat_template="{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% endfor %}<a>"
    )
    with refused("data.train: x.jsonl:1: the chat template leaves out the system turn 'ca'"):
        prompts_of(rows_of({"q": "b"}), users, style="chat", system_prompt="ca")
    assert prompts_of(rows_of({"q": " b\n"}), users, style="chat").prompts[0].text == "b<a>"
    switched = bos_tokenizer(
        chat_template="{% for m in messages %}{{ m.content | replace('/no_think', '') | replace('/think', '') | trim }}"
        "{% endfor %}<a>"
    )
    assert prompts_of(rows_of({"q": "b"}), switched, style="chat", system_prompt="/no_think").prompts[0].text == "b<a>"
    assert prompts_of(rows_of({"q": "b /think"}), switched, style="chat").prompts[0].text == "b<a>"
    shots = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>c</think>b"},
        {"role": "user", "content": "c"},
    ]
    strips = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<a>"
    out = prompts_of(rows_of({"m": shots}), bos_tokenizer(chat_template=strips), style="chat", messages_column="m")
    assert out.prompts[0].text == "abc<a>"
    last = bos_tokenizer(chat_template="{{ messages[-1].content }}<a>")
    with refused("leaves out the user turn 'bb'"):
        prompts_of(
            rows_of({"m": [{"role": "user", "content": "bb"}, shots[2]]}), last, style="chat", messages_column="m"
        )


def test_a_template_that_writes_today_is_given_a_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}<a>"
    dated = bos_tokenizer(chat_template=template)
    with refused("model.path: the chat template writes today's date", "data.date=20"):
        prompts_of(rows_of({"q": "b"}), dated, style="chat")
    assert prompts_of(rows_of({"q": "b"}), dated, style="chat", date="2024-07-26").prompts[0].text == "26 Jul 2024 b<a>"
    with refused("data.date=2024-07-26 has no effect: the chat template writes no date"):
        prompts_of(rows_of({"q": "b"}), bos_tokenizer(chat_template=CHATML), style="chat", date="2024-07-26")


def test_images_are_refused() -> None:
    """As parquet gives them and as `datasets` does; the text beside them would be asked without what it is about."""
    picture = PIL.Image.new("RGB", (1, 1))
    for value in (
        b"\x89PNG",
        {"bytes": b"\x89PNG", "path": None},
        [{"bytes": b"", "path": "a.png"}],
        picture,
        [picture],
    ):
        with refused("data.train: x.jsonl:2: column 'images' holds bytes or an image", "data.train.columns.images="):
            prompts_of(rows_of({"q": "1", "images": []}, {"q": "2", "images": value}), char_tokenizer())
    assert len(prompts_of(rows_of({"q": "1", "images": ""}, {"q": "2", "images": None}), char_tokenizer()).prompts) == 2


def test_long_prompts_are_refused_with_the_list_and_the_limit_that_holds() -> None:
    rows = rows_of(*({"q": "1" * n} for n in (3, 5, 4, 9)))
    assert len(prompts_of(rows, char_tokenizer(), max_prompt_tokens=9).prompts) == 4
    with refused(
        "data.train: 2 of 4 prompts are longer than data.max_prompt_tokens=4",
        "x.jsonl:2 (5 tokens), x.jsonl:4 (9 tokens);",
        "set it to 9",
        "data.overlong_prompts=drop",
    ):
        prompts_of(rows, char_tokenizer(), max_prompt_tokens=4)
    many = rows_of({"q": "1"}, *({"q": "11"} for _ in range(12)))
    with pytest.raises(UserError) as info:
        prompts_of(many, char_tokenizer(), max_prompt_tokens=1)
    assert str(info.value).count("(2 tokens)") == 10
    assert "x.jsonl:11 (2 tokens) and 2 more;" in str(info.value)


def test_long_prompts_are_dropped_whole_and_named() -> None:
    rows = rows_of({"q": "111"}, {"q": "2"}, {"q": "33"})
    out = prompts_of(rows, char_tokenizer(), max_prompt_tokens=2, overlong_prompts="drop")
    assert [p.token_ids for p in out.prompts] == [(3,), (4, 4)]
    assert [p.prompt_id.split(":")[1] for p in out.prompts] == ["1", "2"]
    assert len(out.dropped) == 1
    assert re.fullmatch(r"x:0:[0-9a-f]{12} \(3 tokens\)", out.dropped[0])
    with refused("2 of 2 prompts", "set it to 3 to hold all of them"):
        prompts_of(rows_of({"q": "111"}, {"q": "22"}), char_tokenizer(), max_prompt_tokens=1, overlong_prompts="drop")


def test_a_truncation_or_padding_setting_of_the_tokenizer_has_no_say() -> None:
    backend = char_tokenizer().backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=6, pad_id=0, pad_token="<eos>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", model_max_length=2
    )
    out = prompts_of(rows_of({"q": "1234"}, {"q": "1"}), tokenizer)
    assert [p.token_ids for p in out.prompts] == [(2, 3, 4, 5), (2,)]


# --------------------------------------------------------------------------------------------------------------- order


def permutation(size: int, seed: int, epoch: int) -> list[int]:
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return [int(i) for i in np.random.Generator(bits).permutation(size)]


def test_epochs_are_the_stated_permutations() -> None:
    cursor = Cursor(6, seed=3)
    assert (cursor.epoch, cursor.position) == (0, 0)
    assert cursor.take(4) + cursor.take(2) == permutation(6, 3, 0)
    assert (cursor.epoch, cursor.position) == (0, 6)
    assert cursor.take(3) + cursor.take(3) == permutation(6, 3, 1)
    assert (cursor.epoch, cursor.position) == (1, 6)
    assert Cursor(6, seed=4).take(6) == permutation(6, 4, 0) != permutation(6, 3, 0)


def test_a_repeated_prompt_is_put_off_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [[0, 1, 2, 3, 4], [4, 3, 1, 0, 2], [1, 0, 2, 3, 4]]
    monkeypatch.setattr(Cursor, "_permutation", lambda self, epoch: list(orders[epoch]))
    cursor = Cursor(5, seed=0)
    assert cursor.take(3) == [0, 1, 2]
    assert cursor.take(3) == [3, 4, 1]  # 4 and 3 come first in epoch 1 and are in this take already
    assert cursor.state() == {"size": 5, "seed": 0, "epoch": 1, "position": 1, "deferred": [4, 3]}
    assert cursor.take(1) == [4]
    assert cursor.state()["deferred"] == [3]
    assert cursor.take(3) == [3, 0, 2]
    assert cursor.state() == {"size": 5, "seed": 0, "epoch": 1, "position": 5, "deferred": []}
    assert cursor.take(2) == [1, 0]
    assert cursor.epoch == 2


takes = st.integers(1, 7).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(0, size), min_size=1, max_size=30))
)


@settings(max_examples=200, deadline=None)
@given(case=takes, seed=st.integers(0, 2**40), cut=st.integers(0, 30))
def test_the_stream_is_fair_distinct_and_resumable(case: tuple[int, list[int]], seed: int, cut: int) -> None:
    size, counts = case
    cursor, stream, resumed_at = Cursor(size, seed=seed), [], None
    for i, n in enumerate(counts):
        if i == cut:
            state = json.loads(json.dumps(cursor.state()))
            resumed_at = (i, Cursor.restore(size, state))
            assert resumed_at[1].state() == state
        got = cursor.take(n)
        assert len(got) == n == len(set(got))
        stream += got
        assert cursor.epoch * size + cursor.position == len(stream)
    for start in range(0, len(stream), size):  # every epoch holds every prompt once
        epoch = stream[start : start + size]
        assert len(set(epoch)) == len(epoch)
    if resumed_at is not None:
        i, other = resumed_at
        tail = [index for n in counts[i:] for index in other.take(n)]
        assert tail == stream[len(stream) - len(tail) :]
        assert other.state() == cursor.state()


def test_cursor_mistakes() -> None:
    with pytest.raises(ValueError, match="cannot take 4 different prompts out of 3"):
        Cursor(3, seed=0).take(4)
    with pytest.raises(ValueError, match="cannot take -1"):
        Cursor(3, seed=0).take(-1)
    with pytest.raises(ValueError, match="at least one prompt"):
        Cursor(0, seed=0)
    with refused("data.seed must not be negative, not -1"):
        Cursor(3, seed=-1)
    with refused("gives 4 prompts now and gave 3"):
        Cursor.restore(4, Cursor(3, seed=0).state())


# --------------------------------------------------------------------------------------------------------------- seeds


def test_sample_seeds_are_distinct_and_fit_63_bits() -> None:
    keys = [
        (run, step, f"x:{p}:abc", g, attempt)
        for run in (0, 1)
        for step in range(5)
        for p in range(10)
        for g in range(8)
        for attempt in (0, 1)
    ]
    seeds = [sample_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # the whole range is used
    assert [sample_seed(*key) for key in reversed(keys)] == seeds[::-1]
    assert sample_seed(0, 1, "p", 2) == sample_seed(0, 1, "p", 2, 0)


def test_fields_of_a_seed_do_not_run_into_each_other() -> None:
    assert sample_seed(1, 11, "p", 0) != sample_seed(11, 1, "p", 0)
    assert sample_seed(0, 0, "p", 12, 3) != sample_seed(0, 0, "p", 1, 23)
    assert sample_seed(0, 0, "p, 1", 2) != sample_seed(0, 0, "p", 1, 2)


def test_a_seed_stays_what_it_was() -> None:
    # printf '[7, 3, "x:0:abc", 2, 0]' | b2sum -l 64, halved: resumed runs depend on it
    assert sample_seed(7, 3, "x:0:abc", 2) == 0x5D7EC52635A75C25 >> 1


# ------------------------------------------------------------------------------------------------- completions as text


@pytest.mark.parametrize("special", [True, False])
def test_tags_that_rewards_read_stay_in_a_decoded_completion(special: bool) -> None:
    """Others that the tokenizer declares special do not."""
    tokenizer = char_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=special) for tag in ("<think>", "</think>")])
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    opens, closes, tool = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<tool>"])
    ids = [[opens, 2, closes, 3, tool, 4, 0], [2, closes], [closes], [3, 4, 0], []]
    assert completion_texts(tokenizer, ids) == ["<think>1</think>23", "1</think>", "</think>", "23", ""]


def test_a_tag_named_as_an_extra_special_token_stays() -> None:
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["</think>"]})
    closes = tokenizer.convert_tokens_to_ids("</think>")
    assert tokenizer.batch_decode([[2, closes, 3]], skip_special_tokens=True) == ["12"]
    assert completion_texts(tokenizer, [[2, closes, 3, 0]]) == ["1</think>2"]


# ----------------------------------------------------------------------------------------------------------- the whole


def test_importing_the_package_stays_cheap() -> None:
    code = (
        "import sys, grpo.data; print([m for m in ('transformers', 'datasets', 'pyarrow', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gsm8k() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the public math data is not at {SHARED}")
    rows = read_rows(str(SHARED / "gsm8k_test.jsonl"), split="test", option="data.eval.sets[0]")
    assert len(rows) == 1319
    assert rows[-1].where == "gsm8k_test.jsonl:1319"
    assert rows[0].values["answer"] == "18"
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    data = DataConfig(train=[], template="{question}")
    out = make_prompts(rows, data=data, tokenizer=tokenizer, dataset="gsm8k_test", option="data.eval.sets[0]")
    assert len(out.prompts) == len({p.prompt_id for p in out.prompts}) == 1319
    assert [len(p.token_ids) for p in out.prompts] == [len(row.values["question"].split()) for row in rows]
