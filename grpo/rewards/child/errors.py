"""Sentences about errors of reward functions."""

from __future__ import annotations

import os
import re
import resource
import traceback
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

OWN = str(Path(__file__).parents[1]) + os.sep
"""Folder of the worker's code."""
MAX_COLUMNS = 12
"""Maximum number of columns that a message lists."""
SIMILAR = 0.4
"""Minimum similarity of names, from 0 to 1 (`difflib.SequenceMatcher.ratio`)."""
NOT_GIVEN = ("environments", "prompt_ids")
"""Parameters that functions written for TRL may have and style trl does not provide. `environments` come from the
`environment_factory` of TRL's trainer, which has no counterpart here."""


def described(error: BaseException) -> str:
    """Return the type and the message of `error` on one line."""
    try:
        message = str(error.msg if isinstance(error, SyntaxError) else error)
    except BaseException:  # noqa: BLE001 - the user's own exception class may fail to print
        message = "(its message cannot be printed)"
    message = " ".join(message.split())
    return f"{type(error).__name__}: {message[:160]}" if message else type(error).__name__


def hinted(error: BaseException, index: int, withheld: Collection[str]) -> str:
    """Return a hint, in parentheses, if the message of `error` names something that rewards do not get, or if memory is
    the cause; else ""."""
    try:
        names = re.findall(r"\w+", str(error))
    except BaseException:  # noqa: BLE001 - see `described`
        return ""
    if kept := [name for name in dict.fromkeys(names) if name in withheld]:
        return f" ({withheld_words(kept, index)})"
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if isinstance(error, MemoryError) and limit != resource.RLIM_INFINITY:
        return f" (a worker may use {memory_words(limit / 2**30, index)})"
    if isinstance(error, KeyError) and len(names) == 1 and names[0] in NOT_GIVEN:
        return f" (style trl gives no {names[0]})"
    return ""


def memory_words(gib: float, index: int | str = "i") -> str:
    """Return the memory limit of a worker in words, and how to raise it."""
    return f"memory_gib={gib:g}; if it needs more, set rewards[{index}].memory_gib higher, such as {2 * gib:g}"


def withheld_words(names: Sequence[str], index: int) -> str:
    """Return why reward number `index` does not see these environment variables, and how to pass them on."""
    every = ", ".join(names)
    return f"rewards do not see {every}, which looks like a secret; rewards[{index}].env: [{every}] passes it on"


def columns_words(missing: str, columns: Iterable[str]) -> str:
    """Return the columns of a row in words, those with names similar to `missing` first, at most MAX_COLUMNS."""
    import difflib  # noqa: PLC0415 - only for errors

    names = list(columns)
    near = difflib.get_close_matches(missing, names, n=MAX_COLUMNS, cutoff=SIMILAR)
    ordered = [*near, *(name for name in names if name not in near)]
    more = f" and {len(names) - MAX_COLUMNS} more" if len(names) > MAX_COLUMNS else ""
    return ", ".join(ordered[:MAX_COLUMNS]) + more if names else "none"


def user_place(error: BaseException, file: str, shown: str, defined: str = "") -> str | None:
    """Return `path:line` of the last frame of `error` in the reward file or its folder, else in the file `defined`,
    else outside OWN."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 1))
    folder = str(Path(file).parent) + os.sep
    theirs = [f for f in frames if f[0].startswith(folder) and "site-packages" not in f[0][len(folder) :]]
    others = [f for f in frames if not f[0].startswith(OWN) and not f[0].startswith("<frozen")]
    others = [f for f in others if f[0] == defined] or others
    if not theirs:
        return f"{others[-1][0]}:{others[-1][1]}" if others else None
    name, line = theirs[-1]
    return f"{Path(shown).parent / Path(name).relative_to(folder)}:{line}"
