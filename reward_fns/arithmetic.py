"""Exact match with the row's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GOLD = True
"""It compares with the row's gold answer, which is tried before a run."""


def arithmetic(completion: str, row: Mapping[str, Any]) -> float:
    """1.0 if the completion, without surrounding white space, is `row["answer"]`; else 0.0.

    Raises KeyError without `answer`, ValueError when it is null.
    """
    if row["answer"] is None:
        raise ValueError("the gold answer is null")
    return 1.0 if completion.strip() == str(row["answer"]) else 0.0
