"""Python format strings over a row's columns, which render prompts and map columns."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping

from grpo.data.columns import hint, is_nested, line, longest_text, nested, render, value_at
from grpo.data.rows import Row
from grpo.suggest import one_line
from grpo.types import Unchecked, UserError


def render_template(template: str, row: Row, *, option: str) -> str:
    """Return `template` rendered with the row's columns. Raises UserError naming `option` and the row."""
    for field, value in zip(_fields(template, option), values_of(template, row, option=option), strict=True):
        if is_nested(value):
            raise UserError(f"{option}: {row.where}: {_python(field, value)}")
    try:
        return render(template, row.values)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise _misfit(template, row, option, error) from error


def values_of(template: str, row: Row, *, option: str) -> list[Unchecked]:
    """Return the value of each field of `template`. Raises UserError for a missing column or a null."""
    values = []
    for field in _fields(template, option):
        column = field if field in row.values else re.split(r"[.\[]", field, maxsplit=1)[0]
        if column not in row.values:
            raise UserError(
                f"{option}: {row.where} has no column {column!r}; it has {', '.join(row.values) or 'none'}"
                + (_unwritable(column, row) or hint(column, row.values))
            )
        try:
            value = value_at(field, row.values)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise _misfit(template, row, option, error) from error
        if value is None:
            raise UserError(f"{option}: {row.where}: column {field!r} is null, which would be written as 'None'")
        values.append(value)
    return values


def _python(field: str, value: Unchecked) -> str:
    """Return the error text for a value that would be rendered as Python, with a config line that selects one text."""
    column = re.split(r"[.\[]", field, maxsplit=1)[0]
    text = longest_text(field, value)
    turns = isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    chat = f"; as turns of a chat: data.style=chat, data.messages_column={field}" if turns else ""
    part = f"; one of its texts alone: {line(column, text)}" if text else ""
    return f"column {field!r} has named parts, which would be written as Python: {value!r:.80}{part}{chat}"


def _unwritable(column: str, row: Row) -> str:
    """Return a hint about a column whose name has characters that end a name in a format string, or an empty string."""
    found = [name for name in row.values if name.startswith((f"{column}:", f"{column}!")) or set("{}") & set(name)]
    return (
        f"; {found[0]!r} cannot be named in a format string, give the column a name without : ! {{ }}" if found else ""
    )


@functools.cache
def _fields(template: str, option: str) -> tuple[str, ...]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(
            f"{option}: {template!r} is not a format string: {error}; literal braces are written {{{{ and }}}}"
        ) from error
    for field in fields:
        column = re.split(r"[.\[]", field, maxsplit=1)[0]
        if not column or column.isdigit():
            raise UserError(
                f"{option}: {template!r} has {{{column}}}, which names no column; "
                "literal braces are written {{ and }}"
            )
    return tuple(fields)


def _misfit(template: str, row: Row, option: str, error: Exception) -> UserError:
    fields = [field for field in _fields(template, option) if re.search(r"[.\[]", field)]
    right = {field: path for field in fields if (path := nested(field, row.values)) and path != field}
    write = "".join(f"; write {{{path}}} for {{{field}}}" for field, path in right.items())
    return UserError(f"{option}: {template!r} does not fit {row.where}: {one_line(error)}{write}")
