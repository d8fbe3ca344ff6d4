"""Columns of a row and their nested values: format strings, and config lines that turn a nested value into a column."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence

from grpo.suggest import suggest
from grpo.types import Unchecked

DEEPEST = 6
"""Maximum depth at which a value is searched."""


class _Format(string.Formatter):
    """Formatter that prefers a column's whole name over nesting: `{a.b}` is the column a.b if the row has one."""

    def get_field(
        self, field_name: str, args: Sequence[Unchecked], kwargs: Mapping[str, Unchecked]
    ) -> tuple[Unchecked, str]:
        if field_name in kwargs:
            return kwargs[field_name], field_name
        value, key = super().get_field(field_name, args, kwargs)
        return value, str(key)


_FORMAT = _Format()


def render(template: str, values: Mapping[str, Unchecked]) -> str:
    """Return `template` rendered with a row's columns. Raises the exceptions of `str.format`."""
    return _FORMAT.vformat(template, (), values)


def value_at(field: str, values: Mapping[str, Unchecked]) -> Unchecked:
    """Return the value of a field: `a`, `a[b]` or `a[0][b]`. Raises the exceptions of `str.format`."""
    return _FORMAT.get_field(field, (), values)[0]


def hint(wanted: str, values: Mapping[str, Unchecked]) -> str:
    """Return `; ...` about a column that a row does not have: the config line that makes it from a nested value, or the
    column with the most similar name. Empty if there is neither."""
    path = nested(wanted, values)
    if path is not None:
        return f"; it is inside another: {line(wanted, path)}"
    return suggest(wanted, [*values])


def line(name: str, path: str) -> str:
    """Return the `columns` option that makes the column `name` from the field `path`."""
    return f'columns: {{{name if re.fullmatch(r"[A-Za-z_]+", name) else chr(34) + name + chr(34)}: "{{{path}}}"}}'


def nested(wanted: str, values: Mapping[str, Unchecked]) -> str | None:
    """Return the first field that `wanted` may mean: `a.b`, `a['b']` and `b` may all mean `a[b]`. None without one."""
    parts = [part for part in re.findall(r"[^.\[\]'\"]+", wanted) if not part.isdigit()] or [""]
    return next(
        (path for path, keys, _ in _paths(values) if path.endswith(f"[{keys[-1]}]") and keys[-len(parts) :] == parts),
        None,
    )


def longest_text(name: str, value: Unchecked) -> str | None:
    """Return the field of the longest text inside a nested value; None without a text."""
    texts = {path: text for path, _, text in _paths({name: value}) if isinstance(text, str)}
    return max(texts, key=lambda path: len(texts[path]), default=None)


def is_nested(value: Unchecked) -> bool:
    """Return whether a value contains a mapping, so that a format string would render it as Python."""
    if isinstance(value, list | tuple):
        return any(is_nested(item) for item in value)
    return isinstance(value, Mapping)


def _paths(values: Mapping[str, Unchecked]) -> Iterator[tuple[str, list[str], Unchecked]]:
    """Yield (field, names on the path, value) of each part that a field can name, the shallowest first. Only the first
    item of a list is visited."""
    level = [(key, [key], value) for key, value in values.items() if not re.search(r"[.\[\]{}:!]", key)]
    for _ in range(DEEPEST):
        below: list[tuple[str, list[str], Unchecked]] = []
        for path, keys, value in level:
            yield path, keys, value
            if isinstance(value, Mapping):
                inner = [(str(key), part) for key, part in value.items() if not re.search(r"[\[\]{}:!]", str(key))]
                below += [(f"{path}[{key}]", [*keys, key], part) for key, part in inner]
            elif isinstance(value, list | tuple) and value:
                below.append((f"{path}[0]", keys, value[0]))
        level = below
