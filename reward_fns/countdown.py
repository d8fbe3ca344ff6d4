"""Reward for Countdown: the completion must combine the row's numbers to the target.

Answer: the last `<answer>...</answer>` after the last `</think>`. After an unclosed `<think>` there is no answer. The
answer is an expression of whole numbers, `+ - * /` (or `× ÷`) and parentheses, optionally followed by ` = target`.

Grading: the expression must use each of the row's numbers exactly once, and its exact value must be the target. Python
never evaluates the expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

MAX_LENGTH = 1000
"""Characters of an expression; a longer one is a wrong answer."""
MAX_DEPTH = 50
"""Nesting depth of parentheses and signs."""

SIGNS = {0xFF01 + i: 0x21 + i for i in range(94)} | str.maketrans("\u00d7\u00b7\u00f7\u2212", "**/-")
TOKEN = re.compile(r"\s*(?:(\d{1,20})(?![\d.])|([-+*/()=]))", re.ASCII)


def countdown(
    completion: str,
    row: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    log_extra: Callable[[str, Any], None] | None = None,
) -> float:
    """Return 1.0 if the answer uses each of `row["nums"]` (or `numbers`) and gives `row["target"]`, else 0.0.

    `log_extra`: given by the trainer; it is passed the expression, and why it gets 0.

    Raises KeyError without these columns, ValueError if they are not whole numbers.
    """
    numbers, target = given(row)
    text = behind_reasoning(completion, info)
    _, tag, after = text.rpartition("<answer>")
    expression, end, _ = after.partition("</answer>")
    if not tag or not end:
        expression, problem = "", "there is no <answer>...</answer>" if text else "there is no text after the reasoning"
    else:
        problem = mistake(expression, numbers, target)
    if log_extra is not None:
        log_extra("extracted", expression.strip() or None)
        log_extra("why", problem or None)
    return 0.0 if problem else 1.0


def mistake(expression: str, numbers: list[int], target: int) -> str:
    """Return why an expression is no solution; empty if it is one."""
    if len(expression) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    try:
        tokens = split(expression.translate(SIGNS))
        left, equals, right = partition(tokens)
        if sorted(int(token) for token in left if token.isdigit()) != sorted(numbers):
            return "it does not use each of the numbers once"
        if equals and right != split(str(target)):
            return f"it is set equal to something else than {target}"
        rest = list(reversed(left))
        result = total(rest, 0)
    except (SyntaxError, ZeroDivisionError) as error:
        return "it divides by 0" if isinstance(error, ZeroDivisionError) else f"it is no expression: {error}"
    if rest:
        return "it is no expression: it does not end"
    return "" if result == target else f"its value is {result}, not {target}"


def countdown_unclosed(
    completion: str, row: Mapping[str, Any], log_extra: Callable[[str, Any], None] | None = None
) -> float:
    """Grade like `countdown`, for models that never close `<think>`: without `</think>`, read the whole completion."""
    return countdown(completion.replace("<think>", ""), row, log_extra=log_extra)


def behind_reasoning(completion: str, info: Mapping[str, Any] | None) -> str:
    """Return the part of `completion` after its reasoning; empty if the reasoning is unfinished.

    `info`: given by the trainer. If its prompt ends with `<think>`, the completion begins inside the reasoning.
    """
    begun = info is not None and info["prompt"].rstrip().endswith("<think>") and "</think>" not in completion
    text = completion.rpartition("</think>")[2]
    return "" if begun or "<think>" in text else text


def given(row: Mapping[str, Any]) -> tuple[list[int], int]:
    """Return the row's numbers and target. Raises KeyError and ValueError."""
    name = "nums" if "nums" in row else "numbers"
    for needed in (name, "target"):
        if needed not in row:
            raise KeyError(f"the row has no column {needed!r}, only {sorted(row)}")
    numbers, target = row[name], row["target"]
    if not isinstance(numbers, list | tuple) or not numbers or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name} must be a list of whole numbers, not {numbers!r}")
    if type(target) is not int:
        raise ValueError(f"target must be a whole number, not {target!r}")
    return list(numbers), target


def split(text: str) -> list[str]:
    """Return the tokens of `text`. Raises SyntaxError if it contains anything else."""
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        token = TOKEN.match(text, position)
        if token is None:
            raise SyntaxError("neither number nor operator")
        tokens.append(token[1] or token[2])
        position = token.end()
    return tokens


def partition(tokens: list[str]) -> tuple[list[str], bool, list[str]]:
    """Return the tokens before the first `=`, whether there is one, and the tokens after it."""
    if "=" not in tokens:
        return tokens, False, []
    at = tokens.index("=")
    return tokens[:at], True, tokens[at + 1 :]


# The three functions below pop tokens from the end of `rest`, a reversed list, and raise SyntaxError.


def total(rest: list[str], depth: int) -> Fraction:
    """Evaluate terms joined by + and -."""
    result = product(rest, depth)
    while rest and rest[-1] in "+-":
        sign = 1 if rest.pop() == "+" else -1
        result += sign * product(rest, depth)
    return result


def product(rest: list[str], depth: int) -> Fraction:
    """Evaluate factors joined by * and /."""
    result = factor(rest, depth)
    while rest and rest[-1] in "*/":
        multiplies = rest.pop() == "*"
        other = factor(rest, depth)
        result = result * other if multiplies else result / other
    return result


def factor(rest: list[str], depth: int) -> Fraction:
    """Evaluate a number or an expression in parentheses, optionally preceded by a minus."""
    token = rest.pop() if rest else ""
    if depth > MAX_DEPTH:
        raise SyntaxError("too deep")
    if token == "-":
        return -factor(rest, depth + 1)
    if token == "(":
        result = total(rest, depth + 1)
        if not rest or rest.pop() != ")":
            raise SyntaxError("a parenthesis is not closed")
        return result
    if not token.isdigit():
        raise SyntaxError("a number is missing")
    return Fraction(int(token))
