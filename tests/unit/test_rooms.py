"""The rooms of the package: each is entered through its face, and modules do not import each other in circles.

The layers between rooms are import-linter's (pyproject.toml).
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "grpo"


def module_of(file: Path) -> str:
    """Return the dotted name of a module or package."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file): file for file in PACKAGE.rglob("*.py")}


def room_of(module: str) -> str | None:
    """Return the package directly below grpo that a module is in; None for modules at the top."""
    room = ".".join(module.split(".")[:2])
    return room if room in FILES and FILES[room].name == "__init__.py" else None


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yield (line, package or module, imported name) of each import from grpo, except those for type checkers only."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "grpo":
            for alias in node.names:
                yield node.lineno, node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("grpo."):
                    yield node.lineno, *alias.name.rsplit(".", 1)


def past_a_face(module: str, source: str) -> list[str]:
    """Return the imports of `source` that reach a name of another room which that room's `__all__` does not list."""
    found = []
    for line, parent, name in imports_of(ast.parse(source)):
        room = room_of(f"{parent}.{name}") or room_of(parent)
        if room is None or room == room_of(module) or parent == "grpo":
            continue
        # grpo.sampler.vllm.engine: `vllm` is in the face of grpo.sampler, and `engine` in that of grpo.sampler.vllm
        at = room
        for part in [*parent.removeprefix(room).strip(".").split("."), name]:
            if not part:
                continue
            if part not in getattr(importlib.import_module(at), "__all__", ()):
                found.append(f"{module}:{line}: {parent}.{name}")
                break
            at = f"{at}.{part}"
            if at not in FILES or FILES[at].name != "__init__.py":  # a module of the face: its names are public
                break
    return found


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_imports_past_a_face(module: str) -> None:
    assert past_a_face(module, FILES[module].read_text()) == []


@pytest.mark.parametrize(
    "line",
    ["from grpo.run import trackers", "from grpo.run.trackers import make_trackers", "import grpo.sampler.vllm.worker"],
)
def test_an_import_past_a_face_is_found(line: str) -> None:
    assert past_a_face("grpo.metrics.step", line) != []
    assert past_a_face("grpo.run.folder", line) == ([] if "run" in line else [f"grpo.run.folder:1: {line.split()[1]}"])


def test_every_face_lists_what_there_is() -> None:
    for name, file in FILES.items():
        if file.name == "__init__.py" and name != "grpo":
            package = importlib.import_module(name)
            missing = [
                one
                for one in getattr(package, "__all__", ())
                if not hasattr(package, one) and f"{name}.{one}" not in FILES
            ]
            assert missing == [], name


def test_no_module_is_in_a_circle_of_imports() -> None:
    graph = {
        module: {
            target
            for _, parent, name in imports_of(ast.parse(file.read_text()))
            for target in (f"{parent}.{name}" if f"{parent}.{name}" in FILES else parent,)
            if target in FILES and FILES[target].name != "__init__.py"
        }
        for module, file in FILES.items()
    }
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert graph == {}


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them by their base names, and leaves out the second."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
