"""The suggestion in a message about an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

LIKE = 0.5
"""Minimum similarity of a suggestion, from 0 to 1 (`difflib.SequenceMatcher.ratio`)."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the known name that is most similar to `name`, or "" if none is similar.

    `known`: the names, or a mapping from each name to the text to show for it.
    """
    texts = known if isinstance(known, Mapping) else {each: each for each in known}
    near = difflib.get_close_matches(name, texts, n=1, cutoff=LIKE)
    return f"; did you mean {texts[near[0]]}?" if near else ""
