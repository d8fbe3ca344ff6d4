"""Reward functions that are given as Python objects. Each one becomes a reward file, so workers, checks, resume, spread
reward nodes and submitted jobs treat it like any other reward.

The file has the function by value, pickled by cloudpickle together with everything that it uses from modules that are
not installed. Its first line has the SHA-256 of the sources and of the values that the function uses. A pickle also
depends on line numbers and paths, so resuming compares this digest instead of the content. Its second line has the
SHA-256 of the other lines, so that an edited file is refused.
"""

from __future__ import annotations

import ast
import base64
import dis
import functools
import hashlib
import inspect
import linecache
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

import cloudpickle

from grpo.config import RewardConfig
from grpo.rewards.pickling import Cached, RewardFunction, is_installed, is_local, pickled
from grpo.rewards.process import MIN_SECRET, secrets
from grpo.types import Unchecked, UserError

FOLDER = "python_rewards"
"""Folder of the files, in the run folder."""
FIRST_LINE = "# Reward function by value; SHA-256 of its source and of what it uses: "
SECOND_LINE = "# SHA-256 of the other lines: "
METHODS = (FunctionType, staticmethod, classmethod, property, Cached)
PLAIN = (str, bytes, int, float, complex, re.Pattern, type(None), type(...))


def write(function: RewardFunction, index: int, folder: Path) -> dict[str, str]:
    """Write the file of rewards[index] into `folder`. Return its section of a recipe.

    Raises UserError if the source of the function cannot be read, or if the function cannot be pickled.
    """
    name = name_of(function)
    where = f"rewards[{index}]: {name}"
    content = pickled(function, where)
    description = Description(where)
    text = description.of(function)
    if not description.sources:  # it is installed, and the workers import it
        description.sources.append(source_of(inner(function), where))
        text += description.sources[0]
    for variable in secrets(os.environ):
        value = os.environ[variable].encode()
        if len(value) >= MIN_SECRET and value in content:
            raise UserError(
                f"{where} uses the value of the environment variable {variable}, which would be saved with it; read "
                f"os.environ in the function instead, with rewards[{index}].env: [{variable}]"
            )
    digest = hashlib.sha256(text.encode()).hexdigest()
    source = "\n".join(f"# {line}".rstrip() for text in description.sources for line in text.splitlines())
    lines = textwrap.wrap(base64.b64encode(content).decode(), 100)
    place, number = Path(FOLDER, f"{name}.py"), 1
    while (folder / place).exists():
        number += 1
        place = Path(FOLDER, f"{name}_{number}.py")
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    version = ".".join(map(str, sys.version_info[:2]))
    first = f"{FIRST_LINE}{digest}\n"
    body = (
        f"#\n{source}\n\nimport base64\nimport pickle\nimport sys\n\n"
        f"if '%d.%d' % sys.version_info[:2] != '{version}':\n"
        f"    raise RuntimeError('{name} was saved by Python {version} and cannot be loaded by Python %d.%d; '\n"
        f"                       'use Python {version}, or write a reward file' % sys.version_info[:2])\n"
        f"{name} = pickle.loads(base64.b64decode('''\n" + "\n".join(lines) + "\n'''))\n"
    )
    check = hashlib.sha256((first + body).encode()).hexdigest()
    (folder / place).write_text(f"{first}{SECOND_LINE}{check}\n{body}", encoding="utf-8")
    return {"file": str(place), "name": name, "style": style_of(function)}


def name_of(function: RewardFunction) -> str:
    """Return the name of the reward in metrics and samples: an identifier."""
    name = inner(function).__name__
    return "reward" if name == "<lambda>" else re.sub(r"\W", "_", name)


def inner(function: RewardFunction) -> FunctionType | type:
    """Return the function of a partial or cached one or of a method, and the class of an object that can be called."""
    if isinstance(function, functools.partial):
        return inner(function.func)
    if isinstance(function, MethodType):
        return inner(function.__func__)
    if isinstance(function, Cached):
        return inner(function.__wrapped__)
    return function if isinstance(function, FunctionType | type) else type(function)


