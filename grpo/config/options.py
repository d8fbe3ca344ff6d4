"""All options with what is declared beside them, and the values of a config under their full names."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from grpo.config.declare import Bound, Mark, OnlyWith, OnResume, OnSubmit
from grpo.config.schema import Config
from grpo.types import Json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind: TypeAlias = object
"""Type of an option: a class, or a form such as `list[str]`, `int | None` or `Literal["a", "b"]`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: its field, and what is declared beside it or beside its section."""

    name: str
    """Full name, with `[i]` for an index into a list."""
    section: type
    """The class of its section."""
    kind: Kind
    default: Json
    """MISSING if the option is required."""
    bound: Bound | None
    only_with: tuple[OnlyWith, ...]
    resume: OnResume
    submit: OnSubmit | None
    """None: the option is part of the submitted recipe as it is."""

    @property
    def plain_default(self) -> Json:
        """Return the default as a checkpoint has it: a tuple is a list there."""
        return list(self.default) if isinstance(self.default, tuple) else self.default


def general(name: str) -> str:
    """Return a name with `[i]` for each index into a list."""
    return re.sub(r"\[\d+\]", "[i]", name)


def section_class(kind: Kind) -> type | None:
    """Return `kind` if it is the class of a section, else None."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def item_class(kind: Kind) -> type | None:
    """Return the item class if `kind` is a list of sections, else None."""
    return section_class(*typing.get_args(kind)) if typing.get_origin(kind) is list else None


@functools.cache
def options() -> dict[str, Option]:
    """Return all options by name, those of list items included."""
    return {option.name: option for option in _below(Config, "", ())}


def _below(cls: type, prefix: str, above: tuple[Mark, ...]) -> Iterator[Option]:
    """Yield the options of a section and of the sections in it. `above`: the marks of the section."""
    hints, plain = typing.get_type_hints(cls, include_extras=True), typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind, name = plain[f.name], f"{prefix}{f.name}"
        marks: tuple[Mark, ...] = (*getattr(hints[f.name], "__metadata__", ()), *above)
        if section := section_class(kind):
            yield from _below(section, f"{name}.", marks)
        elif item := item_class(kind):
            yield from _below(item, f"{name}[i].", marks)
        else:
            yield Option(
                name=name,
                section=cls,
                kind=kind,
                default=getattr(cls(), f.name),
                bound=next((mark for mark in marks if isinstance(mark, Bound)), None),
                only_with=tuple(
                    mark for mark in marks if isinstance(mark, OnlyWith) and not name.startswith(f"{mark.option}[")
                ),
                resume=next((mark for mark in marks if isinstance(mark, OnResume)), OnResume.SAME),
                submit=next((mark for mark in marks if isinstance(mark, OnSubmit)), None),
            )


def declaration(name: str) -> Option | None:
    """Return the option of this name, with or without list indices, or the option that `name` is an entry of, such as
    `sampler.engine.block_size`; None if there is neither."""
    known, name = options(), general(name)
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return known.get(name)


def values(section: DataclassInstance | type[DataclassInstance], prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Yield (full name, value) of every option of a config; names have the indices of list items."""
    for f in dataclasses.fields(section):
        name, value = f"{prefix}{f.name}", getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from values(value, f"{name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                yield from values(item, f"{name}[{i}].")
        else:
            yield name, value


def leaves(value: Json, name: str = "") -> Iterator[tuple[str, Json]]:
    """Yield (full name, value) of each single value in a list or mapping, at any depth. `name`: that of `value`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}[{i}]")
    else:
        yield name, value
