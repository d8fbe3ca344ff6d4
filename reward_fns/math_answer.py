"""Mathematical equality of a completion's final answer and the row's, by the library math-verify.

What is read: the part behind the last `</think>`, and in it the last `<answer>...</answer>`, where there are such.
There the last closed `\\boxed{...}` (boxes joined by a comma, "and" or "or" are one list); without a box the whole
text when it is bare mathematics, else what math-verify finds at its end ("the final answer is ...", `$...$`, a
number). A box that is not closed is no answer.

How it is compared: both sides are parsed to sympy by math-verify and are right when they are equal as exact numbers,
expressions, sets, tuples, intervals, matrices, (in)equalities or words. Numbers written with decimals agree to six
places, and to four significant digits. `50\\%` is 50 and 1/2; units and currency are dropped.

Nothing here keeps time: the caller does, by killing the process (math-verify's own time limits need SIGALRM). What is
absurdly long, deep or large is a wrong answer at once, see MAX_LENGTH, MAX_DEPTH and MAX_DIGITS.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

MAX_LENGTH = 1000
"""Characters of an answer."""
MAX_DEPTH = 10
"""Brackets of any kind in one another."""
MAX_DIGITS = 10_000
"""Decimal digits that a number in an answer, or a polynomial at 2, may have once it is evaluated."""
MAX_TAIL = 2000
"""Characters at the end of a completion without a box that are searched for an answer."""
MAX_GAP = 60
"""Characters between boxes that are one answer."""

logging.getLogger("math_verify").setLevel(
    logging.ERROR
)  # it warns that its time limits are off, as they are meant to be

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
JOINED = re.compile(r"(?:\\q?quad|\\text\s*\{|(?:[a-z]+\s+)?\b(?:and|or)\b|[^\w.:=?!])*")
COMMAND = re.compile(r"\\(?:begin|end|text\w*|mbox|math\w+|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
WORD = re.compile(r"[^\W\d_]{3}")
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,\\!|\\[,;: ]|[ ~])\d{3})+(?![\d.]*\d)")
GROUPED_IN_BRACES = re.compile(r"(?<=\{)\d{1,3}(?:,\d{3})+(?=\})")
DECIMAL_COMMA = re.compile(r"-?(?:\d+,(?!\d{3}$)\d+|0,\d+)")
VARIABLE = re.compile(r"(?<=[\d}\s])(?!(?:[cdkm]m|[km]g|ml|ft|lb|hr)\b)([a-zA-Z]{1,2})(?=\s*(?:$|\$|\\[\])]))")
BASED = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")


def math_answer(completion: str, row: Mapping[str, Any]) -> float:
    """1.0 if the completion's final answer is mathematically `row["answer"]`, else 0.0 (see the top of this file).

    Raises KeyError without `answer`, ValueError when it is no text or number or cannot be parsed.
    """
    gold_text = content(gold_of(row), whole=True)
    golds = [gold for gold in readings(gold_text) if not too_large(gold)]
    if not golds:
        raise ValueError(f"the gold answer {row['answer']!r} cannot be parsed as mathematics")
    text = content(scope(completion), whole=False)
    if squeezed(text) == squeezed(gold_text):
        return 1.0
    based, gold_based = BASED.fullmatch(text), BASED.fullmatch(gold_text)
    if based and gold_based and based[2] != gold_based[2]:
        return 0.0  # the library drops the base; without one it is taken from the question
    found = [answer for answer in readings(text) if not too_large(answer)]
    return 1.0 if any(same(gold, answer) for gold, answer in itertools.product(golds, found)) else 0.0


def gold_of(row: Mapping[str, Any]) -> str:
    if "answer" not in row:
        raise KeyError(f"the row has no column 'answer', only {sorted(row)}")
    gold = row["answer"]
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise ValueError(f"the gold answer must be a text or a number, not {gold!r}")
    return str(gold)


def scope(completion: str) -> str:
    """The part of a completion that may hold the answer."""
    text = completion.rpartition("</think>")[2]
    before, tag, after = text.rpartition("<answer>")
    return after.partition("</answer>")[0] if tag else before + after


def content(text: str, *, whole: bool) -> str:
    """The answer in `text` as LaTeX without delimiters; behind a NUL, prose that the library must search.

    `whole`: the text is known to be an answer, prose only where it has mathematics between delimiters.
    """
    text = text.replace("\\$", "")
    boxed = last_boxes(text)
    if boxed is not None:
        return content(boxed, whole=True)
    has_words = WORD.search(COMMAND.sub(" ", text[:MAX_LENGTH])) or len(text) > MAX_LENGTH
    if has_words and (not whole or re.search(r"\$|\\[(\[]", text)):
        return "\0" + unified(text[-MAX_TAIL:])
    return unified(re.sub(r"\$|\\[\[\]()]", "", text))


def last_boxes(text: str) -> str | None:
    """What the last box holds, with the boxes that are joined to it; empty if it is not closed; None without a box."""
    found: list[str] = []
    limit = len(text)
    for box in reversed(list(BOX.finditer(text))):
        end = closing(text, box.end(), limit)
        if end is None or (found and not joined(text[end + 1 : limit])):
            break
        inside = text[box.end() + 1 : end].strip()
        if inside not in found:
            found.insert(0, inside)
        limit = box.start()
    return ", ".join(found) if found else None if limit == len(text) and not BOX.search(text) else ""


def joined(between: str) -> bool:
    return len(between) <= MAX_GAP and JOINED.fullmatch(between) is not None


def closing(text: str, start: int, limit: int) -> int | None:
    """Where the brace that opens at `start` closes, before `limit`; escaped braces do not count."""
    depth = 0
    for mark in re.compile(r"\\.|[{}]|$", re.S).finditer(text, start, limit):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.start() if mark[0] == "}" else None
    return None


def unified(text: str) -> str:
    """`text` in the forms that the library reads rightly."""
    text = text.replace("\u2212", "-")
    text = re.sub(r"(?<=[\u3000-\u9fff])(?=\d)", " ", text)  # it wants white space before a number
    text = re.sub(r"(\\q?quad)(?=[a-zA-Z])", r"\1 ", text)
    text = re.sub(r"\\(?:mathrm|text)\s*\{([ei]|[a-zA-Z](?=\}[^{]*\}))\}", r"\1", text)  # it cuts \frac{1}{\mathrm{e}}
    text = GROUPED.sub(lambda number: re.sub(r"\D", "", number[0]), text)  # it reads 1\,000 as 1 times 0
    text = GROUPED_IN_BRACES.sub(lambda number: number[0].replace(",", ""), text)
    text = re.sub(r"\\phantom\s*(?:\{[^{}]*\}|\S)", "", text)
    text = re.sub(r"\\frac\s*(\\[a-zA-Z]+|\d)\s*(\\[a-zA-Z]+|\d)", r"\\frac{\1}{\2}", text)  # \frac\pi 2
    text = re.sub(r"^(?:[\s*]|\\approx)+|[\s.,;:*]+$", "", text)
    if not re.fullmatch(r"-?[\d.,]+ [a-zA-Z]{1,2}", text):
        text = VARIABLE.sub(r"\1\\,", text)  # it takes the t of 4t for a unit; white space behind stops it
    text = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)  # a mixed number, which it reads as 21/2
    return re.sub(r"^(-?\d*\.?\d+)[eE]([+-]?\d+)$", r"\1 \\times 10^{\2}", text)  # it reads e as Euler's number


def squeezed(text: str) -> str:
    """`text` without what does not change its meaning."""
    return re.sub(r"[\s\0]|\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ]", "", text).replace("\\dfrac", "\\frac")


def readings(text: str) -> list[Any]:
    """What `text`, from `content`, can mean, as sympy objects; none if it is absurd or not mathematics."""
    if nested(text) > MAX_DEPTH or re.search(r"binom\D*\d{5}|binom\{\d*\}\{\d{5}", text):
        return []  # the library's parser evaluates binomials
    if text.startswith("\0"):
        return list(parse(text[1:], fallback_mode="no_fallback", parsing_timeout=None))
    if not text or len(text) > MAX_LENGTH:
        return []
    texts = [text]
    if DECIMAL_COMMA.fullmatch(text):
        texts.append(text.replace(",", "."))
    if re.search(r"\d,\d{3}", text):  # one number, or several
        texts.append(text.replace(",", ", "))
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    found = (parse(f"\\boxed{{{each}}}", latex, fallback_mode="no_fallback", parsing_timeout=None) for each in texts)
    return [reading for each in found for reading in each]


def nested(text: str) -> int:
    """How deep brackets lie in one another."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    return max(depths, default=0)


