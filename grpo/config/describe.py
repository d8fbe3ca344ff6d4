"""The output of `grpo options`, from the types, defaults and docstrings of `grpo.config.schema`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
import threading
import types
import typing
from collections.abc import Iterator

import yaml
from omegaconf import MISSING

from grpo.config.options import Kind, Option, item_class, options, section_class
from grpo.config.schema import Config
from grpo.suggest import suggest
from grpo.types import Json, UserError

WIDTH = 120
"""Maximum width of a line, in columns."""
INDENT = "    "
PARSING = threading.Lock()
"""In Python 3.11, `ast.parse` can raise SystemError if two threads are in it at the same time."""


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
    found = [*sections()]
    if not asked:
        every = [line for section in found for line in section_lines(section, examples=False)]
        return "\n".join([*every, "grpo options SECTION shows examples, too: grpo options algorithm"])
    name = plain(asked)
    inside = [s for s in found if plain(s.name) == name or plain(s.name).startswith(f"{name}.")]
    if inside:
        return "\n".join(line for section in inside for line in section_lines(section, examples=True)).rstrip()
    asked_for = [o for s in found for o in s.options if name in (plain(o.name), o.name.rpartition(".")[2])]
    if asked_for:
        return "\n".join(line for option in asked_for for line in (*option_lines(option), *treatment_lines(option)))
    known = {plain(section.name): section.name for section in found}
    known |= {plain(o.name): o.name for s in found for o in s.options}
    known |= {o.name.rpartition(".")[2]: o.name for s in found for o in s.options}
    hint = suggest(name, known) or f"; sections: {', '.join(s.name for s in found)}"
    raise UserError(f"no section and no option is called {asked}{hint}")


def plain(name: str) -> str:
    """Return `name` without list indices: rewards[0].weight, rewards.0.weight and rewards[i].weight give
    rewards.weight."""
    return re.sub(r"\[\w*\]|\.\d+(?=\.|$)", "", name.strip().rstrip("."))


def sections(cls: type = Config, prefix: str = "") -> Iterator[Section]:
    """Yield every section of `cls`, whose options begin with `prefix`, with its direct options."""
    hints = typing.get_type_hints(cls)
    if prefix:
        meaning, _, examples = (cls.__doc__ or "").partition("\n\n")
        yield Section(
            name=prefix.rstrip("."),
            meaning=in_yaml(meaning),
            examples=tuple(line.strip() for line in examples.splitlines() if plain(prefix) in line),
            options=tuple(options()[f"{prefix}{name}"] for name in hints if f"{prefix}{name}" in options()),
        )
    for name, kind in hints.items():
        if section := section_class(kind):
            yield from sections(section, f"{prefix}{name}.")
        elif item := item_class(kind):
            yield from sections(item, f"{prefix}{name}[i].")


@functools.cache
def field_texts(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its base classes, or below each member of an enum, read
    from the source."""
    found = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)) if dataclasses.is_dataclass(cls) else [cls]:
        with PARSING:
            [node] = ast.parse(inspect.getsource(base)).body
        assert isinstance(node, ast.ClassDef)
        for field, text in itertools.pairwise(node.body):
            match field, text:
                case ast.AnnAssign(name) | ast.Assign([name]), ast.Expr(ast.Constant(str(said))):
                    found[ast.unparse(name)] = in_yaml(said)
    return found


def in_yaml(text: str) -> str:
    """Return a text as one line, with None replaced by null, as recipes write it."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def kind_text(kind: Kind) -> str:
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
    names: dict[Kind, str] = {str: "text", int: "integer", float: "number", bool: "true | false"}
    return names.get(kind, "value")


def default_text(default: Json) -> str:
    """Return a default as a recipe would write it."""
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
    """Yield the lines of an option: name, default, type and bounds, then its meaning and what uses it."""
    line = f"{option.name} = {default_text(option.default)}   ({type_text(option)})"
    yield from textwrap.wrap(line, WIDTH, subsequent_indent=INDENT, break_on_hyphens=False)
    yield from indented(meaning_text(option))


def type_text(option: Option) -> str:
    """Return an option's type and bounds in words."""
    return kind_text(option.kind) + (f", {option.bound.words}" if option.bound else "")


def meaning_text(option: Option) -> str:
    """Return an option's meaning and what uses it."""
    used = " and ".join(rule.condition(option.name) for rule in option.only_with)
    meaning = field_texts(option.section).get(option.name.rpartition(".")[2], "")
    return f"{meaning} Used only with {used}." if used else meaning


def treatment_lines(option: Option) -> Iterator[str]:
    """Yield the lines on how a resume and a submitted run treat an option."""
    yield from indented(f"On resume: {option.resume.value}.")
    if option.submit:
        yield from indented(f"On submit: {option.submit.value}.")


def indented(text: str) -> list[str]:
    """Return the lines of a text below an option."""
    return textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)
