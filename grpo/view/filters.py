"""The filter language of the viewer: parsed by its own grammar, and never evaluated as code.

    filter     = and ("or" and)*
    and        = not ("and" not)*
    not        = "not" not | "(" filter ")" | comparison
    comparison = column ("<" | "<=" | ">" | ">=" | "==" | "!=") value
               | column "is" ["not"] "null"
               | column ["not"] "contains" text
               | column ["not"] "in" "(" value ("," value)* ")"

A column is a name such as `reward` or `reward_part/judge`; other names are put in backquotes. A value is a number, a
text in quotation marks, true or false. A comparison with a missing value (null) does not hold, whatever the operator;
`not` turns that around.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from grpo.suggest import suggest
from grpo.types import UserError

MAX_LENGTH = 2000
"""Maximum characters of a filter."""
MAX_DEPTH = 50
"""Maximum depth of parentheses and of `not`."""
TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
      | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<quoted>`[^`]+`)
      | (?P<word>[^\W\d][\w./:-]*)
      | (?P<sign><=|>=|==|!=|<|>|=|\(|\)|,)
    )""",
    re.VERBOSE | re.S,
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
KEYWORDS = ("and", "or", "not", "is", "null", "in", "contains", "true", "false")
COMPARE = {"<": "<", "<=": "<=", ">": ">", ">=": ">=", "==": "==", "=": "==", "!=": "!="}
Value = bool | int | float | str


class FilterError(UserError):
    """A mistake in a filter."""

    def __init__(self, sentence: str, position: int | None = None) -> None:
        """`position`: of the character at fault, from 0."""
        super().__init__(f"filter: {sentence}")
        self.position = position


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a filter."""

    kind: str
    """`number`, `text`, `column`, `word` (a keyword), `sign` or `end`."""
    text: str
    at: int
    """Position of its first character, from 1."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter."""

    expression: pc.Expression
    columns: tuple[str, ...]
    """The columns that it reads."""


