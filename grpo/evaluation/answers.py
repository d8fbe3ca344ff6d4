"""The final answer of a completion, as an evaluation counts it and the samples show it."""

from __future__ import annotations

import re

BOX = re.compile(r"\\boxed\s*(?:(?=\{)|(-?\.?\d[^\s$\\{}]*))")
BRACE = re.compile(r"\\.|[{}]", re.S)
NUMBER = re.compile(r"-?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
BRACKET = re.compile(r"[(\[]|\\\{")
MARKUP = re.compile(r"\\(?:text|math)[a-z]*|\*\*|[${}\\]")
LONE = re.compile(r"\(?([A-Z])\)?[.:]?")
"""A multiple-choice letter: B, (B), B."""
SAID = re.compile(
    rf"(?i:answer)(?i:\s+is\b\s*+:?|\s*+:)\s*+(?:(?i:option\s+)?(?!I\s+[a-z])({LONE.pattern})(?=\s|[,;!]|$)"
    rf"(?!\s*(?:[=+<>]|(?:or|and|/|,|&)\s*\(?[A-Z]\b))|((?>{NUMBER.pattern}))(?!\s*(?:[-=+*/^]|times|cdot)))"
)
"""Matches "answer is B" and "answer is 5"; not alternatives (A or B), a variable (N = 5) or a sum (5 + 2 = 7)."""


def final_answer(text: str) -> str:
    """Return the final answer of a completion, normalized for voting; empty if its last box is not closed.

    The answer is the first of these that exists: the content of the last `\\boxed{...}`, the text after the last `####`
    on its line, the last `<answer>...</answer>`, the letter or number of the last "answer is ...", a last line that is
    a single letter, the last number, the whole text.
    """
    found = ending(text.rpartition("</think>")[2].replace("\u2212", "-"))
    if letter := LONE.fullmatch(MARKUP.sub("", found).strip()):
        return letter[1]
    if not BRACKET.search(found):  # within brackets, commas separate members
        found = THOUSANDS.sub(lambda number: number[0].replace(",", ""), found)
    return "".join(found.split()).rstrip(".,")


def ending(text: str) -> str:
    """Return the final answer as written."""
    if boxes := list(BOX.finditer(text)):
        return boxes[-1][1] or inside(text, boxes[-1].end())
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0]
    plain = MARKUP.sub("", text).strip()
    if said := list(SAID.finditer(plain)):
        return said[-1][1] or said[-1][3]
    last = plain.rpartition("\n")[2].strip()
    if LONE.fullmatch(last):
        return last
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else text


def inside(text: str, start: int) -> str:
    """Return the text inside the brace at `start`; empty if it is not closed. Escaped braces do not count."""
    depth = 0
    for mark in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start + 1 : mark.start()]
    return ""
