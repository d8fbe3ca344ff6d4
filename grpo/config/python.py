"""Recipes and options as Python values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from grpo.config.schema import Config
from grpo.types import Json, UserError

Value: TypeAlias = "str | Path | int | float | bool | Sequence[Value] | Mapping[str, Value] | None"
"""Value of an option or of a section."""
Recipe: TypeAlias = "str | Path | Mapping[str, Value] | Config"
"""Path of a YAML file, the name of a built-in recipe, its content as a mapping, or a loaded config."""
Reward: TypeAlias = "str | Mapping[str, str]"
"""Path of a reward file, or its section in a recipe."""


def plain_value(value: Value, where: str) -> Json:
    """Return `value` as YAML and JSON have it. Instances of subclasses of str, int and float, such as numpy.float64 or
    the members of an IntEnum, become plain ones. `where`: the name of the value in error messages.

    Raises UserError naming a value of another type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        keys = [str.__str__(key) if isinstance(key, str) else str(key) for key in value]
        return {key: plain_value(item, f"{where}.{key}") for key, item in zip(keys, value.values(), strict=True)}
    if isinstance(value, list | tuple):
        return [plain_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise UserError(f"{where}: {value!r:.100} is a {type(value).__name__}, which is no value of an option")


def override_texts(overrides: Mapping[str, Value]) -> list[str]:
    """Return overrides in the form of the command line, `section.option=value`.

    Raises UserError naming a value that no option can have.
    """
    values = {option: plain_value(value, option) for option, value in overrides.items()}
    return [
        f"{option}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for option, value in values.items()
    ]
