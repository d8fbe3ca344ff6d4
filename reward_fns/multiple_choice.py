"""The letter that a completion chooses, compared with the row's.

What is read: the part behind the last `</think>`, and in it the last `<answer>...</answer>`, where there are such.
There, the first of these that is found: the last `\\boxed{B}`; the last "answer is (B)" or "Answer: B"; a text that is
or begins with a lone letter, "B", "(B)", "**B**", "B. because ..."; a last line that is a lone letter. A choice
between letters ("A or B") is no answer. How it is compared: the letters A to Z must be the same.
In a box and in the row they may be small; elsewhere a small letter is a word ("a") and no choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MARKUP = re.compile(r"\\(?:text|math)[a-z]*|[*${}\\]")
LETTER = r"\(?([A-Z])(?:\)|\b)"
HEDGE = r"(?!\s*(?:or|and|/|,|&)\s*\(?[A-Z]\b)"
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
ALONE = re.compile(r"\(?([A-Za-z])(?:\)?[.:]?|\)?[.:]\s.*|\)\s.*)", re.S)
"""A letter, or a letter with punctuation and the text of its option."""
SAID = re.compile(
    rf"(?i:answer|choice|option)(?i:\s+is\s*(?::\s*)?|\s*:\s*)(?i:option\s+)?(?!I\s+[a-z]){LETTER}(?!'){HEDGE}"
)
OPENING = re.compile(rf"{LETTER}\s*(?:[.:。](?=\s|$)|(?<=\))|$){HEDGE}")


def multiple_choice(completion: str, row: Mapping[str, Any]) -> float:
    """1.0 if the completion chooses the letter `row["answer"]`, else 0.0 (see the top of this file).

    Raises KeyError without `answer`, ValueError when it is not a letter ("C", "(C)" or "C. its text").
    """
    if "answer" not in row:
        raise KeyError(f"the row has no column 'answer', only {sorted(row)}")
    gold = gold_letter(row["answer"])
    return 1.0 if chosen(completion) == gold else 0.0


def gold_letter(answer: Any) -> str:
    letter = ALONE.fullmatch(plain(str(answer)))
    if not isinstance(answer, str) or letter is None:
        raise ValueError(f"the gold answer must be a letter, not {answer!r}")
    return letter[1].upper()


def plain(text: str) -> str:
    """`text` without emphasis and LaTeX around it."""
    return MARKUP.sub("", text).strip()


def chosen(completion: str) -> str | None:
    """The letter that the completion chooses, if any."""
    text = completion.rpartition("</think>")[2]
    _, tag, after = text.rpartition("<answer>")
    text = after.partition("</answer>")[0] if tag else text
    start = text.rfind("\\boxed")
    if start >= 0:
        box = BOXED.match(text, start)
        letter = ALONE.fullmatch(plain(box[1])) if box else None
        return letter[1].upper() if letter else None
    text = plain(text)
    said = SAID.findall(text)
    if said:
        return str(said[-1])
    letter = OPENING.match(text) or re.fullmatch(rf"{LETTER}\.?", text.rpartition("\n")[2].strip())
    return letter[1] if letter else None
