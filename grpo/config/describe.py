"""The output of `grpo options`, from the types, defaults and docstrings of `grpo.config.schema`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from grpo.config import schema
from grpo.types import UserError

WIDTH = 120
"""Maximum width of a line, in columns."""
INDENT = "    "


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Description of one option."""

    name: str
    """Full name, with `[i]` for an index into a list."""
    kind: str
    default: str
    """Default as written in a recipe, or "required" if there is none."""
    meaning: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Description of one section."""

    name: str
    meaning: str
    examples: tuple[str, ...]
    """Overrides, quoted for a shell."""
    options: tuple[Option, ...]


def options_text(asked: str = "") -> str:
    """Return the descriptions of all options, or of one section (with examples), or of one option.

    Raises UserError if `asked` is neither a section nor an option.
    """
    found = [*sections(schema.Config, "")]
    if not asked:
        every = [line for section in found for line in section_lines(section, examples=False)]
        return "\n".join([*every, "grpo options SECTION shows examples, too: grpo options algorithm"])
    name = plain(asked)
    inside = [s for s in found if plain(s.name) == name or plain(s.name).startswith(f"{name}.")]
    if inside:
        return "\n".join(line for section in inside for line in section_lines(section, examples=True)).rstrip()
    options = [o for s in found for o in s.options if name in (plain(o.name), o.name.rpartition(".")[2])]
    if options:
        return "\n".join(line for option in options for line in option_lines(option))
    known = {plain(section.name): section.name for section in found}
    known |= {plain(o.name): o.name for s in found for o in s.options}
    known |= {o.name.rpartition(".")[2]: o.name for s in found for o in s.options}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {known[near[0]]}?" if near else f"sections: {', '.join(s.name for s in found)}"
    raise UserError(f"no section and no option is called {asked}; {hint}")


def plain(name: str) -> str:
    """Return `name` without list indices: rewards[0].weight, rewards.0.weight and rewards[i].weight give
    rewards.weight."""
    return re.sub(r"\[\w*\]|\.\d+(?=\.|$)", "", name.strip().rstrip("."))


def sections(cls: type, prefix: str) -> Iterator[Section]:
    """Yield every section below `cls`, each with its direct options."""
    hints, texts = typing.get_type_hints(cls), field_texts(cls)
    options, below = [], []
    for f in dataclasses.fields(cls):
        kind, name = hints[f.name], f"{prefix}{f.name}"
        items = typing.get_args(kind) if typing.get_origin(kind) is list else ()
        if dataclasses.is_dataclass(kind):
            below.append((typing.cast(type, kind), name))
        elif items and dataclasses.is_dataclass(items[0]):
            below.append((typing.cast(type, items[0]), f"{name}[i]"))
        else:
            options.append(
                Option(name=name, kind=kind_text(kind), default=default_text(f), meaning=texts.get(f.name, ""))
            )
    if prefix:
        meaning, _, examples = (cls.__doc__ or "").partition("\n\n")
        yield Section(
            name=prefix.rstrip("."),
            meaning=in_yaml(meaning),
            examples=tuple(line.strip() for line in examples.splitlines() if plain(prefix) in line),
            options=tuple(options),
        )
    for inner, name in below:
        yield from sections(inner, f"{name}.")


def field_texts(cls: type) -> dict[str, str]:
    """Return the docstring below each field of `cls` and its base classes, read from the source."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    bodies = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {}
    for base in reversed(cls.__mro__):
        body = bodies.get(base.__name__, [])
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = in_yaml(str(text.value.value))
    return found


def in_yaml(text: str) -> str:
    """Return a text as one line, with None replaced by null, as recipes write it."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def kind_text(kind: Any) -> str:
    """Return a type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if one is types.NoneType else kind_text(one) for one in inner)
    if origin in (list, tuple):
        count = f"{len(inner)} " if origin is tuple and inner[-1] is not ... else ""
        return f"list of {count}{kind_text(inner[0])}s"
    if origin is dict:
        return f"mapping of {kind_text(inner[0])} to {kind_text(inner[1])}"
    return {str: "text", int: "integer", float: "number", bool: "true | false"}.get(kind, "value")


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return a default as a recipe would write it."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default == MISSING:
        return "required"
    if isinstance(default, float):
        return f"{default:g}"
    shown = yaml.safe_dump(
        list(default) if isinstance(default, tuple) else default, default_flow_style=True, width=WIDTH
    )
    return str(shown).removesuffix("...\n").strip()


def section_lines(section: Section, *, examples: bool) -> Iterator[str]:
    """Yield the lines of a section and its options."""
    yield from textwrap.wrap(f"{section.name}: {section.meaning}", WIDTH, subsequent_indent=INDENT)
    if examples and section.examples:
        yield ""
        yield from (f"{INDENT}grpo train RECIPE {example}" for example in section.examples)
        yield ""
    for option in section.options:
        yield from option_lines(option)
    yield ""


def option_lines(option: Option) -> Iterator[str]:
    """Yield the lines of an option: name, default and type, then the meaning."""
    line = f"{option.name} = {option.default}   ({option.kind})"
    yield from textwrap.wrap(line, WIDTH, subsequent_indent=INDENT, break_on_hyphens=False)
    yield from textwrap.wrap(
        option.meaning, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False
    )
