"""Load reward functions, and check that their parameters fit the style."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from grpo.rewards.child.errors import NOT_GIVEN, SIMILAR, columns_words, described, hinted, user_place

if TYPE_CHECKING:
    from grpo.types import Unchecked

GIVEN_BY_US = ("info", "log_extra", "log_metric")
GIVEN_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of a function of style trl, besides the columns of the rows."""
GIVEN_BY_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
CALLED_AS_GOLD = (
    "answer", "expected", "gold", "gold_answer", "ground_truth", "label", "reference", "solution", "target", "truth",
)  # fmt: skip
"""Names of a second parameter that expects the gold answer."""


class LoadError(Exception):
    """A reward cannot be used. The message is written for the user."""


class Spec(TypedDict):
    """What a worker needs to load a reward, see `grpo.rewards.process.spec_of`."""

    index: int
    """Index in the recipe's `rewards`."""
    file: str
    """Absolute path."""
    shown: str
    """The path as the recipe gives it."""
    source: bytes
    name: str
    style: str
    columns: list[str] | None
    """Columns of the rows; None if unknown."""
    withheld: list[str]
    """Environment variables that the worker does not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A loaded reward function."""

    function: Callable[..., Unchecked]
    names: frozenset[str] | None
    """Names of the arguments that it accepts; None: any."""
    spec: Spec
    defined: str
    """File that has the source of the function; not that of `spec` for a function by value, and for an imported one."""
    unfilled: tuple[str, ...]
    """Parameters that keep their defaults because the style does not provide them."""
    logged: set[str] = field(default_factory=set)
    """Names that it has logged so far."""

    def given(self, arguments: Mapping[str, Unchecked]) -> dict[str, Unchecked]:
        """Return those of `arguments` that the function accepts."""
        return {name: value for name, value in arguments.items() if self.names is None or name in self.names}


def load(spec: Spec) -> Reward:
    """Load the function that `spec` names.

    The spec contains the source, which is read once at the start of the run. So a worker that is started later scores
    with the same function, even if the file has been edited since.

    Raises LoadError.
    """
    where, file, folder = f"rewards[{spec['index']}]: {spec['shown']}", spec["file"], str(Path(spec["file"]).parent)
    if folder not in sys.path:
        sys.path.insert(behind_standard_library(), folder)  # so that it can import files next to it
    module_spec = importlib.util.spec_from_file_location(f"grpo_reward_{spec['index']}", file)
    if module_spec is None:
        raise LoadError(f"{where} is not a Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look the module up by name
    try:
        exec(compile(spec["source"], file, "exec"), module.__dict__)
    except BaseException as error:  # the user's module may raise anything, even SystemExit
        place = user_place(error, file, spec["shown"]) or spec["shown"]
        hint = hinted(error, spec["index"], spec["withheld"])
        raise LoadError(f"rewards[{spec['index']}]: {place}: {described(error)}{hint}") from error
    function = getattr(module, spec["name"], None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        hint = nearest(spec["name"], known) or f"; it has {', '.join(known) or 'none'}"
        raise LoadError(f"{where} has no function {spec['name']}{hint}")
    code = getattr(inspect.unwrap(function), "__code__", None)
    defined = code.co_filename if code else file
    if code:  # a function by value is defined in another file
        shown = spec["shown"] if defined == file else defined
        where = f"rewards[{spec['index']}]: {shown}:{code.co_firstlineno}"
    names, unfilled = checked_names(function, spec, where)
    return Reward(function=function, names=names, spec=spec, defined=defined, unfilled=unfilled)


def behind_standard_library() -> int:
    """Return the index in `sys.path` after the standard library and before the installed packages.

    A `string.py` next to a reward file then shadows no module that others import, and no installed package shadows a
    `utils.py` next to it.
    """
    own = os.path.dirname(os.__file__)
    return max((i + 1 for i, place in enumerate(sys.path) if place in (own, f"{own}/lib-dynload")), default=0)


def checked_names(
    function: Callable[..., Unchecked], spec: Spec, where: str
) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """Try to bind the arguments that the style provides to `function`.

    Return the names that it accepts (None: any), and its parameters that keep their defaults.

    Raises LoadError when it could never be called.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise LoadError(f"{where}: the parameters of {spec['name']} cannot be read: {described(error)}") from error
    parameters = signature.parameters.values()
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional: tuple[str, ...] = ()
    if spec["style"] == "grpo":
        positional, given = ("completion", "row"), list(GIVEN_BY_US)
        for style, name in (("trl", "completions"), ("verl", "solution_str")):
            if name in required:  # it might bind, but its arguments would mean something else
                raise LoadError(f"{where}: {spec['name']}{signature} is written for {style}; set its style: {style}")
        second = next((p.name for p in list(parameters)[1:2] if p.kind == p.POSITIONAL_OR_KEYWORD), "")
        if second in CALLED_AS_GOLD:
            raise LoadError(
                f"{where}: {spec['name']}{signature}: the second argument is the whole row, not the gold answer: call "
                "it row, and use row[COLUMN]"
            )
    elif spec["style"] == "verl":
        given = list(GIVEN_BY_VERL)
    else:
        given = [*GIVEN_BY_TRL, *checked_columns(required, spec, where)]
    try:
        signature.bind(*positional, **{name: None for name in given if takes_all or name in signature.parameters})
    except TypeError as error:
        shape = ", ".join([*positional, *given])
        raise LoadError(
            f"{where}: {spec['name']}{signature} does not fit style {spec['style']}, which gives ({shape}): {error}"
        ) from error
    known = {*given, *list(signature.parameters)[: len(positional)]}
    optional = [p.name for p in parameters if p.default is not p.empty and p.name not in known]
    # style trl: an optional parameter may be a column, so nothing is certain while the columns are unknown
    unfilled = () if spec["style"] == "trl" and spec["columns"] is None else tuple(optional)
    return None if takes_all else frozenset(signature.parameters), unfilled


def checked_columns(required: Sequence[str], spec: Spec, where: str) -> list[str]:
    """Return the columns that a function of style trl receives: those of the rows or, if unknown, those it requires.

    Raises LoadError for a required name that will not be provided.
    """
    columns = spec["columns"]
    known = list(required) if columns is None else list(columns)
    for name in required:
        if name in NOT_GIVEN and (columns is None or name not in columns):
            raise LoadError(f"{where}: {spec['name']} asks for {name}, which is not supplied; give it a default")
        if name not in (*GIVEN_BY_TRL, *known):
            hint = f"{nearest(name, [*known, *GIVEN_BY_TRL])}; they have {columns_words(name, known)}"
            raise LoadError(f"{where}: {spec['name']} asks for {name}, which is not a column of the rows{hint}")
    return [name for name in known if name not in GIVEN_BY_TRL]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `; did you mean ...?`, or "" if nothing is similar."""
    import difflib  # noqa: PLC0415 - only for an error that ends the run

    near = difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR)
    return f"; did you mean {near[0]}?" if near else ""
