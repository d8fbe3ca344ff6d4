"""Last line of each benchmark's standard output: one JSON object with its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Figure: TypeAlias = "str | float | bool | Sequence[Figure] | Mapping[str, Figure] | None"


def print_result(benchmark: str, **figures: Figure) -> None:
    """Print `{"benchmark": benchmark, ...figures}` as one line. Must be called last.

    The name of a figure ends in its unit (`step_s`, `peak_mib`) unless it is a count, a share or a ratio.
    Raises ValueError for a figure that is NaN or infinite, which JSON does not support.
    """
    print(json.dumps({"benchmark": benchmark, **figures}, allow_nan=False), flush=True)
