"""Mathematical equality of a completion's final answer and the row's, by the library math-verify.

What is read: the part behind the last `</think>`, and in it the last `<answer>...</answer>`, where there are such.
Behind a `<think>` that is not closed there is no answer.
There the last `\\boxed{...}` (boxes side by side, or with "and" between, are one list; one that is not closed is no
answer); without a box the last line if it is bare mathematics, else what math-verify finds near its end.
How it is compared: math-verify parses both sides, and they must be equal as exact numbers, expressions, sets, tuples,
intervals, matrices, relations or words. Decimals agree with what they round to six places; repeating ones are
exact, `0.\\overline{3}` is 1/3. `50\\%` is 50 and 1/2. An equation of numbers that is false is no answer. Colours do
not count, full-width digits and signs do.
Nothing here keeps time, the caller does by killing the process: math-verify's own limits need SIGALRM.
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

# Beyond the first three an answer is wrong without being looked at.
MAX_LENGTH = 1000  # characters
MAX_DEPTH = 10  # brackets of any kind in one another
MAX_DIGITS = 10_000  # decimal digits when it is evaluated, its variables at 2
MAX_TAIL = 2000  # characters at the end of a completion without a box that are searched for an answer
MAX_GAP = 60  # characters between boxes that are one answer

GOLD = True
"""It compares with the row's gold answer, which is tried before a run."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")
BARE_BOX = re.compile(r"(\\boxed|\\fbox)\s*(-?\.?\d[^\s$\\]*)")  # \boxed 7, which some of MATH's solutions have
JOINED = re.compile(r"(?:\\q?quad|\\text\s*\{|(?:[a-z]+\s+)?\b(?:and|or)\b|[^\w.:=?!])*")
HEDGED = re.compile(r"answer(?:\s+is)?\W*?\s*([^\s*]+(?:\s+or\s+\S+)+?)[.*\s]*$", re.I | re.M)
COMMAND = re.compile(r"\\(?:begin|end|text\w*|mbox|math\w+|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
WORD = re.compile(r"[^\W\d_]{3}|\b(?:is|it|so|we)\b", re.I)
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,\\!|\\[,;: ]|[ ~])\d{3})+(?![\d.]*\d)")
GROUPED_IN_BRACES = re.compile(r"(?<=\{)\d{1,3}(?:,\d{3})+(?=\})")
DECIMAL_COMMA = re.compile(r"-?(?:\d+,(?!\d{3}$)\d+|0,\d+)")
VARIABLE = re.compile(r"(?<=[\d}\s])(?!(?:[cdkm]m|[km]g|ml|ft|lb|hr)\b)([a-zA-Z]{1,2})(?=\s*(?:$|\$|\\[\])]))")
BINOMIAL = re.compile(r"binom\D*\d{5}|binom\{\d*\}\{\d{5}")  # of large numbers; the library's parser evaluates it
COLOR = re.compile(r"\\textcolor\s*\{[^{}]*\}\s*\{([^{}]*)\}|\\(?:text)?color\s*\{[^{}]*\}")
FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}  # digits, letters and signs as Chinese and Japanese write them
DOTTED = re.compile(r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")
WRAPPED = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
SPELT = re.compile(r"(?<![^\W\d_])(?=[^\W\d_]*[aeiouAEIOU])[^\W\d_]{4,}")
NAMED = re.compile(  # of mathematics, not of a language
    r"(?:arc|a)(?:sin|cos|tan)|(?:sin|cos)h|infty|infinity|circ|times|alpha|beta|gamma|delta|epsilon|zeta|theta|iota|kappa"
    r"|lambda|omega|upsilon|sigma"
)
MISSING = frozenset(("none", "nan", "null", "n/a", "na", "nil"))
"""What is written for an answer that is not there."""
SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u221e": "\\infty ", "\u00b2": "^{2}", "\u00b3": "^{3}", "\u00bd": "\\frac{1}{2}",
    "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}", "\u2153": "\\frac{1}{3}", "\u2154": "\\frac{2}{3}",
    "\\varnothing": "\\emptyset", "\\lor": "\\text{ or }", "\\vee": "\\text{ or }",
}  # fmt: skip
OR = re.compile(r"\bor\b")
POINTS = tuple(
    sympy.Rational(p, q)
    for p, q in ((3, 7), (-5, 3), (11, 4), (-2, 9), (7, 1), (-13, 5), (1, 6), (29, 10), (-8, 7), (17, 3))
)
TINY = 1e-9
UNCOMPARED = (
    sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit, sympy.Subs, sympy.floor, sympy.ceiling,
    sympy.Mod, sympy.sign, sympy.Piecewise, sympy.Heaviside,
)  # fmt: skip
CAPITALS = re.compile(r"[A-Z]{2,}")
"""Labels in an order: CABD. As variables their product would be that of any other order."""
BASED = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")


