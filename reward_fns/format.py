"""Reward for the format `<think>...</think><answer>...</answer>`.

Each tag must occur once, in this order, with text inside each pair and only white space outside. A chat template may
end the prompt with `<think>`, which is then missing in the completion. It is added if `info["prompt"]`, which the
trainer gives, ends with it. Without `info` the completion must have all tags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

INSIDE = r"((?:(?!</?(?:think|answer)>).)*)"
"""Any text without one of the four tags."""
FORM = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.S)


def format(
    completion: str,
    row: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    log_extra: Callable[[str, Any], None] | None = None,
) -> float:
    """Return 1.0 if the completion has the format, else 0.0. `row` is not used.

    `log_extra`: given by the trainer; it is passed why the completion gets 0.
    """
    prefilled = info is not None and info["prompt"].rstrip().endswith("<think>")
    found = FORM.fullmatch("<think>" + completion if prefilled else completion)
    right = found is not None and bool(found[1].strip() and found[2].strip())
    if log_extra is not None:
        outside = "a tag is missing or repeated, or there is text outside of the tags"
        log_extra("why", None if right else outside if found is None else "there is nothing inside a pair of tags")
    return 1.0 if right else 0.0
