"""Does the completion follow `<think>...</think><answer>...</answer>`?

Each tag stands there once, in this order, with something between the two of a pair and only white space outside. A
chat template may end the prompt with `<think>`, which is then no part of the completion: it is put back, seen in
`info["prompt"]`, which the trainer gives. Used alone, without `info`, the completion must have both tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

INSIDE = r"((?:(?!</?(?:think|answer)>).)*)"
"""Anything without one of the four tags."""
FORM = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.S)


def format(completion: str, row: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> float:
    """1.0 if the completion has the form, else 0.0; `row` is not used."""
    prefilled = info is not None and info["prompt"].rstrip().endswith("<think>")
    found = FORM.fullmatch("<think>" + completion if prefilled else completion)
    return 1.0 if found and found[1].strip() and found[2].strip() else 0.0