def parse(text: str, types: Mapping[str, pa.DataType]) -> Filter:
    """Return the filter that `text` describes. `types`: the type of each column.

    Raises FilterError naming the position, and the nearest column for an unknown one.
    """
    if len(text) > MAX_LENGTH:
        raise FilterError(f"it has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    parser = _Parser(tokens_of(text), types)
    expression = parser.disjunction(0)
    parser.expect_end()
    return Filter(expression=expression, columns=tuple(dict.fromkeys(parser.columns)))


def tokens_of(text: str) -> list[Token]:
    """Return the tokens of a filter, with an `end` after the last. Raises FilterError for an unknown character."""
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        found = TOKEN.match(text, position)
        if found is None:
            rest = text[position:].lstrip()
            at = len(text) - len(rest) + 1
            if rest[0] in "\"'`":
                raise FilterError(f"the quotation mark {rest[0]} at character {at} is not closed", at - 1)
            raise FilterError(f"{rest[:20]!r} at character {at} is no column, value or operator", at - 1)
        kind = str(found.lastgroup)
        word, at = found[kind], found.start(kind) + 1
        if kind == "quoted":
            kind, word = "column", word[1:-1]
        elif kind == "text":
            word = re.sub(r"\\(.)", lambda mark: ESCAPES.get(mark[1], mark[1]), word[1:-1], flags=re.S)
        elif kind == "word" and word.lower() not in KEYWORDS:
            kind = "column"
        elif kind == "word":
            word = word.lower()
        tokens.append(Token(kind, word, at))
        position = found.end()
    return [*tokens, Token("end", "", len(text) + 1)]


class _Parser:
    """Recursive descent over the tokens of a filter."""

    def __init__(self, tokens: list[Token], types: Mapping[str, pa.DataType]) -> None:
        self._tokens, self._types, self._at = tokens, types, 0
        self.columns: list[str] = []

    def disjunction(self, depth: int) -> pc.Expression:
        """Parse terms joined by `or`."""
        result = self._conjunction(depth)
        while self._skip("word", "or"):
            result = result | self._conjunction(depth)
        return result

    def expect_end(self) -> None:
        """Raise FilterError if tokens are left."""
        token = self._tokens[self._at]
        if token.kind != "end":
            raise self._wrong(token, 'expected "and", "or" or the end')

    def _conjunction(self, depth: int) -> pc.Expression:
        result = self._negation(depth)
        while self._skip("word", "and"):
            result = result & self._negation(depth)
        return result

    def _negation(self, depth: int) -> pc.Expression:
        if depth > MAX_DEPTH:
            raise FilterError(f"parentheses and `not` may be nested {MAX_DEPTH} deep")
        if self._skip("word", "not"):
            return ~self._negation(depth + 1)
        if self._skip("sign", "("):
            inside = self.disjunction(depth + 1)
            if not self._skip("sign", ")"):
                raise self._wrong(self._tokens[self._at], "expected )")
            return inside
        return self._comparison()

    def _comparison(self) -> pc.Expression:
        token = self._next()
        if token.kind != "column":
            raise self._wrong(token, "expected a column")
        name = token.text
        if name not in self._types:
            raise FilterError(
                f"there is no column {name!r}{suggest(name, [*self._types]) or self._known()}", token.at - 1
            )
        kind = self._types[name]
        self.columns.append(name)
        if self._skip("word", "is"):
            wanted = not self._skip("word", "not")
            if not self._skip("word", "null"):
                raise self._wrong(self._tokens[self._at], "expected null")
            missing = pc.field(name).is_null()
            return missing if wanted else ~missing
        if pa.types.is_list(kind):
            raise FilterError(f"{name} is a list; it can only be tested with `is null`", token.at - 1)
        wanted = not self._skip("word", "not")
        operator = self._next()
        if operator.text == "contains" and operator.kind == "word":
            found = self._contains(name, kind)
        elif operator.text == "in" and operator.kind == "word":
            found = self._member(name, kind)
        elif operator.kind == "sign" and operator.text in COMPARE and wanted:
            found = holds(name, kind, COMPARE[operator.text], self._value(name, kind))
        else:
            raise self._wrong(operator, f"expected <, <=, >, >=, ==, !=, is, in or contains after {name}")
        return found if wanted else ~found

    def _contains(self, name: str, kind: pa.DataType) -> pc.Expression:
        token = self._next()
        if not pa.types.is_string(kind):
            raise FilterError(f"contains is for texts, and {name} is a {type_word(kind)}", token.at - 1)
        if token.kind != "text":
            raise self._wrong(token, "expected a text in quotation marks")
        return present(pc.match_substring(pc.field(name), token.text))

    def _member(self, name: str, kind: pa.DataType) -> pc.Expression:
        if not self._skip("sign", "("):
            raise self._wrong(self._tokens[self._at], "expected ( after in")
        result = holds(name, kind, "==", self._value(name, kind))
        while self._skip("sign", ","):
            result = result | holds(name, kind, "==", self._value(name, kind))
        if not self._skip("sign", ")"):
            raise self._wrong(self._tokens[self._at], "expected , or )")
        return result

    def _value(self, name: str, kind: pa.DataType) -> Value:
        """Parse a value for comparison with a column. Raises FilterError if it has another type."""
        token = self._next()
        value: Value
        if token.kind == "text":
            value = token.text
        elif token.kind == "number":
            whole = re.fullmatch(r"[-+]?\d+", token.text)
            value = int(token.text) if whole and abs(int(token.text)) < 2**63 else float(token.text)
        elif token.kind == "word" and token.text in ("true", "false"):
            value = token.text == "true"
        elif token.text == "null" and token.kind == "word":
            raise FilterError(f"write `{name} is null` for a missing value", token.at - 1)
        else:
            near = " (a text is put in quotation marks)" if token.kind == "column" else ""
            raise self._wrong(token, f"expected a value{near}")
        given = "text" if isinstance(value, str) else "truth value" if isinstance(value, bool) else "number"
        if given != type_word(kind):
            raise FilterError(f"{name} is a {type_word(kind)}, and {token.text!r} is a {given}", token.at - 1)
        return value

    def _next(self) -> Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _skip(self, kind: str, text: str) -> bool:
        token = self._tokens[self._at]
        if token.kind != kind or token.text != text:
            return False
        self._next()
        return True

    def _known(self) -> str:
        return f"; columns: {', '.join(sorted(self._types))}"[:400]

    @staticmethod
    def _wrong(token: Token, expected: str) -> FilterError:
        if token.kind == "end":
            return FilterError(f"{expected}, and the filter ends", token.at - 1)
        return FilterError(f"{expected} at character {token.at}, not {token.text[:40]!r}", token.at - 1)


def type_word(kind: pa.DataType) -> str:
    """Return the type of a column in words."""
    if pa.types.is_boolean(kind):
        return "truth value"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return "list" if pa.types.is_list(kind) else "text"


def holds(name: str, kind: pa.DataType, operator: str, value: Value) -> pc.Expression:
    """Return the expression of one comparison. Whole numbers are compared exactly, others as floating point."""
    column = pc.field(name)
    if type_word(kind) == "number":
        exact = pa.types.is_integer(kind) and isinstance(value, int)
        common = pa.int64() if exact else pa.float64()
        column, other = column.cast(common, safe=False), pa.scalar(value if exact else float(value), common)
    else:
        other = pa.scalar(value, pa.bool_() if isinstance(value, bool) else pa.string())
    compared = {
        "<": column < other, "<=": column <= other, ">": column > other, ">=": column >= other,
        "==": column == other, "!=": column != other,
    }[operator]  # fmt: skip
    return present(compared)


def present(expression: pc.Expression) -> pc.Expression:
    """Return the expression with false for null."""
    return pc.coalesce(expression, pc.scalar(False))