def source_of(code: FunctionType | type | CodeType, where: str) -> str:
    """Return the source, for a lambda that of its whole statement. Raises UserError if it cannot be read."""
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError) as error:
        raise UserError(
            f"{where}: its source cannot be read, and a run keeps the source of its rewards; define it in a file or in "
            "a notebook cell"
        ) from error


def lambda_source(code: CodeType) -> str | None:
    """Return the source of a lambda without the rest of its statement; None if the position of the lambda is unknown.

    It is the innermost lambda of the file that has all instructions in its body.
    """
    places = [
        (line, column, end, end_column)
        for line, end, column, end_column in code.co_positions()
        if line is not None and end is not None and column is not None and end_column is not None
        if (line, column) < (end, end_column)
    ]
    text = "".join(inspect.findsource(code)[0])
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Lambda)]
    except SyntaxError:
        return None
    fitting = []
    for node in nodes:
        start = (node.body.lineno, node.body.col_offset)
        end = (node.body.end_lineno or 0, node.body.end_col_offset or 0)
        if places and all(start <= place[:2] and place[2:] <= end for place in places):
            fitting.append((start, node))
    return ast.get_source_segment(text, max(fitting, key=lambda one: one[0])[1]) if fitting else None


def style_of(function: RewardFunction) -> str:
    """Return the style of the function, by the names of its parameters."""
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):  # loading it reports this
        return "grpo"
    return "trl" if "completions" in names else "verl" if "solution_str" in names else "grpo"


def digest_of(file: Path) -> str | None:
    """Return the digest in the file of a function; None for any other file.

    Raises UserError if the file is not as `write` wrote it.
    """
    with file.open("rb") as handle:
        first, second = handle.readline(200), handle.readline(200)
        if not first.startswith(FIRST_LINE.encode()):
            return None
        check = hashlib.sha256(first + handle.read()).hexdigest()
    if second != f"{SECOND_LINE}{check}\n".encode():
        raise UserError(f"{file} has a pickled function and was edited; write a reward file instead")
    return first.decode().removeprefix(FIRST_LINE).strip()


