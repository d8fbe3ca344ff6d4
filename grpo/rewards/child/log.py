"""Values that a call logs besides rewards."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from grpo.rewards.child.results import MAX_PARTS, BadReturnError, number

if TYPE_CHECKING:
    from grpo.types import Unchecked

LOGGED_BYTES = 1 << 20
"""Maximum size of what one call may log, as JSON."""
MAX_TEXT, MAX_NAME = 2000, 100
"""Maximum characters of a logged text (longer ones are truncated) and of a logged name."""
Loggable = str | float | bool | None
"""A value in a samples file."""


class LogError(Exception):
    """The function has logged something invalid. The message is written for the user."""


class Log:
    """Values that one call on `count` completions logs besides rewards, with TRL's `log_extra` and `log_metric`."""

    def __init__(self, count: int, names: set[str]) -> None:
        """Start an empty log. `names`: names that the reward has logged before. New ones are added to it."""
        self._count, self._names, self._left = count, names, LOGGED_BYTES
        self._columns: dict[str, list[Loggable]] = {}
        self.metrics: dict[str, tuple[float, int]] = {}
        """Name -> (sum, count) of the values."""
        self._mistake: LogError | None = None

    def log_extra(self, column: str, values: Unchecked) -> None:
        """Add values to a column of the samples file. In the end there must be one value per completion."""
        where = self._named("log_extra", column)
        values = listed(values)
        if not isinstance(values, list | tuple):
            raise self._wrong(f"{where} needs a list of values, one per completion, not {type(values).__name__}")
        kept = self._columns.setdefault(column, [])
        if len(kept) + len(values) > self._count:
            raise self._wrong(f"{where} was given {len(kept) + len(values)} values for {self._count} completions")
        for value in map(loggable, values):
            self._left -= len(json.dumps(value))
            if self._left < 0:
                raise self._wrong(f"{where} goes beyond {LOGGED_BYTES} bytes, more than one call may log")
            kept.append(value)

    def log_metric(self, name: str, value: float) -> None:
        """Add one value of a metric. The metric is the average of all values that are logged in a step."""
        where = self._named("log_metric", name)
        try:
            added = number(value)
        except BadReturnError as error:
            raise self._wrong(f"{where} needs a finite number, not {type(value).__name__} {value!r:.80}") from error
        total, count = self.metrics.get(name, (0.0, 0))
        if not math.isfinite(total + added):
            raise self._wrong(f"{where} was given numbers whose sum is not finite")
        self.metrics[name] = (total + added, count + 1)

    def columns(self) -> dict[str, list[Loggable]]:
        """Return name -> one value for each completion.

        Raises BadReturnError for an invalid call whose error the function has suppressed, and for a column that lacks
        values.
        """
        if self._mistake is not None:
            raise BadReturnError("exception", f"LogError: {self._mistake}")
        for column, values in self._columns.items():
            if len(values) != self._count:
                raise BadReturnError(
                    "wrong_count",
                    f"log_extra({column!r}) was given {len(values)} values for {self._count} completions",
                )
        return self._columns

    def _named(self, function: str, name: Unchecked) -> str:
        """Check and record the name that is logged. Return the call, in words."""
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
            raise self._wrong(f"{function} needs a name of 1 to {MAX_NAME} printable characters, not {name!r:.80}")
        if name not in self._names and len(self._names) >= MAX_PARTS:
            raise self._wrong(f"{function}({name!r}) is one name more than the {MAX_PARTS} that a reward may log by")
        self._names.add(name)
        return f"{function}({name!r})"

    def _wrong(self, sentence: str) -> LogError:
        self._mistake = self._mistake or LogError(sentence)
        return LogError(sentence)


def loggable(value: Unchecked) -> Loggable:
    """Return `value` as it is kept in a samples file: a number, None, or its text, truncated to MAX_TEXT."""
    if getattr(value, "ndim", None) == 0 and callable(item := getattr(value, "item", None)):  # scalars of numpy, torch
        value = item()
    if value is None or isinstance(value, bool) or type(value) is float:
        return value
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... (+{len(text) - MAX_TEXT} characters)"


def listed(values: Unchecked) -> Unchecked:
    """Convert a one-dimensional array or tensor to a list of Python numbers. Return anything else unchanged."""
    return values.tolist() if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist") else values
