"""Reward for GSM8K: the final number of a completion must equal the row's exactly.

Answer: the part after the last `</think>` is read. After an unclosed `<think>` there is no answer. The first of these
that is present gives the answer:

- the last `#### x` at the end of a line, the data set's own format
- the last `\\boxed{...}`
- the last number

Public graders of GSM8K read either the first ("strict") or the last ("flexible"). A completion that follows the format
is graded only by it. `####` before anything other than a number is a heading. A choice of numbers after it,
`#### 5 or 6`, is no answer.

Comparison: as rational numbers, so `1,234.50` = `1234.5`, `3/4` = `0.75`, `2e3` = `2000`. Currency and per cent signs,
commas between thousands and trailing full stops are ignored: `$5`, `5%` and `5.` are 5. Digits of other scripts and
full-width signs are read as ASCII, and `3,5` as 3.5.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

GOLD = True
"""The reward compares with the row's gold answer, which is checked before a run."""

MAX_DIGITS = 100
"""Maximum characters of a number. A longer number is a wrong answer, and so is an exponent of more than two digits."""

SIGNS = {0xFF01 + i: 0x21 + i for i in range(94)} | str.maketrans("\u2212٫٬٪", "-.,%")
"""Chinese, Japanese and Arabic signs -> ASCII."""
DECIMAL_COMMA = re.compile(r"(?<![\d.,])(0|\d{1,20}(?=,\d{1,2}(?!\d))),(\d{1,20})(?![\d,])", re.A)
EXPONENT = r"[eE][+-]?\d+"
NUMBER = (
    r"(?:-[$€£]?|[$€£]\s?-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?"
    rf"(?:\.\d+(?:{EXPONENT})?|(?<=\d)(?:\s?/\s?\d+|{EXPONENT})?)"
)
MARKED = re.compile(rf"####[\s*]*({NUMBER})(.*)")
LAST = re.compile(rf"(?<![A-Za-zÀ-ɏ\d_.)])(?:{NUMBER})")
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")


def gsm8k(
    completion: str,
    row: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    log_extra: Callable[[str, Any], None] | None = None,
) -> float:
    """Return 1.0 if the completion's final number is `row["answer"]`, else 0.0 (see the module's docstring).

    `log_extra`: given by the trainer; it is passed the number as written, and why it gets 0.

    The gold answer is a number, or a solution that ends with `#### x`. Raises KeyError without `answer`, ValueError
    if it is neither.
    """
    if "answer" not in row:
        raise KeyError(f"the row has no column 'answer', only {sorted(row)}")
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the gold answer must be a text or a number, not {answer!r}")
    gold = value(str(answer).rpartition("####")[2].strip().rstrip(" \t\r\n%."))
    if gold is None:
        raise ValueError(f"the gold answer {answer!r} is no number")
    text = in_ascii(behind_reasoning(completion, info))
    written, problem = final_number(DECIMAL_COMMA.sub(r"\1.\2", text))
    number = value(written) if written else None
    right = number == gold
    if log_extra is not None:
        if not right and not problem:
            problem = f"it is not {gold}" if number is not None else "it is too long, or divides by 0"
        elif not text:
            problem = "there is no text after the reasoning"
        log_extra("extracted", written or None)
        log_extra("why", problem or None)
    return 1.0 if right else 0.0


def gsm8k_unclosed(
    completion: str, row: Mapping[str, Any], log_extra: Callable[[str, Any], None] | None = None
) -> float:
    """Grade like `gsm8k`, for models that never close `<think>`: without `</think>`, read the whole completion."""
    return gsm8k(completion.replace("<think>", ""), row, log_extra=log_extra)


def behind_reasoning(completion: str, info: Mapping[str, Any] | None) -> str:
    """Return the part of `completion` after its reasoning; empty if the reasoning is unfinished.

    `info`: given by the trainer. If its prompt ends with `<think>`, the completion begins inside the reasoning.
    """
    begun = info is not None and info["prompt"].rstrip().endswith("<think>") and "</think>" not in completion
    text = completion.rpartition("</think>")[2]
    return "" if begun or "<think>" in text else text


def in_ascii(text: str) -> str:
    """Return `text` with the digits of all scripts, and full-width signs, replaced by ASCII."""
    if text.isascii():
        return text
    return re.sub(r"(?![0-9])\d", lambda digit: str(unicodedata.decimal(digit[0])), text.translate(SIGNS))


def final_number(text: str) -> tuple[str, str]:
    """Return the number that `text` gives as its answer, as written, and an empty text; or an empty text and why there
    is none."""
    for number, behind in reversed(MARKED.findall(text)):
        if not behind.strip(" \t\r%.*"):
            return number, ""
        several = len({value(each) for each in LAST.findall(number + behind)}) > 1
        if several and "=" not in behind and not re.match(r"[.):]\s", behind):
            return "", "#### is followed by several numbers"
    start = text.rfind("\\boxed")
    if start >= 0:
        box = BOX.match(text, start)
        inside = re.sub(r"\\(?:text|mbox)\s*\{[^{}]*\}|\\[!,;:]", "", box[1]) if box else ""
        numbers = LAST.findall(FRACTION.sub(r"\1/\2", inside.replace("{,}", ",").replace("\\$", "")))
        if len(numbers) == 1:
            return numbers[0], ""
        return "", "the last box is not closed" if box is None else "the last box does not have one number"
    numbers = LAST.findall(text)
    return (numbers[-1], "") if numbers else ("", "there is no number")


def value(number: str) -> Fraction | None:
    """Return the exact value of `number`; None if NUMBER does not match it, if it is too long, and for n/0."""
    if len(number) > MAX_DIGITS or not re.fullmatch(NUMBER, number) or re.search(r"[eE][+-]?\d{3}", number):
        return None
    try:
        return Fraction(re.sub(r"[$€£,\s]", "", number))
    except ZeroDivisionError:
        return None
