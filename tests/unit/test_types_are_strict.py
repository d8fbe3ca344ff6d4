"""Signatures say what a function takes and returns: none uses Any."""

from __future__ import annotations

import ast
import re

from conftest import ROOT

PACKAGE = ROOT / "grpo"
UNTYPED = ("sampler/vllm/", "learner/zero/")
"""Rooms on top of libraries without types."""
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if not file.relative_to(PACKAGE).as_posix().startswith(UNTYPED)]


def with_any(source: str) -> list[str]:
    """Return `line name` of each function whose signature uses Any, and of each alias that is made of it."""
    tree = ast.parse(source)
    annotated: list[tuple[int, str, ast.AST | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotated += [(node.lineno, node.name, node.args), (node.lineno, node.name, node.returns)]
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            annotated.append((statement.lineno, ast.unparse(statement.targets[0]), statement.value))
        elif isinstance(statement, ast.AnnAssign) and ast.unparse(statement.annotation).endswith("TypeAlias"):
            annotated.append((statement.lineno, ast.unparse(statement.target), statement.value))
    found = {(line, name) for line, name, node in annotated if node and re.search(r"\bAny\b", ast.unparse(node))}
    return [f"{line} {name}" for line, name in sorted(found)]


def test_no_signature_uses_any() -> None:
    assert len(FILES) > 50
    assert {str(file): found for file in FILES if (found := with_any(file.read_text(encoding="utf-8")))} == {}


def test_every_place_of_a_signature_is_seen() -> None:
    source = """\
Made = dict[str, Any]
Named: TypeAlias = "list[Any]"
table: dict[str, Any] = {}
def first(a: Any, /) -> None: ...
def second(b: list[Any]) -> None: ...
def third(*c: Any) -> None: ...
def fourth(*, d: "Any | None") -> None: ...
def fifth(**e: typing.Any) -> None: ...
async def sixth() -> Any: ...
class Holder:
    field: Any
    def seventh(self) -> Callable[..., Any]:
        def eighth(f: Any) -> None: ...
def fine(text: AnyStr, other: Anything) -> AnyStr:
    local: Any = text
"""
    assert with_any(source) == [
        "1 Made", "2 Named", "4 first", "5 second", "6 third", "7 fourth", "8 fifth", "9 sixth", "12 seventh",
        "13 eighth",
    ]  # fmt: skip