def math_answer(completion: str, row: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> float:
    """1.0 if the completion's final answer is mathematically `row["answer"]`, else 0.0 (see the top of this file).

    Raises KeyError without `answer`, ValueError when it is no text or number or cannot be parsed.
    """
    if "answer" not in row:
        raise KeyError(f"the row has no column 'answer', only {sorted(row)}")
    if isinstance(row["answer"], bool) or not isinstance(row["answer"], str | int | float):
        raise ValueError(f"the gold answer must be a text or a number, not {row['answer']!r}")
    gold_text = content(str(row["answer"]), whole=True)
    if str(row["answer"]).strip().lower() in MISSING:
        raise ValueError(f"the gold answer is {row['answer']!r}, as where there is none")
    golds, gold_words = regions(gold_text, readings(gold_text)), words(gold_text)
    if not (golds or gold_words) or (golds and ":" not in gold_text and all(map(is_nothing, golds))):
        raise ValueError(f"the gold answer {row['answer']!r} cannot be parsed as mathematics")
    scope = behind_reasoning(completion, info)
    text = content(scope.rpartition("<answer>")[2].partition("</answer>")[0], whole=False)
    if squeezed(text) == squeezed(gold_text):
        return 1.0
    if CAPITALS.fullmatch(plain(gold_text)) and CAPITALS.fullmatch(plain(text)):
        return float(plain(text) == plain(gold_text))
    if is_text(gold_text) and gold_words is not None:
        return float(words(re.sub(r"[\0$]", "", text)) == gold_words)
    if {bracketed(text), bracketed(gold_text)} == {"set", "tuple"}:
        return 0.0  # {1, 2} has no order
    answer_words = words(text)
    if answer_words and gold_words and (spelt(text) or spelt(gold_text) or answer_words == gold_words):
        return float(answer_words == gold_words)
    based, gold_based = BASED.fullmatch(text), BASED.fullmatch(gold_text)
    if based and gold_based and based[2] != gold_based[2]:
        return 0.0  # the library drops the base; without one it is taken from the question
    answers = regions(text, readings(text))
    return 1.0 if any(same(gold, answer) for gold, answer in itertools.product(golds, answers)) else 0.0


def behind_reasoning(completion: str, info: Mapping[str, Any] | None) -> str:
    """The part of `completion` behind its reasoning; empty where that is not finished.

    `info`: the trainer's; a prompt that ends with `<think>` has begun the reasoning.
    """
    begun = info is not None and info["prompt"].rstrip().endswith("<think>") and "</think>" not in completion
    text = completion.rpartition("</think>")[2]
    return "" if begun or "<think>" in text else text


def plain(text: str) -> str:
    """`text` without white space and without what marks it as text."""
    return re.sub(r"\s|\\[,;:! ]", "", WRAPPED.sub(r"\1", text))


def is_text(gold: str) -> bool:
    """Return whether all of it is marked as text, and it holds no digit and is no run of capitals."""
    inside = WRAPPED.fullmatch(gold.strip())
    marked = inside is not None and gold.lstrip().startswith(("\\text", "\\mbox"))
    return marked and not re.search(r"\d", plain(gold)) and not CAPITALS.fullmatch(plain(gold))


def bracketed(text: str) -> str:
    """ "set" for {a, b}, "tuple" for (a, b), else "": brackets around all of it, and a comma."""
    inside = re.sub(r"\\(?:left|right)(?![a-z])|\s", "", text)
    if "," in inside and re.fullmatch(r"\\\{[^{}]*\\\}", inside):
        return "set"
    return "tuple" if re.fullmatch(r"\([^()]*,[^()]*\)", inside) else ""


def content(text: str, *, whole: bool) -> str:
    """The answer in `text` as LaTeX without delimiters; behind a NUL, prose that the library must search.

    `whole`: the text is known to be an answer, prose only where it has mathematics between delimiters, or words and
    digits outside of any.
    """
    text = BARE_BOX.sub(r"\1{\2}", COLOR.sub(r"\1", text.translate(FULL_WIDTH)).replace("\\$", ""))
    boxed = last_boxes(text)
    if boxed is not None:
        return content(boxed, whole=True)
    if whole and (inside := WRAPPED.fullmatch(text.strip())) and re.search(r"\d", inside[1]):
        text = inside[1]
    has_words = WORD.search(COMMAND.sub(" ", text[:MAX_LENGTH])) or len(text) > MAX_LENGTH
    if has_words and not whole:
        return said(text[-MAX_TAIL:])
    if has_words and (
        re.search(r"\$|\\[(\[]", text) or (len(text) <= MAX_LENGTH and re.search(r"\d", text) and spelt(text))
    ):
        return "\0" + unified(text[-MAX_TAIL:])
    if not whole:
        text = last_line(text)
    if len(text) > MAX_LENGTH:
        return text  # which can only be the very text of the row
    return unified(re.sub(r"\$|\\[\[\]()]", "", text))


def said(text: str) -> str:
    """`text` for the library to search; of alternatives, "answer: 3 or 4", which it would take one of, all."""
    hedged = list(HEDGED.finditer(text))
    if hedged and not re.search("answer", text[hedged[-1].end() :], re.I):
        return content(hedged[-1][1], whole=True)
    return "\0" + unified(text)


def last_line(text: str) -> str:
    """The last line of bare mathematics that has any, without what stands before an answer there."""
    lines = [line for line in text.splitlines() if re.sub(r"[\s$`*]|\\[\[\]()]", "", line)]
    if not lines or "\\begin" in text:
        return text
    return re.sub(r"^[\s$`*]*(?:#{2,}|=|A:)(?=.)|`", "", lines[-1])


def spelt(text: str) -> bool:
    """Whether there is a word of a language in it, and not only names of variables and functions."""
    found = (word.lower() for word in SPELT.findall(COMMAND.sub(" ", WRAPPED.sub(r" \1 ", text[:MAX_LENGTH]))))
    return any(not NAMED.fullmatch(word) and not neighbours(word) for word in found)


def neighbours(letters: str) -> bool:
    """Whether they are neighbours in the alphabet, each once, as a product of variables has them: dcba."""
    return len({*letters}) == len(letters) == ord(max(letters)) - ord(min(letters)) + 1


def words(text: str) -> list[str] | None:
    """The words that an answer is, a list of them in the order of the alphabet; None if it is not made of letters."""
    if WRAPPED.search(text) and re.search(r"[^\W\d_]", WRAPPED.sub(" ", text)):
        return None  # an expression with its unit
    inside = re.sub(r"\\[ ,;:!]|[\s~.!?*()'\"]+", " ", WRAPPED.sub(r" \1 ", text)).strip(" ,;")
    parts = sorted(part.strip().casefold() for part in re.split(r"[,;]|\b(?:and|or)\b", inside))
    return parts if all(re.fullmatch(r"[^\W\d_]+(?:[ -]+[^\W\d_]+)*", part) for part in parts) else None


def last_boxes(text: str) -> str | None:
    """What the last box holds, with the boxes that are joined to it; empty if it is not closed; None without a box."""
    boxes = list(BOX.finditer(text))
    found: list[str] = []
    limit = len(text)
    for box in reversed(boxes):
        end = closing(text, box.end(), limit)
        if (
            end is None
            or len(found) > MAX_LENGTH
            or (found and (limit - end > MAX_GAP or not JOINED.fullmatch(text, end + 1, limit)))
        ):
            break
        inside = text[box.end() + 1 : end].strip()
        if inside not in found:
            found.insert(0, inside)
        limit = box.start()
    return ", ".join(found) if boxes else None


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
    for sign, written in SIGNS.items():
        text = text.replace(sign, written)
    text = re.sub(r"\u221a\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=[\u3000-\u9fff])(?=\d)", " ", text)  # it wants white space before a number
    text = re.sub(r"(\\q?quad)(?=[a-zA-Z])", r"\1 ", text)
    text = re.sub(r"\\(?:mathrm|text)\s*\{([ei]|[a-zA-Z](?=\}[^{]*\}))\}", r"\1", text)  # it cuts \frac{1}{\mathrm{e}}
    text = GROUPED.sub(lambda number: re.sub(r"\D", "", number[0]), text)  # it reads 1\,000 as 1 times 0
    text = GROUPED_IN_BRACES.sub(lambda number: number[0].replace(",", ""), text)
    text = re.sub(r"\\phantom\s*(?:\{[^{}]*\}|\S)", "", text)
    text = re.sub(r"\\frac\s*(\\[a-zA-Z]+|\d)\s*(\\[a-zA-Z]+|\d)", r"\\frac{\1}{\2}", text)  # \frac\pi 2
    text = REPEATING.sub(repeating, DOTTED.sub(r"\\overline{\1\2\3}", text))
    text = re.sub(r"^(?:[\s*]|\\approx)+|[\s.,;:*。]+$", "", text)
    if not re.fullmatch(r"-?[\d.,]+ [a-zA-Z]{1,2}", text):
        text = VARIABLE.sub(r"\1\\,", text)  # it takes the t of 4t for a unit; white space behind stops it
    text = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)  # a mixed number, which it reads as 21/2
    return re.sub(r"^(-?\d*\.?\d+)[eE]([+-]?\d+)$", r"\1 \\times 10^{\2}", text)  # it reads e as Euler's number


