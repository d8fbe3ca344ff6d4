"""The two forms that a rule between options has."""

from __future__ import annotations

from typing import Any

from grpo.types import UserError


def need(ok: bool, sentence: str) -> None:
    """Raises UserError with `sentence` unless `ok`."""
    if not ok:
        raise UserError(sentence)


def inert(section: Any, defaults: Any, names: tuple[str, ...], prefix: str, why: str) -> None:
    """Options that would change nothing must be left at their defaults. Raises UserError naming the first."""
    for name in names:
        value, default = getattr(section, name), getattr(defaults, name)
        need(value == default, f"{prefix}{name}={value} has no effect {why}; leave it out (default {default})")
