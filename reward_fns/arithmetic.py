"""Reward for an exact match with the row's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GOLD = True
"""The reward compares with the row's gold answer, which is checked before a run."""


def arithmetic(completion: str, row: Mapping[str, Any]) -> float:
    """Return 1.0 if the completion, without surrounding white space, equals `row["answer"]`, else 0.0.

    Raises KeyError without `answer`, ValueError if it is null.
    """
    if row["answer"] is None:
        raise ValueError("the gold answer is null")
    return 1.0 if completion.strip() == str(row["answer"]) else 0.0
