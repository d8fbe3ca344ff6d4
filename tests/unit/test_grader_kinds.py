"""Kinds of answers that models write and data sets hold, near misses among them: grader_kinds.jsonl, judged by hand."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reward_fns.countdown import countdown, countdown_unclosed
from reward_fns.gsm8k import gsm8k, gsm8k_unclosed
from reward_fns.math_answer import math_answer, math_answer_unclosed
from reward_fns.multiple_choice import multiple_choice, multiple_choice_unclosed

CASES = [json.loads(line) for line in (Path(__file__).parent / "grader_kinds.jsonl").read_text().splitlines()]
Grader = Callable[..., float]
GRADERS: dict[str, Grader] = {"math_answer": math_answer, "multiple_choice": multiple_choice}
KINDS = list(dict.fromkeys((case["grader"], case["kind"]) for case in CASES))


@pytest.mark.parametrize(("grader", "kind"), KINDS)
def test_answers_of_a_kind(grader: str, kind: str) -> None:
    cases = [case for case in CASES if (case["grader"], case["kind"]) == (grader, kind)]
    wrong = [
        case for case in cases if GRADERS[grader](case["completion"], {"answer": case["gold"]}) != case["expected"]
    ]
    assert wrong == []


def test_no_letter_is_favoured() -> None:
    """The same sentences with another letter choose that one, and are no choice of the first."""
    chosen = [case["completion"] for case in CASES if case["kind"] == "chosen"]
    for letter in "BD":
        others = [re.sub(r"(?<![A-Za-z])D(?![A-Za-z])", "G", text) for text in chosen]
        others = [re.sub(r"(?<![A-Za-z])[BC](?![A-Za-z])", f"{letter}", text) for text in others if "B" not in text]
        assert [text for text in others if multiple_choice(text, {"answer": letter}) != 1.0] == []
        assert [text for text in others if multiple_choice(text, {"answer": "C"}) == 1.0] == []


def test_a_call_takes_two_milliseconds_at_the_median() -> None:
    for grader, limit_s in ((math_answer, 0.02), (multiple_choice, 0.005)):  # ten times, and more, of what is measured
        seconds = []
        for case in CASES:
            if GRADERS[case["grader"]] is grader and len(case["completion"]) % 4 == 0:
                start = time.process_time()
                grader(case["completion"], {"answer": case["gold"]})
                seconds.append(time.process_time() - start)
        assert statistics.median(seconds) < limit_s


def test_gsm8k_reads_numbers_of_other_scripts() -> None:
    right = {
        "36": ["答案是３６。", "答案36个", "الجواب ٣٦", "उत्तर ३६"],
        "3.5": ["Das sind 3,5 kg.", "٣٫٥", "３．５", "#### 3,5"],
        "1234": ["１，２３４円", "١٬٢٣٤", "1,234"], "0.125": ["0,125"],
        "850000": ["850,000", "#### 850,000"], "12.5": ["12,50 €"],
    }  # fmt: skip
    wrong = {"5": ["Das sind 3,5 kg.", "٣٫٥"], "6": ["答案是３６。"], "234": ["１，２３４円"], "50": ["12,50 €"]}
    assert [(text, gold) for gold, texts in right.items() for text in texts if gsm8k(text, {"answer": gold}) != 1] == []
    assert [(text, gold) for gold, texts in wrong.items() for text in texts if gsm8k(text, {"answer": gold}) != 0] == []


def test_countdown_reads_full_width_signs() -> None:
    row = {"nums": [2, 3], "target": 5}
    assert countdown("<answer>（２＋３）＝５</answer>", row) == 1.0
    assert countdown("<answer>（２＋４）</answer>", row) == 0.0


@pytest.mark.parametrize(
    ("grader", "unclosed", "answer", "row"),
    [
        (math_answer, math_answer_unclosed, "\\boxed{5}", {"answer": "5"}),
        (gsm8k, gsm8k_unclosed, "so it is 5", {"answer": "5"}),
        (multiple_choice, multiple_choice_unclosed, "The answer is (B).", {"answer": "B"}),
        (countdown, countdown_unclosed, "<answer>2+3</answer>", {"nums": [2, 3], "target": 5}),
    ],
)
def test_thinking_that_is_never_closed_is_read_by_the_functions_for_it(
    grader: Grader, unclosed: Grader, answer: str, row: dict[str, Any]
) -> None:
    """They read behind `</think>` where it stands, as the others do."""
    for text in (f"<think> {answer}", answer, f"x <think> {answer}"):
        assert unclosed(text, row) == 1.0
    assert grader(f"<think> {answer}", row) == 0.0
    assert unclosed(f"<think>hm</think> {answer}", row) == 1.0
    assert unclosed(f"<think> {answer} </think> no idea", row) == 0.0


LONG = [
    "答" * 100_000, "答案是" * 40_000, "五" * 100_000, "二分之" * 40_000,
    "C" + " " * 200_000 + "x", "the answer " * 20_000,
    "I choose the " * 20_000, "not " * 50_000, "Option C: " * 20_000, "C is the correct " * 12_000, "A, " * 60_000,
    "[[" * 100_000, "(1," * 60_000, "\\begin{pmatrix}" * 12_000, "$\\begin{pmatrix}1\\\\2" * 8_000, "x<1 or " * 30_000,
    "one hundred and " * 12_000, "there is no " * 16_000, "no real " * 25_000, "1 \\text{ or } " * 15_000,
    "\\boxed{1} and the x is " * 8_000, "١٫" * 80_000, "answer\n" * 28_000, "answer" + "\n" * 200_000,
    "the answer is C or " * 10_000, "\\\\frac" * 30_000, "]1,2[" * 40_000, "... , " * 30_000, "\\{x \\mid x" * 20_000,
    "50\\%" * 50_000, "=".join("1" * 60_000), "不选" * 80_000, "(1,2)^" * 30_000, "\\text{ and " * 18_000,
]  # fmt: skip
"""Texts on which the patterns of these kinds begin anew at every place."""


@pytest.mark.parametrize("grader", [math_answer, gsm8k, multiple_choice])
def test_no_text_of_these_kinds_takes_longer_than_its_length(grader: Grader) -> None:
    row = {"answer": "G" if grader is multiple_choice else "987654"}
    for text in LONG:
        for written in (text, f"\\boxed{{{text[:900]}}}", text + "\nThe answer is x."):
            start = time.process_time()
            assert grader(written, row) == 0.0, written[:60]
            assert time.process_time() - start < 3.0, written[:60]