def repeating(decimal: re.Match[str]) -> str:
    """0.1\\overline{6} as the fraction (16 - 1) / 90."""
    head, digits = decimal[1] + decimal[2], decimal[3] or decimal[4]
    return f"\\frac{{{int(head + digits) - int(head or 0)}}}{{{'9' * len(digits)}{'0' * len(decimal[2])}}}"


def squeezed(text: str) -> str:
    return re.sub(r"[\s\0]|\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ]", "", text).replace("\\dfrac", "\\frac")


def readings(text: str) -> list[Any]:
    """What `text`, from `content`, can mean, as sympy objects; none if it is absurd or not mathematics."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    if max(depths, default=0) > MAX_DEPTH or BINOMIAL.search(text):
        return []
    if text.startswith("\0"):
        found = parse(text[1:], fallback_mode="no_fallback", parsing_timeout=None)
        return [reading for reading in found if digits(reading) <= MAX_DIGITS]
    if not text or len(text) > MAX_LENGTH:
        return []
    texts = [text]
    if DECIMAL_COMMA.fullmatch(text):
        texts.append(text.replace(",", "."))
    if re.search(r"\d,\d{3}", text):  # one number, or several
        texts.append(text.replace(",", ", "))
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    several = (parse(f"\\boxed{{{each}}}", latex, fallback_mode="no_fallback", parsing_timeout=None) for each in texts)
    return [reading for found in several for reading in found if digits(reading) <= MAX_DIGITS]


def regions(text: str, found: list[Any]) -> list[Any]:
    """The readings of `text`, and for inequalities with "or" between them the numbers that solve one of them."""
    solved = [region(reading) for reading in found] if OR.search(text) else []
    return [*found, *(each for each in solved if each is not None)]


def region(term: Any) -> sympy.Set | None:
    parts = term.args if isinstance(term, sympy.FiniteSet) else ()
    kinds = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan, sympy.And)
    if not parts or len(term.free_symbols) != 1 or not all(isinstance(part, kinds) for part in parts):
        return None
    try:
        return sympy.Union(*(part.as_set() for part in parts))
    except (NotImplementedError, TypeError, ValueError):  # what sympy raises for inequalities that it cannot solve
        return None


def digits(term: Any) -> float:
    """A rough upper bound of the decimal digits of `term`, which is not evaluated; symbols count as 2."""
    try:
        parts = [digits(part) for part in term.args] if isinstance(term, sympy.Basic) else []
    except RecursionError:
        return math.inf
    if isinstance(term, sympy.Rational):
        return math.log10(max(abs(term.p), term.q))
    if any(part > MAX_DIGITS for part in parts):
        return math.inf
    if isinstance(term, sympy.Pow):
        base, power = term.args
        size = math.log10(abs(power.p) or 1) - math.log10(power.q) if isinstance(power, sympy.Rational) else parts[1]
        terms = min(len(base.args), 9) if isinstance(base, sympy.Add) and base.free_symbols else 1  # is multiplied out
        return max(parts[0], 0.302) * 10 ** (min(max(size, 0), 5) * terms)
    if isinstance(term, sympy.factorial | sympy.exp | sympy.Product):
        return max(parts[0], 0.302) * 10 ** min(parts[-1], 5)
    return sum(parts) if parts else 0.302


def exact(term: Any) -> Any:
    """The rational number that `term` is, if it is made of such by + * and whole powers, else None."""
    if isinstance(term, sympy.Rational):
        return term
    parts: list[Any] = (
        [exact(part) for part in term.args] if isinstance(term, sympy.Add | sympy.Mul | sympy.Pow) else [None]
    )
    if None in parts:
        return None
    if isinstance(term, sympy.Pow):
        base, power = parts
        return base**power if power.q == 1 and (base != 0 or power >= 0) else None
    return sum(parts) if isinstance(term, sympy.Add) else math.prod(parts)


def is_false(answer: Any) -> bool:
    """Whether it is an equation of two numbers that are not the same, nor one the other rounded: 3 = 4."""
    if not isinstance(answer, sympy.Eq) or answer.free_symbols:
        return False
    sides = [sympy.N(side, 9) for side in answer.args if isinstance(side, sympy.Expr)]
    if not all(isinstance(side, sympy.Float | sympy.Rational) for side in sides) or len(sides) < 2:
        return False
    return bool(abs(sides[0] - sides[1]) > abs(sides[0]) / 100)


def is_nothing(gold: Any) -> bool:
    """Whether it is no value that an answer could be: 1/0, or 3 = 4."""
    return is_false(gold) or bool(getattr(gold, "has", lambda *_: False)(sympy.zoo, sympy.nan))


def same(gold: Any, answer: Any) -> bool:
    """Whether the two are equal: exactly if both are rational numbers, else as the library finds."""
    while isinstance(gold, sympy.Eq) and not gold.free_symbols:  # 0.56 = 56\\%
        gold = gold.rhs
    if is_false(answer):
        return False
    number, other = exact(gold), exact(answer)
    if number is not None and other is not None:
        return bool(number == other)
    if isinstance(gold, sympy.Float):
        number = sympy.Rational(gold)
    places = 6
    if isinstance(number, sympy.Rational):  # the library rounds to places: a small number would be 0
        places = max(6, 4 + int(math.log10(number.q) - math.log10(abs(number.p)))) if number else 30
    equal = verify(gold, answer, float_rounding=places, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(equal) or same_where_real(gold, answer)


def same_where_real(gold: Any, answer: Any) -> bool:
    """Return whether expressions with roots are real for the same numbers and have the same values there: sqrt(1/n)
    and 1/sqrt(n), which as complex functions differ. Compared at POINTS, of which three must give real values. Sums,
    integrals and steps are not compared: the former take seconds, and points do not tell the latter apart."""
    both = [term for term in (gold, answer) if isinstance(term, sympy.Expr) and not term.has(*UNCOMPARED)]
    symbols = sorted(gold.free_symbols, key=str) if len(both) == 2 else []
    if not 1 <= len(symbols) <= 3 or answer.free_symbols != gold.free_symbols or not any(map(has_root, both)):
        return False
    compared = 0
    for k in range(len(POINTS)):
        point = {symbol: POINTS[(k + 3 * i * (k + 1)) % len(POINTS)] for i, symbol in enumerate(symbols)}
        one, other = (real_value(term, point) for term in both)
        if one is None or other is None:
            if one is not other:
                return False
        elif abs(one - other) > TINY * max(abs(one), abs(other)):
            return False
        else:
            compared += 1
    return compared >= 3


def real_value(term: Any, point: Mapping[Any, Any]) -> Any:
    """The value of `term` at a point, a sympy number; None if it is none or not real."""
    try:
        real, imaginary = sympy.N(term.subs(point), 20).as_real_imag()
        is_real = bool(abs(imaginary) <= TINY * abs(real)) if imaginary else True
        return real if real.is_finite and real.is_number and is_real else None
    except (ArithmeticError, TypeError, ValueError, AttributeError):  # what sympy raises for what has no value
        return None


def has_root(term: Any) -> bool:
    return any(isinstance(power.exp, sympy.Rational) and power.exp.q > 1 for power in term.atoms(sympy.Pow))
