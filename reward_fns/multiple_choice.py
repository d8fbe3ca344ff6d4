"""The letter that a completion chooses, compared with the row's.

What is read: the part behind the last `</think>`, and in it the last `<answer>...</answer>`, where there are such.
Behind a `<think>` that is not closed there is no answer. There, the first of these that is found: the last
`\\boxed{B}`; the last "answer is (B)" or "Answer: B"; a text that is or begins with a lone letter, "B", "(B)",
"**B**", "B. because ..."; a last line that is a lone letter. A choice between letters ("A or B", also of boxes) is no
answer, nor are letters in a row ("A. B. C. D.", the options line by line). How it is compared: the letters A to Z must
be the same.
In a box and in the row they may be small; elsewhere a small letter is a word ("a") and no choice.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

GOLD = True
"""It compares with the row's gold answer, which is tried before a run."""

MARKUP = re.compile(r"\\(?:text|math)[a-z]*|[*${}\\]")
LETTER = r"\(?([A-Z])(?:\)|\b)"
HEDGE = r"(?!\s*(?:or|and|[/,;&+])\s*(?:(?:maybe|perhaps|possibly)\s+)?\(?[A-Z]\b)"
FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}  # as Chinese and Japanese write letters and signs
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
ALONE = re.compile(r"\(?([A-Za-z])(?:\)?[.:]?|\)?[.:]\s.*|\)\s.*)", re.S)
"""A letter, or a letter with punctuation and the text of its option."""
SAID = re.compile(
    rf"(?i:answer|choice|option)(?i:\s+is\s*(?::\s*)?|\s*:\s*)(?i:(?:option|choice)\s+)?[\"'\[]?(?!I\s+[a-z]){LETTER}(?!'\w){HEDGE}"
)
OPENING = re.compile(rf"{LETTER}\s*(?:[.:。](?=\s|$)|(?<=\))|$){HEDGE}")
OPTION = re.compile(r"^ *\(?([A-Z])[.:)](?!\S)", re.M)


def multiple_choice(completion: str, row: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> float:
    """1.0 if the completion chooses the letter `row["answer"]`, else 0.0 (see the top of this file).

    Raises KeyError without `answer`, ValueError when it is not a letter ("C", "(C)" or "C. its text").
    """
    if "answer" not in row:
        raise KeyError(f"the row has no column 'answer', only {sorted(row)}")
    gold = gold_letter(row["answer"])
    return 1.0 if chosen(behind_reasoning(completion, info)) == gold else 0.0


def behind_reasoning(completion: str, info: Mapping[str, Any] | None) -> str:
    """The part of `completion` behind its reasoning; empty where that is not finished.

    `info`: the trainer's; a prompt that ends with `<think>` has begun the reasoning.
    """
    begun = info is not None and info["prompt"].rstrip().endswith("<think>") and "</think>" not in completion
    text = completion.rpartition("</think>")[2]
    return "" if begun or "<think>" in text else text


def gold_letter(answer: Any) -> str:
    letter = ALONE.fullmatch(plain(str(answer)))
    if not isinstance(answer, str) or letter is None:
        raise ValueError(f"the gold answer must be a letter, not {answer!r}")
    return letter[1].upper()


def plain(text: str) -> str:
    """`text` without emphasis and LaTeX around it."""
    return MARKUP.sub("", text.translate(FULL_WIDTH)).strip()


def chosen(text: str) -> str | None:
    """The letter that the text behind a completion's reasoning chooses, if any."""
    _, tag, after = text.rpartition("<answer>")
    text = after.partition("</answer>")[0] if tag else text
    start = text.rfind("\\boxed")
    if start >= 0:
        return boxed(text, start)
    text = plain(text)
    said = list(SAID.finditer(text))
    if said:
        letter = said[-1]
        return None if is_list(text[letter.start(1) :].partition("\n")[0]) else letter[1]
    lines = [line for line in text.splitlines() if line.strip()]
    opening = OPENING.match(text)
    options = OPTION.findall(text)[:2] if OPTION.match(text) else []
    if opening and not is_list(lines[0]) and not is_list(" ".join(options)):
        return opening[1]
    last = re.fullmatch(rf"{LETTER}\.?", lines[-1].strip()) if lines else None
    return last[1] if last and not is_list(" ".join(lines[-2:])) else None


def boxed(text: str, start: int) -> str | None:
    """The letter in the box at `start`, the last one, if it is closed and not joined to one with another letter."""
    last = BOXED.match(text, start)
    if last is None:
        return None
    letters = set[str]()
    for box in (last, *reversed(list(BOXED.finditer(text, 0, start)))):
        between = re.sub(r"[^\w.:=?!]", "", plain(text[box.end() : start]))
        if between not in ("", "or", "and"):
            break
        letter, start = ALONE.fullmatch(plain(box[1])), box.start()
        letters.add(letter[1].upper() if letter and not is_list(plain(box[1])) else "")
    return letters.pop() or None if len(letters) == 1 else None


def is_list(text: str) -> bool:
    """Two or more letters in the alphabet's order, with no word but "or" and "and"."""
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in ("or", "and")]
    return len(words) > 1 and all(len(word) == 1 for word in words) and "".join(words) in string.ascii_lowercase
