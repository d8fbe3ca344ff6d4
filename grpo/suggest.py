"""Parts of messages: a suggestion for an unknown name, a list that is not too long, an error on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

LIKE = 0.5
"""Minimum similarity of a suggestion, from 0 to 1 (`difflib.SequenceMatcher.ratio`)."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the known name that is most similar to `name`, or "" if none is similar.

    `known`: the names, or a mapping from each name to the text to show for it.
    """
    texts = known if isinstance(known, Mapping) else {each: each for each in known}
    near = difflib.get_close_matches(name, texts, n=1, cutoff=LIKE)
    return f"; did you mean {texts[near[0]]}?" if near else ""


def first_of(texts: Sequence[str], count: int = 10) -> str:
    """Return the first `count` texts, separated by commas, and the number of the others: `a, b and 3 more`."""
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "")


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of `error`, or its class if it has none, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def common_start(one: str, other: str) -> int:
    """Return the number of characters at the beginning of two texts that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