def keep(rewards: Sequence[RewardConfig], files: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Copy the files of functions into `folder`, so that it can be read without the process that made them. Return the
    files, with the copies."""
    kept = []
    for reward, file in zip(rewards, files, strict=True):
        given = Path(reward.file).expanduser()
        if digest_of(file) is None or given.is_absolute() or ".." in given.parts:
            kept.append(file)
            continue
        target = folder / reward.file
        if target.resolve() != file.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(target.name + ".partial")
            shutil.copyfile(file, aside)
            os.replace(aside, target)
        kept.append(target)
    return tuple(kept)


class Description:
    """Text of a function and of what it uses that is the same in every process, for the digest.

    It has the sources of functions, and the values of the globals, closures and defaults that they use.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._seen: dict[FunctionType | type | ModuleType, str] = {}
        """What has been described, and the text that refers to it: functions may refer to each other."""
        self._containers: dict[int, tuple[Unchecked, str]] = {}
        """The same for lists, mappings and attributes by their ids. The values keep the ids from being used again."""
        self.sources: list[str] = []
        """Sources of the functions, that of the reward first."""

    def of(self, value: Unchecked) -> str:
        """Return the text of a value."""
        if isinstance(value, FunctionType | type | ModuleType):
            return self._of_named(value)
        if isinstance(value, list | dict):
            if id(value) in self._containers:
                return self._containers[id(value)][1]
            self._containers[id(value)] = (value, f"@{len(self._containers)}")
        if isinstance(value, dict):
            items = sorted(((self.of(key), item) for key, item in value.items()), key=lambda pair: pair[0])
            return f"{{{', '.join(f'{key}: {self.of(item)}' for key, item in items)}}}"
        if isinstance(value, set | frozenset):
            return f"{{{', '.join(map(self.of, sorted(value, key=self._of_alone)))}}}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self.of, value))}]"
        if isinstance(value, PLAIN):
            return repr(value)
        if (text := self._of_wrapper(value)) is not None:
            return text
        if hasattr(value, "__dict__") and is_local(type(value)):
            return self.of([type(value), vars(value)])
        return f"{type(value).__qualname__} {hashlib.sha256(cloudpickle.dumps(value)).hexdigest()}"

    def _of_alone(self, member: Unchecked) -> str:
        """Return the text of a member of a set as if it was described before the others. By these texts the members are
        in the same order in every process. The set itself has functions in the order of their addresses."""
        if isinstance(member, PLAIN):
            return repr(member)
        alone = Description(self._where)
        alone._seen, alone._containers, alone.sources = {**self._seen}, {**self._containers}, [*self.sources]
        return alone.of(member)

    def _of_wrapper(self, value: Unchecked) -> str | None:
        if isinstance(value, functools.partial):
            return self.of(["partial", value.func, value.args, value.keywords])
        if isinstance(value, MethodType):
            return self.of([value.__func__, value.__self__])
        if isinstance(value, Cached):
            return self.of(["cached", value.__wrapped__, value.cache_parameters()])
        if isinstance(value, staticmethod | classmethod):
            return self.of(value.__func__)
        if isinstance(value, property):
            return self.of([value.fget, value.fset])
        return None

    def _of_named(self, value: FunctionType | type | ModuleType) -> str:
        if is_installed(value) if isinstance(value, ModuleType) else not is_local(value):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        if value in self._seen:
            return self._seen[value]
        self._seen[value] = f"#{len(self._seen)}"
        if isinstance(value, FunctionType):
            return self._of_function(value)
        if isinstance(value, ModuleType):
            return inspect.getsource(value)
        methods = {name: item for name, item in vars(value).items() if isinstance(item, METHODS)}
        values = {name: item for name, item in vars(value).items() if not name.startswith("__") and plain(item)}
        return self.of([value.__qualname__, value.__bases__, methods, values])

    def _of_function(self, function: FunctionType) -> str:
        code = function.__code__
        try:
            source = source_of(code, self._where)
            if code.co_name == "<lambda>":
                own = lambda_source(code)
                self.sources.append(own or source)
                source = own or self._of_code(code)
            else:
                self.sources.append(source)
        except UserError:
            if not self.sources:  # it is the reward itself
                raise
            source = self._of_code(code)  # generated, as methods of dataclasses are
        self._refuse_edited(function)
        used = {name: function.__globals__[name] for name in globals_of(code) if name in function.__globals__}
        closure = [contents(cell) for cell in function.__closure__ or ()]
        return self.of([source, used, closure, function.__defaults__, function.__kwdefaults__])

    def _refuse_edited(self, function: FunctionType) -> None:
        """Raise UserError if the file of the function has changed since it was imported: its source is another's."""
        code, names = function.__code__, function.__globals__
        file = names.get("__file__")
        if type(names.get("__loader__")) is not SourceFileLoader or code.co_filename != file:
            return  # a notebook cell, generated code, or a module that its loader has changed
        try:
            compiled = compile("".join(linecache.getlines(file)), file, "exec", dont_inherit=True)
        except SyntaxError:
            same = False
        else:
            place, text = (code.co_qualname, code.co_firstlineno), self._of_code(code)
            same = any(
                (one.co_qualname, one.co_firstlineno) == place and self._of_code(one) == text
                for one in nested(compiled)
            )
        if not same:
            raise UserError(
                f"{self._where}: {file} was edited after {function.__qualname__} was imported from it; reload the "
                f"module {names['__name__']}, or restart Python"
            )

    def _of_code(self, code: CodeType) -> str:
        consts = [self._of_code(one) if isinstance(one, CodeType) else self.of(one) for one in code.co_consts]
        return f"{code.co_code.hex()} {code.co_names} {consts}"


def nested(code: CodeType) -> Iterator[CodeType]:
    """Yield all code objects in `code`."""
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield one
            yield from nested(one)


def contents(cell: CellType) -> Unchecked:
    """Return the value of a variable of a closure, or "empty" if none has been assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def plain(value: Unchecked) -> bool:
    """Return whether `value` is data without code."""
    return isinstance(value, (*PLAIN, list, tuple, dict, set, frozenset))


def globals_of(code: CodeType) -> set[str]:
    """Return the names of the globals that the code and the functions in it use."""
    own = {str(op.argval) for op in dis.get_instructions(code) if op.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(globals_of(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