def too_large(answer: Any) -> bool:
    return isinstance(answer, sympy.Basic) and digits(answer) > MAX_DIGITS


def digits(term: sympy.Basic) -> float:
    """A rough upper bound of the decimal digits of `term`, which is not evaluated; symbols count as 2."""
    parts = [digits(part) for part in term.args]
    if any(part > MAX_DIGITS for part in parts):
        return math.inf
    if isinstance(term, sympy.Rational):
        return 0.302 * (int(term.p).bit_length() + int(term.q).bit_length())
    if isinstance(term, sympy.Pow):
        base = term.args[0]
        terms = len(base.args) if isinstance(base, sympy.Add) and base.free_symbols else 1  # it will be multiplied out
        return parts[0] * max(1.0, magnitude(term.args[1])) ** terms
    if isinstance(term, sympy.factorial | sympy.exp):
        return parts[0] * max(1.0, magnitude(term.args[0]))
    if isinstance(term, sympy.Product):
        return parts[0] * max(1.0, magnitude(term.limits[0][-1]))
    return sum(parts) if parts else 0.302


def magnitude(term: sympy.Basic) -> float:
    """The absolute value of a number; 1 for what has symbols in it."""
    if term.free_symbols:
        return 1.0
    try:
        return abs(complex(term.evalf(5)))
    except (TypeError, ValueError, OverflowError):
        return math.inf


def same(gold: Any, answer: Any) -> bool:
    """Whether the two are equal: exactly if both are rational numbers, else as the library finds."""
    while isinstance(gold, sympy.Eq) and not gold.free_symbols:  # 0.56 = 56\\%
        gold = gold.rhs
    places = 6
    if isinstance(gold, sympy.Expr) and not gold.has(sympy.UnevaluatedExpr):  # that is how it writes per cent
        value = gold.doit()
        if (
            isinstance(value, sympy.Rational)
            and isinstance(answer, sympy.Expr)
            and not answer.has(sympy.UnevaluatedExpr)
        ):
            other = answer.doit()
            if isinstance(other, sympy.Rational):
                return bool(value == other)
        if value.is_Number and value.is_finite:
            places = 30 if value == 0 else max(6, 3 - math.floor(math.log10(abs(value))))
    return bool(verify(gold, answer, float_rounding=places, allow_set_relation_comp=True, timeout_seconds=None))
