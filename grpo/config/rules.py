"""Helpers for validation rules between options."""

from __future__ import annotations

from typing import Any

from grpo.types import UserError


def need(ok: bool, sentence: str) -> None:
    """Raise UserError with `sentence` unless `ok`."""
    if not ok:
        raise UserError(sentence)


def inert(section: Any, defaults: Any, names: tuple[str, ...], prefix: str, why: str) -> None:
    """Raise UserError for the first of `names` that is not at its default, because it would have no effect."""
    for name in names:
        value, default = getattr(section, name), getattr(defaults, name)
        need(
            value == default,
            f"{prefix}{name}={value} has no effect {why}; leave it out (default: {prefix}{name}={default})",
        )
