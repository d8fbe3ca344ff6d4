"""Find training prompts that overlap with evaluation prompts.

The comparison covers the text that comes from the rows, not the words that the template adds to all prompts. Two texts
are the same when their words and signs are the same; case and white space are ignored. They share an n-gram when n
consecutive words are the same, whatever stands between the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grpo.config import DataConfig
from grpo.data.rows import Row
from grpo.data.template import values_of
from grpo.types import Prompt

WORD = re.compile(r"\w+")
WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """One training prompt and the first evaluation prompt that it overlaps with."""

    prompt: Prompt
    held_out: Prompt
    exact: bool
    """True if both texts are the same; else they share an n-gram."""


def find_overlaps(train: Sequence[Prompt], held_out: Sequence[Prompt], data: DataConfig) -> list[Overlap]:
    """Return the training prompts that overlap with any evaluation prompt, in order."""
    n = data.overlap_ngram
    texts: dict[tuple[str, ...], Prompt] = {}
    grams: dict[tuple[str, ...], Prompt] = {}
    for prompt in held_out:
        text = content(prompt, data)
        texts.setdefault(tuple(WORD_OR_SIGN.findall(text)), prompt)
        for gram in _grams(text, n):
            grams.setdefault(gram, prompt)
    shared, found = grams.keys(), []
    for prompt in train:
        text = content(prompt, data)
        same = texts.get(tuple(WORD_OR_SIGN.findall(text)))
        if same is None and shared.isdisjoint(_grams(text, n)):
            continue
        other = same or next(grams[gram] for gram in _grams(text, n) if gram in grams)
        found.append(Overlap(prompt=prompt, held_out=other, exact=same is not None))
    return found


def content(prompt: Prompt, data: DataConfig) -> str:
    """Return the text from the row, casefolded: the values of the template's columns, or the last user turn."""
    if data.messages_column is not None:
        turns = [turn["content"] for turn in prompt.messages or () if turn["role"] == "user"]
        return turns[-1].casefold() if turns else ""
    row = Row(index=0, values=prompt.row, where=prompt.where)
    return " ".join(str(value) for value in values_of(data.template, row, option="data.template")).casefold()


def _grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Return every run of n words; none for a shorter text, nor for n = 0."""
    words = WORD.findall(text)
    return zip(*(words[i:] for i in range(n)), strict=False)
