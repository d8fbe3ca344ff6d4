"""Reward for an exact match with the row's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

GOLD = True
"""The reward compares with the row's gold answer, which is checked before a run."""


def arithmetic(completion: str, row: Mapping[str, Any], log_extra: Callable[[str, Any], None] | None = None) -> float:
    """Return 1.0 if the completion, without surrounding white space, equals `row["answer"]`, else 0.0.

    `log_extra`: given by the trainer; it is passed what is compared, and why it gets 0.

    Raises KeyError without `answer`, ValueError if it is null.
    """
    if row["answer"] is None:
        raise ValueError("the gold answer is null")
    answer = completion.strip()
    right = answer == str(row["answer"])
    if log_extra is not None:
        log_extra("extracted", answer)
        log_extra("why", None if right else "the whole completion is not the gold answer")
    return 1.0 if right else 0.0
