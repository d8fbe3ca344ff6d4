"""The numbers that reward functions return, checked and converted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from grpo.types import Unchecked

MAX_PARTS = 64
"""Maximum number of entries in a mapping that a reward returns, and of different names that it logs."""


class Returned(TypedDict):
    """Result of one completion. `value`: None if the reward abstains."""

    value: float | None
    parts: Mapping[str, float]


class Failure(TypedDict):
    """Failure of one completion. `failed`: its kind."""

    failed: str
    detail: str


Result = Returned | Failure


class BadReturnError(Exception):
    """A function returned something that is not a reward. `args`: (kind, detail)."""


def result(value: float | None, parts: Mapping[str, float] | None = None) -> Result:
    return {"value": value, "parts": parts or {}}


def failed(kind: str, detail: str) -> Result:
    return {"failed": kind, "detail": detail}


def refuse_crowd(returned: Sized) -> None:
    """Raise BadReturnError for more than MAX_PARTS entries: each entry becomes a metric."""
    if len(returned) > MAX_PARTS:
        raise BadReturnError(
            "wrong_type", f"returned a mapping of {len(returned)} entries; at most {MAX_PARTS} are taken"
        )


def number(value: Unchecked, key: str | None = None) -> float:
    """Convert `value` to a finite float: Python numbers and the scalars of numpy and torch, but no arrays.

    Raises BadReturnError naming `key`, the key of the returned mapping that has the value, if there is one.
    """
    of = "" if key is None else f" for {key!r:.80}"
    is_array = getattr(value, "ndim", 0) != 0
    if is_array or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise BadReturnError("wrong_type", f"returned {type(value).__name__} {value!r:.80}{of}, not a number")
    try:
        converted = float(value)
    except OverflowError as error:
        raise BadReturnError("not_finite", f"returned an integer beyond the range of floats{of}") from error
    if not math.isfinite(converted):
        raise BadReturnError("not_finite", f"returned {converted}{of}")
    return converted
