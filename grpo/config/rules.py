"""The rules that are declared beside the options, and helpers for rules between options."""

from __future__ import annotations

import functools
import math

from grpo.config.aliases import written
from grpo.config.declare import OnlyWith
from grpo.config.options import declaration, leaves, options, values
from grpo.config.schema import Config
from grpo.types import Unchecked, UserError


def need(ok: bool, sentence: str) -> None:
    """Raise UserError with `sentence` unless `ok`."""
    if not ok:
        raise UserError(sentence)


def value_of(c: Config, name: str) -> Unchecked:
    """Return the value of the option with this full name."""
    return functools.reduce(getattr, name.split("."), c)


def inert(c: Config, name: str, why: str) -> None:
    """Raise UserError if an option is not at its default, because it would have no effect."""
    value, default = value_of(c, name), options()[name].default
    need(
        value == default,
        f"{name}={written(value)} has no effect {why}; leave it out (default: {name}={written(default)})",
    )


def validate_declared(c: Config) -> None:
    """Raise UserError for the first value that is not finite, that is out of the bounds of its option, or that has no
    effect beside the other options."""
    for name, value in values(c):
        option = declaration(name)
        for part, item in leaves(value, name):
            if isinstance(item, str):
                need("\0" not in item, f"{part} must not hold a NUL character, as {item!r:.80} does")
            elif isinstance(item, int | float):
                finite = isinstance(item, int) or math.isfinite(item)
                need(finite, f"{part} must be a finite number, not {item}")
                if option and option.bound:
                    need(option.bound.holds(item), option.bound.refusal(part, item))
    for name, option in options().items():
        for rule in option.only_with if "[i]" not in name else ():
            if (why := _unused(c, name, rule)) is not None:
                inert(c, name, why)


def _unused(c: Config, name: str, rule: OnlyWith) -> str | None:
    """Return why the rule makes an option unused; None if it is used."""
    other = rule.other(name)
    value = value_of(c, other)
    if value in rule.values if rule.values else value:
        return None
    if rule.reason:
        return rule.reason
    if rule.values:
        return f"with {other}={written(value)}, only with {rule.words}"
    return f"without {other}" + ("=true" if value is False else "")
