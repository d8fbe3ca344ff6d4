"""Reward for mathematics: a completion's final answer must equal the row's, as judged by the library math-verify.

Answer: the part after the last `</think>` is read, and in it the last `<answer>...</answer>` if there is one. After an
unclosed `<think>` there is no answer. The answer is one of these:

- the last `\\boxed{...}`; adjacent boxes, with "and" or `y =` between them, form one list; an unclosed box is no answer
- without a box, the last line if it is bare mathematics
- in other scripts, the last mathematics of the last sentence that contains any
- a number in words, or "no solution"
- else the mathematics that math-verify finds near the end

Comparison: math-verify parses both sides. They must be equal as exact numbers, expressions, sets, tuples, intervals,
matrices, relations or words. Decimals are equal to values that agree after rounding to six places. Repeating decimals
are exact: `0.\\overline{3}` is 1/3. `50\\%` is 50 and 1/2. A false equation of numbers is no answer. An inequality is
the set of its solutions, a column vector the tuple of its entries. Colours and surplus backslashes are ignored. Digits
and signs of other scripts are recognized.

Nothing here has a time limit, because math-verify's own limits need SIGALRM. The caller must kill the process.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

# An answer beyond one of the first three limits is wrong and not evaluated.
MAX_LENGTH = 1000  # characters
MAX_DEPTH = 10  # nesting depth of brackets of any kind
MAX_DIGITS = 10_000  # estimated decimal digits of its value, with variables counted as 2
MAX_TAIL = 2000  # characters at the end of a completion without a box that are searched for an answer
MAX_GAP = 60  # characters between boxes that form one answer

GOLD = True
"""The reward compares with the row's gold answer, which is checked before a run."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")
BARE_BOX = re.compile(r"(\\boxed|\\fbox)\s*(-?\.?\d[^\s$\\]*)")  # \boxed 7, as in some solutions of MATH
AND = "and|y|e|et|und|и|और|و|和|与|及|と|와|과"
EITHER = "or|o|ou|oder|или|या|أو|或者|或|または|또는"
JOINED = re.compile(
    rf"(?:\\q?quad|\\text\s*\{{|(?:[^\W\d_]+\s+)?(?<![a-z])(?:{AND}|{EITHER})(?![a-z])(?:\s+also\b)?"
    r"|\band\s+the\s+(?!answer|result|value|total|sum|final|product|difference|quotient|ratio|solution|remainder)"
    r"[a-z]+\s+is\b"
    r"|[,;]\s*[^\W\d_]+\s*:(?=[\s$]*$)"
    r"|[a-zA-Z](?:_\{?\w\}?)?\s*=(?=[\s$]*$)|\n\s*\d[.)](?=\s*$)|[^\w.:=?!])*"
)
ASSIGNED = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z](?:_\{?\w\}?)?\s*=)[\s$]*$")
"""The text before a box that holds the value of a variable."""
COMMAND = re.compile(r"\\(?:begin|end|text\w*|mbox|math\w+|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
WORD = re.compile(r"[^\W\d_]{3}|\b(?:is|it|so|we)\b", re.I)
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,\\!|\\[,;: ]|[ ~])\d{3})+(?![\d.]*\d)")
GROUPED_IN_BRACES = re.compile(r"(?<=\{)\d{1,3}(?:,\d{3})+(?=\})")
GROUPED_BY_DOTS = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d.,]*\d)")
DECIMAL_COMMA = re.compile(r"-?(?:\d+,(?!\d{3}$)\d+|0,\d+)")
VARIABLE = re.compile(r"(?<=[\d}\s])(?!(?:[cdkm]m|[km]g|ml|ft|lb|hr)\b)([a-zA-Z]{1,2})(?=\s*(?:$|\$|\\[\])]))")
BINOMIAL = re.compile(r"binom\D*\d{5}|binom\{\d*\}\{\d{5}")  # of large numbers, which the library's parser evaluates
COLOR = re.compile(r"\\textcolor\s*\{[^{}]*\}\s*\{([^{}]*)\}|\\(?:text)?color\s*\{[^{}]*\}")
DOUBLED = re.compile(
    r"\\\\(?:[dtc]?frac|sqrt|text|boxed|left|right|times|cdot|pi|begin|infty|[lg]eq?|neq?|circ|pm|cup|cap|in|math\w+"
    r"|[lc]?dots|sin|cos|tan|log|ln|theta|sum|int|binom|overline|emptyset|varnothing|mid)(?![a-zA-Z])|\\\\[%${}]"
)
SINGLE = re.compile(r"(?<!\\)\\(?!\\)[a-zA-Z%${}]")
DOTTED = re.compile(r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")
WRAPPED = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
SPELT = re.compile(r"(?<![^\W\d_])(?=[^\W\d_]*[aeiouAEIOU])[^\W\d_]{4,}")
NAMED = re.compile(  # names of mathematics, not words of a language
    r"(?:arc|a)(?:sin|cos|tan)|(?:sin|cos)h|infty|infinity|circ|times|alpha|beta|gamma|delta|epsilon|zeta|theta|iota|kappa"
    r"|lambda|omega|upsilon|sigma"
)
MISSING = frozenset(("none", "nan", "null", "n/a", "na", "nil"))
"""Placeholders for a missing answer."""
FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | str.maketrans("\u3000、٫٬٪،؛【】「」『』", " ,.,%,;      ")
"""Chinese, Japanese and Arabic signs -> ASCII."""
SIGNS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u221e": "\\infty ", "\u00b2": "^{2}", "\u00b3": "^{3}", "\u00bd": "\\frac{1}{2}",
    "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}", "\u2153": "\\frac{1}{3}", "\u2154": "\\frac{2}{3}",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ",
    "×": "\\times ", "ℝ": "\\mathbb{R}", "°": "^\\circ ", "…": "\\ldots ", "⟨": "(", "⟩": ")",
    "∨": "\\lor ", "∧": "\\land ", "€": "", "£": "", "¥": "", "₹": "", "₩": "", "￥": "", "￡": "",
})  # fmt: skip
WRITTEN = (
    (re.compile(r"\\varnothing(?![a-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:lor|vee)(?![a-z])"), r"\\text{ or }"),
    (re.compile(r"\\(?:land|wedge)(?![a-z])"), r"\\text{ and }"),
    (re.compile(r"\\{4}"), r"\\\\"),
    (re.compile(r"^\\text\s*\{[^{}]*\}\s*=\s*(?=.*\d)"), ""),
    (re.compile(r"\\text\s*\{[^{}]*\s(and|or)\s*\}(?=\s*-?\d)"), r"\\text{ \1 }"),
    (re.compile(r"(?<=[\d}])\s+(?:y|et|und)\s+(?=-?[\d\\])"), r"\\text{ and }"),
    (re.compile(r"(?<=[\d}])\s+(?:o|ou|oder)\s+(?=-?[\d\\])"), r"\\text{ or }"),
    (re.compile(r"\\backslash(?![a-z])"), r"\\setminus "),
    (re.compile(r"(?<!\\)\\(?=\d)"), ""),
    (re.compile(r"(?<=\d)\s*(?:k?m|cm|mm|mi|ft|kg|m?g|m?[lL])/(?:h|hr|s|sec|min|m|cm|kg|L|day)$"), ""),
    (re.compile(r"(?<=\d)\s+(?:km|cm|mm|ft|in)\s*\^\s*\{?[23]\}?$"), ""),
    (re.compile(r"\\langle(?![a-z])"), "("),
    (re.compile(r"\\rangle(?![a-z])"), ")"),
    # between inequalities
    (re.compile(r"(?<=[<>\d}a-z])\s*\\cup(?=[^()\[\]]*(?:[<>]|\\[lg]e))"), r"\\text{ or }"),
    (re.compile(r"(?<=[)\]])\s*\\text\s*\{\s*or\s*\}\s*[a-z]\s*\\in(?![a-z])"), r"\\cup "),
    # intervals as written in France and Germany
    (re.compile(r"(?:(?<=\\in)|(?<=\\c[au]p)|(?<![\w)\]}^]))\](?=[^()\[\]]*,)"), "("),
    (re.compile(r"(,[^()\[\],]*)\[(?=\s*(?:$|\\c[au]p))"), r"\1)"),
    # the set of the numbers that satisfy a condition
    (re.compile(
        r"^\\(?:left)?\\?\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\(?:mid|vert)|\||:|;)"
        r"(.*[<>=].*|.*\\[lgn]e.*)(?:\\right)?\\\}$"), r"\1"),
    (re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=-?\d)"), r"\\text{ or }"),  # 5 to 6 is not 5
    (re.compile(r"(\d)(?:\s|\\[ ,;])*\\Omega$"), r"\1"),
)  # fmt: skip
"""(pattern, replacement that the library can read)"""
DEGREES = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\\left)?\(?\s*\{?)(\d+(?:\.\d+)?)\s*\^\s*\{?\\circ\s*\}?")
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
"""Labels in an order: CABD. Read as variables, their product would be the same in any order."""
BASED = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")
NUMBER = re.compile(r"(-?\d+)|\\[dt]?frac\{(-?\d+)\}\{(\d*[1-9]\d*)\}|(-?\d{0,9}\.\d{1,6})", re.A)
PERCENT = re.compile(
    r"(?:\s|\\[ ,;])*(?:\\?%|\\text\s*\{\s*(?:per ?cent|pct|\\?%)\s*\}|\b(?:per ?cent|pct))[\s.]*$", re.I
)
DOTS = re.compile(r"\\[lc]?dots[bcmio]?|\.\.\.")
TRANSPOSED = r"(\^\s*\{?\s*(?:T|\\top|\\intercal|\\mathsf\s*\{T\})\s*\}?)?"
VECTOR = re.compile(
    r"(?:[^=]*=)?\s*(?:\\left\s*[(\[]\s*)?\\begin\{([pbvB]?matrix|array)\}(?:\{[clr|]*\})?((?:(?!\\begin|\\end).)*)"
    rf"\\end\{{\1\}}(?:\s*\\right\s*[)\]])?\s*{TRANSPOSED}"
)
IN_PROSE = re.compile(r"(?:\$|\\[(\[])((?:(?!\\[)\]])[^$])*?\\begin\{[pb]matrix\}(?:(?!\\[)\]])[^$])*?)(?:\$|\\[)\]])")
TUPLE = re.compile(
    r"(?:[^=]*=)?\s*(?:\\left)?(?:\((?=[^()]*\))|\[(?=[^\[\]]*\]\s*\^))([^()\[\]]*,[^()\[\]]*?)(?:\\right)?[)\]]"
    rf"\s*{TRANSPOSED}\s*"
)

# Patterns of natural languages.
FOREIGN = (
    r"\u0400-\u052f\u0590-\u06ff\u0750-\u077f\u0900-\u0dff\u0e00-\u0e7f\u1100-\u11ff\u3040-\u30ff\u3130-\u318f"
    r"\u3400-\u9fff\uac00-\ud7af"
)
"""Letters that are not used for variables: Cyrillic, Hebrew, Arabic, Indian, Thai, Korean, Japanese, Chinese."""
SEGMENTS = re.compile(rf"[{FOREIGN}]+(?:[\s:,.\-]*[{FOREIGN}]+)*")
SENTENCE_END = re.compile(r"[。！？!?।؟\n]+|\.(?=\s|$)")
STATED = re.compile(r"(?:答案|答え|正解|정답|답)\s*(?:是|为|:|は|은)\s*(?!不)([^\s,]{1,20}?)(?:です|입니다)?$")
NOT_BEFORE = re.compile(r"(?:不是|并非|不等于|不为|\bне|ليس[ت]?|लेकिन)\s*$")
NOT_BEHIND = re.compile(r"\s*(?:では(?:ない|ありません)|じゃない|[이가은는] 아[니닙]|नहीं)")
ANSWER = "answer|respuesta|réponse|reponse|antwort|resposta|risposta|resultado|résultat|ergebnis|result"
HEDGED = re.compile(
    rf"(?:{ANSWER})(?:\s+(?:is|es|est|ist|é|è))?\W*?\s*([^\s*]+(?:\s+(?:or|o|ou|oder)\s+\S+)+?)[.*\s]*$", re.I | re.M
)
DENIED = re.compile(
    rf"(?:{ANSWER})\s+(?:is\s+not|isn't|was\s+not|cannot\s+be|can't\s+be|can\s+not\s+be|(?:is|lies)\s+between|no\s+es"
    r"|n'est\s+pas|ist\s+nicht|não\s+é|non\s+è)\s+(?:.*\b(?:but|sino|mais|sondern|mas|ma|rather|instead|it\s+is|it's)\s+(.+))?",
    re.I,
)
"""A statement of what the answer is not, optionally followed by the answer."""
NO = (
    r"(?:^|\b(?:there (?:is|are|exists?)|has|have|admits) )(?:no|not any)(?: (?:such|real|integer|integral|positive"
    r"|negative|rational|complex|valid|possible|natural|whole|common|and|or))* (?:solutions?|roots?|zeros"
    r"|values?(?: of [a-z])?|integers?|(?:real )?numbers?|pairs?|triples?|triangles?|functions?|(?<=such )[a-z])"
    r"(?: exists?)?(?: (?:to|for|in|of) (?:(?!except|but|other|unless)[^,;\d])*)?$"
)
NONE = (
    r"^none$|^(?:the )?(?:empty|null) set$|(?<!非)(?<!不是)(?:无解|無解|没有(?:实数)?解|空集|无实数?[解根]|无实数解"
    r"|解なし|解[はが]ない|解は存在しない|解を持たない|空集合|해(?:가|는)? ?없(?:다|음|습니다)|공집합"
    r"|(?:нет|не имеет) (?:действительных |вещественных )?(?:решений|корней)|(?:решений|корней) нет|пустое множество"
    r"|(?:no (?:hay|tienen?|existen?)|sin) soluci[oó]n(?:es)?(?: real(?:es)?)?|conjunto vac[ií]o|pas de solutions?"
    r"|aucune solution|ensemble vide|keine (?:reellen? )?lösung(?:en)?|leere menge"
    r"|لا (?:يوجد|توجد)(?: لها)? (?:حل|حلول)"
    r"|لا حل|المجموعة الخالية|(?:कोई )?हल नहीं(?: है)?|(?:sem|nenhuma) solução|não (?:há|tem) solução|conjunto vazio"
    r"|(?:nessuna|non ha) soluzion[ei]|insieme vuoto|vô nghiệm|çözüm yok|boş küme)$"
)
REALS = r"^(?:all|any)(?: the)? (?:real numbers?|reals)$|^(?:(?:全体|一切|任意|所有)实数|全ての実数|모든 실수)$"
MATHEMATICS_BEFORE = re.compile(r"^[^\d=$\\]*$|equation|inequality|system|方程|不等式", re.I)
ONES = {word: i for i, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split())}  # fmt: skip
TENS = {word: 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = {"half": 2, "quarter": 4} | {word: i for i, word in enumerate(
    "third fourth fifth sixth seventh eighth ninth tenth".split(), 3)}  # fmt: skip
NO_UNIT = frozenset("of or and to than more less times from by per not at if is are but a an the point".split())
NUMERALS = {word: i for several in (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez",
    "zéro un deux trois quatre cinq six sept huit neuf dix",
    "null eins zwei drei vier fünf sechs sieben acht neun zehn",
    "zero um dois três quatro cinco seis sete oito nove dez",
    "ноль один два три четыре пять шесть семь восемь девять десять",
) for i, word in enumerate(several.split())}  # fmt: skip
HAN = {han: i for i, han in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
HAN_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
HAN_NUMBER = "[" + "".join((*HAN, *HAN_SCALES)) + "]+|\\d+(?:\\.\\d+)?"
COUNTED = "个|個|只|人|天|元|年|岁|页|本|次|名|颗|条|种|米|千克|小时|分钟"
HAN_SAID = re.compile(rf"(负?)(?:(百|{HAN_NUMBER})分之)?({HAN_NUMBER})(?:点([{''.join(HAN)}]+))?(?:{COUNTED})?")


def math_answer(
    completion: str,
    row: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    log_extra: Callable[[str, Any], None] | None = None,
) -> float:
    """Return 1.0 if the final answer is mathematically equal to `row["answer"]`, else 0.0 (see the module's docstring).

    `log_extra`: given by the trainer; it is passed the answer that is compared, and why it gets 0.

    Raises KeyError without `answer`, ValueError if it is neither text nor number or cannot be parsed.
    """
    gold = gold_answer(row)
    scope = behind_reasoning(completion, info)
    answer = content(scope.rpartition("<answer>")[2].partition("</answer>")[0], whole=False)
    right = equal(gold, answer)
    if log_extra is not None:
        shown = read_as(answer)
        problem = f"it is not {gold[:100]}" if shown else "there is no answer"
        log_extra("extracted", shown or None)
        log_extra("why", None if right else problem if scope else "there is no text after the reasoning")
    return float(right)


def read_as(answer: str) -> str:
    """Return an answer in the form of `content` as text; of prose, the first mathematics that the library reads."""
    if not answer.startswith("\0"):
        return answer.strip()
    found = meanings(answer)
    return str(found[0]) if found and digits(found[0]) < MAX_LENGTH else ""


def math_answer_unclosed(
    completion: str, row: Mapping[str, Any], log_extra: Callable[[str, Any], None] | None = None
) -> float:
    """Grade like `math_answer`, for models that never close `<think>`: without `</think>`, read everything."""
    return math_answer(completion.replace("<think>", ""), row, log_extra=log_extra)


def gold_answer(row: Mapping[str, Any]) -> str:
    """Return the gold answer in the form of `content`. Raises KeyError and ValueError."""
    if "answer" not in row:
        raise KeyError(f"the row has no column 'answer', only {sorted(row)}")
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the gold answer must be a text or a number, not {answer!r}")
    if str(answer).strip().lower() in MISSING:
        raise ValueError(f"the gold answer is {answer!r}, as where there is none")
    gold = content(str(answer), whole=True)
    golds = meanings(gold)
    nothing = golds and ":" not in gold and all(map(is_nothing, golds))
    as_text = listed(gold) or re.search(rf"\w.*[-+*,\s](?:{DOTS.pattern})[-+*,\s].*\w", gold[:MAX_LENGTH])
    if nothing or not (golds or words(gold) or as_text or is_vast(gold)):
        raise ValueError(f"the gold answer {answer!r} cannot be parsed as mathematics")
    return gold


def equal(gold: str, text: str) -> bool:
    """Return whether two answers in the form of `content` are equal."""
    if squeezed(text) == squeezed(gold):
        return True
    if listed(gold) or listed(text):
        return same_lists(gold, text)
    if CAPITALS.fullmatch(plain(gold)) and CAPITALS.fullmatch(plain(text)):
        return plain(text) == plain(gold)
    gold_words = words(gold)
    if is_text(gold) and gold_words is not None:
        return words(re.sub(r"[\0$]", "", text)) == gold_words
    vectors = vector(gold), vector(text)
    if vectors[0] and vectors[1] and "\\begin" in gold + text:
        if {vectors[0][1], vectors[1][1]} == {"column", "row"}:
            return False
        gold, text = vectors[0][0], vectors[1][0]
    brackets = bracketed(gold), bracketed(text)
    if {*brackets} == {"set", "tuple"}:
        return False  # {1, 2} has no order
    if brackets == ("tuple", "tuple") and (by_entry := same_tuples(gold, text)) is not None:
        return by_entry
    answer_words = words(text)
    if answer_words and gold_words and (spelt(text) or spelt(gold) or answer_words == gold_words):
        return answer_words == gold_words
    based, gold_based = BASED.fullmatch(text), BASED.fullmatch(gold)
    if based and gold_based and based[2] != gold_based[2]:
        return False  # the library drops the base; an answer without one has the base of the question
    return any(same(one, other) for one, other in itertools.product(*compared(gold, text)))


def compared(gold: str, answer: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the readings of both sides.

    A per cent sign on both sides is ignored. On one side both readings are kept: 25% is 25 and 1/4.
    """
    without = [PERCENT.sub("", text) for text in (gold, answer)]
    signed = [
        len(bare) < len(text) and "=" not in bare and "\0" not in bare
        for text, bare in zip((gold, answer), without, strict=True)
    ]
    if all(signed):
        return meanings(without[0]), meanings(without[1])
    sides = []
    for text, bare, is_signed in zip((gold, answer), without, signed, strict=True):
        values = meanings(bare) if is_signed else ()
        parts = tuple(value / 100 for value in values if isinstance(value, sympy.Expr))
        sides.append(parts + values if is_signed else meanings(text))
    return sides[0], sides[1]


def behind_reasoning(completion: str, info: Mapping[str, Any] | None) -> str:
    """Return the part of `completion` after its reasoning; empty if the reasoning is unfinished.

    `info`: given by the trainer. If its prompt ends with `<think>`, the completion begins inside the reasoning.
    """
    begun = info is not None and info["prompt"].rstrip().endswith("<think>") and "</think>" not in completion
    text = completion.rpartition("</think>")[2]
    return "" if begun or "<think>" in text else text


def plain(text: str) -> str:
    """Return `text` without white space and without commands like \\text around words."""
    return re.sub(r"\s|\\[,;:! ]", "", WRAPPED.sub(r"\1", text))


def is_text(gold: str) -> bool:
    """Return whether `gold` is entirely marked as text, has no digit and is not a run of capitals."""
    inside = WRAPPED.fullmatch(gold.strip())
    marked = inside is not None and gold.lstrip().startswith(("\\text", "\\mbox"))
    return marked and not re.search(r"\d", plain(gold)) and not CAPITALS.fullmatch(plain(gold))


def bracketed(text: str) -> str:
    """Return "set" for {a, b}, "tuple" for (a, b), else "". The brackets must enclose all of `text`, with a comma."""
    inside = re.sub(r"\\(?:left|right)(?![a-z])|\s", "", text)
    if "," in inside and re.fullmatch(r"\\\{[^{}]*\\\}", inside):
        return "set"
    return "tuple" if re.fullmatch(r"\([^()]*,[^()]*\)", inside) else ""


def content(text: str, *, whole: bool) -> str:
    """Return the answer in `text` as LaTeX without delimiters, or a NUL followed by prose that the library must search.

    `whole`: `text` is known to be an answer. It is prose only if it has mathematics between delimiters, or words and
    digits outside of delimiters.
    """
    text = in_ascii(text)
    if DOUBLED.search(text) and not SINGLE.search(text):
        text = text.replace("\\\\", "\\")  # the data set was escaped twice
    text = BARE_BOX.sub(r"\1{\2}", COLOR.sub(r"\1", text).replace("\\$", ""))
    boxed = last_boxes(text)
    if boxed is not None:
        return content(boxed, whole=True)
    if whole and (inside := WRAPPED.fullmatch(text.strip())) and re.search(r"\d", inside[1]):
        text = inside[1]
    if spoken := said_in_words(text):
        return spoken
    if re.search(rf"[{FOREIGN}]", text[-MAX_TAIL:]):
        stated = in_other_script(text, whole=whole)
        if stated is not None:
            return unified(re.sub(r"\$|\\[\[\]()]", "", stated)) if stated else ""
    has_words = WORD.search(COMMAND.sub(" ", text[:MAX_LENGTH])) or len(text) > MAX_LENGTH
    if has_words and not whole:
        return searched_part(text[-MAX_TAIL:])
    if has_words and (
        re.search(r"\$|\\[(\[]", text) or (len(text) <= MAX_LENGTH and re.search(r"\d", text) and spelt(text))
    ):
        return "\0" + unified(text[-MAX_TAIL:])
    if not whole:
        text = last_line(text)
    if len(text) > MAX_LENGTH:
        return text  # it can only match a row with the identical text
    return unified(re.sub(r"\$|\\[\[\]()]", "", text))


def in_ascii(text: str) -> str:
    """Return `text` with the digits of all scripts, and full-width signs, replaced by ASCII."""
    if text.isascii():
        return text
    return re.sub(r"(?![0-9])\d", lambda digit: str(unicodedata.decimal(digit[0])), text.translate(FULL_WIDTH))


def searched_part(text: str) -> str:
    """Return the part of `text` that the library must search, in the form of `content`.

    Of alternatives ("answer: 3 or 4") all are returned, because the library would choose one. The result is empty if
    the last sentence only says what the answer is not.
    """
    hedged = list(HEDGED.finditer(text))
    if hedged and not re.search(ANSWER, text[hedged[-1].end() :], re.I):
        return content(re.sub(r"\b(?:o|ou|oder)\b", "or", hedged[-1][1]), whole=True)
    matrices = list(IN_PROSE.finditer(text))
    if matrices and not re.search(r"\d", text[matrices[-1].end() :]):
        return unified(matrices[-1][1])
    sentence = last_sentence(text)
    if denied := DENIED.search(sentence):
        return content(denied[1], whole=True) if denied[1] else ""
    _, verb, number = re.sub(
        r"^(.*)\b(is|are|be|equals?|have|has|get|es|son|est|sont|ist|sind|é|=|:) ", r"\1\0\2\0", sentence
    ).rpartition("\0")
    if verb and not re.search(r"\d", sentence) and (value := number_in_words(number)):
        return value
    return "\0" + unified(text)


def last_sentence(text: str) -> str:
    """Return the last sentence of `text` that has a letter or a digit, without emphasis."""
    sentences = (re.sub(r"[*`]", "", part).strip() for part in SENTENCE_END.split(text[-MAX_TAIL:]))
    return next((part for part in reversed([*sentences]) if re.search(r"\w", part)), "")


def in_other_script(text: str, *, whole: bool) -> str | None:
    """Return the last mathematics that `text`, in letters of `FOREIGN`, states.

    Reads the last sentence with a digit or a command, and in it the parts between words. The result is empty if the
    sentence says what the answer is not, and None if there is no mathematics.
    """
    text = re.sub(rf"\\text\w*\s*\{{([{FOREIGN}\s]*)\}}", r"\1", text[-MAX_TAIL:])
    sentences = [text] if whole else [re.sub(r"[*`]", "", part) for part in SENTENCE_END.split(text)]
    sentence = next(
        (part for part in reversed(sentences) if re.search(r"\d|\\[a-zA-Z]", part)),
        text if whole else last_sentence(text),
    )
    if not re.search(rf"[{FOREIGN}]", sentence):
        return sentence if whole and sentence.strip() else None
    sentence = re.sub(
        rf"(?:{HAN_NUMBER}|百)分之(?:{HAN_NUMBER})", lambda part: said_in_han(part[0]) or part[0], sentence
    )
    for words_between, written in ((EITHER, "or"), (AND + "|且|并且", "and")):
        between = rf"(?<=[\d}}$)a-z])\s*(?:{words_between})\s*(?=[-$\\(\d]|[a-z]\s*(?:[=<>]|\\))"
        sentence = re.sub(between, rf" \\text{{ {written} }} ", sentence)
    if not re.search(r"\d|\\[a-zA-Z]", sentence) and (stated := STATED.search(sentence)) and not whole:
        return stated[1]
    if not re.search(r"\d", sentence) and (
        numerals := re.findall(rf"[{''.join((*HAN, *HAN_SCALES))}]{{2,}}", sentence)
    ):
        return said_in_han(numerals[-1])
    found = [(0, 0), *(each.span() for each in SEGMENTS.finditer(sentence)), (len(sentence), len(sentence))]
    for (_, start), (end, _) in reversed([*itertools.pairwise(found)]):
        part = re.sub(r"^[\s,;:=*—]*(?:-\s+|\.(?!\d))?|[\s,.;:=*—]+$", "", sentence[start:end])
        if re.search(r"\d|\\[a-zA-Z]", part):
            if NOT_BEFORE.search(sentence, 0, start) or NOT_BEHIND.match(sentence, end):
                return ""
            return part if part.count("(") == part.count(")") else part.removeprefix("(").removesuffix(")")
    return None


def said_in_words(text: str) -> str:
    """Return a number, the empty set or all real numbers, spelled in words, as LaTeX; empty for any other `text`."""
    if len(text) > MAX_LENGTH or not re.search(r"[^\W\d_]{3}|[^\x00-\x7f]", text):
        return ""
    bare = re.sub(r"\s+", " ", WRAPPED.sub(r"\1", text)).strip("\"'()$ .,:;*。").lower()
    spoken = last_sentence(re.sub(r"\\['`^~\"]\{?([a-zA-Z])\}?", r"\1", bare)).strip("\"'()$ .,:;")
    none = re.search(NO, spoken) or re.search(NONE, spoken)
    if none and MATHEMATICS_BEFORE.search(spoken[: none.start()]):
        return "\\emptyset"
    if re.search(REALS, spoken):
        return "\\mathbb{R}"
    if spoken != bare and not re.search(r"(?:答案|答)(?:是|为|:)", spoken):
        return ""
    return said_in_han(re.sub(r"^.*(?:答案|答)(?:是|为|:)\s*", "", spoken)) or number_in_words(spoken)


def number_in_words(text: str) -> str:
    """Return the English number that `text` begins with, as LaTeX: 105, -7, \\frac{2}{3}; empty if there is none.

    At most two words, for the things that are counted, may follow the number.
    """
    found = re.sub(r"[-\s]+", " ", text.lower()).strip(" .,!$*")
    if not re.fullmatch(r"[^\W\d_]+(?: [a-z]+)*", found):
        return ""
    said = found.split()
    sign = "-" if said[0] in ("minus", "negative") else ""
    said = said[len(sign) :]
    if said[:1] in (["a"], ["an"]) and said[1:2] and said[1] in (*PARTS, *SCALES, "hundred", "dozen"):
        said[0] = "one"
    elif said[:1] == ["half"]:
        said.insert(0, "one")
    elif len(said) == 1 and said[0] in NUMERALS:
        return sign + str(NUMERALS[said[0]])
    value, count = whole_number(said)
    if not count:
        return ""
    rest = said[count:]
    if rest[:3] == ["and", "a", "half"]:
        return f"{sign}\\frac{{{2 * value + 1}}}{{2}}" if len(rest) < 6 else ""
    below = rest and PARTS.get("half" if rest[0] == "halves" else rest[0].removesuffix("s"))
    if below:
        rest = rest[1:]
    if len(rest) > 2 or any(word in NO_UNIT or word in ONES or word in TENS or word in SCALES for word in rest):
        return ""
    return f"{sign}\\frac{{{value}}}{{{below}}}" if below else f"{sign}{value}"


def whole_number(said: list[str]) -> tuple[int, int]:
    """Return the number that the words begin with, and how many of the words belong to it; (0, 0) for none."""
    total = part = count = 0
    while count < len(said):
        word, value = said[count], ONES.get(said[count], TENS.get(said[count]))
        follows = said[count + 1] if count + 1 < len(said) else ""
        if value is not None:
            if part % (100 if value >= 10 else 10) or part % 100 == 10 or (value == 0 and count):
                return 0, 0
            part += value
        elif word == "hundred" and 0 < part < 100:
            part *= 100
        elif word == "dozen" and part:
            part *= 12
        elif word in SCALES and part:
            total, part = total + part * SCALES[word], 0
        elif not (word == "and" and count and (follows in ONES or follows in TENS) and part % 100 == 0):
            break
        count += 1
    return total + part, count


def said_in_han(text: str) -> str:
    """Return the number that `text` spells in Chinese numerals, as LaTeX; empty if it is none."""
    said = HAN_SAID.fullmatch(text.strip(" 。."))
    if said is None or (said[3].isascii() and not said[2]):
        return ""
    top = str(han_number(said[3])) + (f".{''.join(str(HAN[han]) for han in said[4])}" if said[4] else "")
    sign = "-" if said[1] else ""
    if said[2] == "百":
        return f"{sign}{top}\\%"
    return f"{sign}\\frac{{{top}}}{{{han_number(said[2])}}}" if said[2] else sign + top


def han_number(text: str) -> int | str:
    """Return the value of Chinese numerals, 两千三百. ASCII digits are returned unchanged."""
    if text.isascii():
        return text
    if len(text) > 1 and not any(han in HAN_SCALES for han in text):
        return int("".join(str(HAN[han]) for han in text))
    total = section = digit = 0
    for han in text:
        if han in HAN:
            digit = HAN[han]
        elif HAN_SCALES[han] < 10**4:
            section, digit = section + (digit or 1) * HAN_SCALES[han], 0
        else:
            total, section, digit = (total + section + digit or 1) * HAN_SCALES[han], 0, 0
    return total + section + digit


def last_line(text: str) -> str:
    """Return the last line of bare mathematics that is not empty, without a marker before the answer."""
    lines = [line for line in text.splitlines() if re.sub(r"[\s$`*]|\\[\[\]()]", "", line)]
    if not lines or "\\begin" in text:
        return text
    return re.sub(r"^[\s$`*]*(?:#{2,}|=|A:)(?=.)|`", "", lines[-1])


def spelt(text: str) -> bool:
    """Return whether `text` contains a word of a language, other than names of variables and functions."""
    found = (word.lower() for word in SPELT.findall(COMMAND.sub(" ", WRAPPED.sub(r" \1 ", text[:MAX_LENGTH]))))
    return any(not NAMED.fullmatch(word) and not neighbours(word) for word in found)


def neighbours(letters: str) -> bool:
    """Return whether the letters are distinct neighbours in the alphabet, as in a product of variables: dcba."""
    return len({*letters}) == len(letters) == ord(max(letters)) - ord(min(letters)) + 1


def words(text: str) -> list[str] | None:
    """Return the words of an answer, in alphabetical order; None if it does not consist of letters."""
    if WRAPPED.search(text) and re.search(r"[^\W\d_]", WRAPPED.sub(" ", text)):
        return None  # an expression with its unit
    inside = re.sub(r"\\[ ,;:!]|[\s~.!?*()'\"]+", " ", WRAPPED.sub(r" \1 ", text)).strip(" ,;")
    parts = sorted(part.strip().casefold() for part in re.split(r"[,;]|\b(?:and|or)\b", inside))
    return parts if all(re.fullmatch(r"[^\W\d_]+(?:[ -]+[^\W\d_]+)*", part) for part in parts) else None


def last_boxes(text: str) -> str | None:
    """Return the contents of the last box and of the boxes joined to it; empty if it is not closed; None without a box.

    Of several boxes, variables before them are kept: x=\\boxed{2}, y=\\boxed{3}.
    """
    boxes = list(BOX.finditer(text))
    found: list[tuple[str, str]] = []
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
        name = ASSIGNED.search(text, max(0, box.start() - MAX_GAP), box.start())
        if not any(inside == other and not (name and of and name[1] != of) for of, other in found):
            found.insert(0, (name[1] if name else "", inside))
        limit = box.start()
    joined = ", ".join(name + inside if len(found) > 1 else inside for name, inside in found)
    return joined if boxes else None


def closing(text: str, start: int, limit: int) -> int | None:
    """Return the position before `limit` where the brace that opens at `start` closes.

    Escaped braces are ignored, unless no other brace closes it, as with a stray backslash: \\boxed{185\\}.
    """
    for pattern in (r"\\.|[{}]|$", r"\\?[{}]|$"):
        depth = 0
        for mark in re.compile(pattern, re.S).finditer(text, start, limit):
            depth += {"{": 1, "}": -1}.get(mark[0][-1:] if len(pattern) < 11 else mark[0], 0)
            if depth == 0:
                if mark[0]:
                    return mark.start()
                break
    return None


def unified(text: str) -> str:
    """Return `text` with notations that the library misreads rewritten."""
    text = re.sub(r"(?:\\+(?![a-zA-Z{}|()\[\]])[,;:!]?\s*)+$", "", text).translate(SIGNS)
    for pattern, written in WRITTEN:
        text = pattern.sub(written, text)
    text = DEGREES.sub(r"\1\\left(\\frac{\2\\pi}{180}\\right)", text)
    text = re.sub(r"\u221a\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=[\u3000-\u9fff])(?=\d)", " ", text)  # the library needs white space before a number
    text = re.sub(r"(\\q?quad)(?=[a-zA-Z])", r"\1 ", text)
    text = re.sub(r"\\(?:mathrm|text)\s*\{([ei]|[a-zA-Z](?=\}[^{]*\}))\}", r"\1", text)  # it cuts \frac{1}{\mathrm{e}}
    text = GROUPED.sub(lambda number: re.sub(r"\D", "", number[0]), text)  # it reads 1\,000 as 1 times 0
    text = GROUPED_IN_BRACES.sub(lambda number: number[0].replace(",", ""), text)
    text = re.sub(r"\\phantom\s*(?:\{[^{}]*\}|\S)", "", text)
    text = re.sub(r"\\frac\s*(\\[a-zA-Z]+|\d)\s*(\\[a-zA-Z]+|\d)", r"\\frac{\1}{\2}", text)  # \frac\pi 2
    text = GROUPED_BY_DOTS.sub(lambda number: number[1].replace(".", "") + "." + number[2], text)
    text = REPEATING.sub(repeating, DOTTED.sub(r"\\overline{\1\2\3}", text))
    text = re.sub(r"^(?:[\s*]|\\approx)+|[\s.,;:*。]+$", "", text)
    if not re.fullmatch(r"-?[\d.,]+ [a-zA-Z]{1,2}", text):
        text = VARIABLE.sub(r"\1\\,", text)  # it reads the t of 4t as a unit unless white space follows
    text = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)  # a mixed number, which it reads as 21/2
    return re.sub(r"^(-?\d*\.?\d+)[eE]([+-]?\d+)$", r"\1 \\times 10^{\2}", text)  # it reads e as Euler's number


def repeating(decimal: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction: 0.1\\overline{6} as (16 - 1) / 90."""
    head, digits = decimal[1] + decimal[2], decimal[3] or decimal[4]
    return f"\\frac{{{int(head + digits) - int(head or 0)}}}{{{'9' * len(digits)}{'0' * len(decimal[2])}}}"


def squeezed(text: str) -> str:
    """Return `text` in a normalized notation, without white space."""
    squeezed = re.sub(r"[\s\0]|\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ]", "", text).replace("\\dfrac", "\\frac")
    return DOTS.sub("...", squeezed)


def readings(text: str) -> list[Any]:
    """Return the possible meanings of `text` (from `content`) as sympy objects; none if it exceeds the limits or is not
    mathematics."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    if max(depths, default=0) > MAX_DEPTH or BINOMIAL.search(text):
        return []
    if text.startswith("\0"):
        found = parse(text[1:], fallback_mode="no_fallback", parsing_timeout=None)
        return [reading for reading in found if digits(reading) <= MAX_DIGITS]
    if not text or len(text) > MAX_LENGTH:
        return []
    if number := NUMBER.fullmatch(text):  # the library would take a millisecond
        if number[4]:
            return [sympy.Float(number[4])]
        return [sympy.Rational(int(number[1] or number[2]), int(number[3] or 1))]
    texts = [text]
    if DECIMAL_COMMA.fullmatch(text):
        texts.append(text.replace(",", "."))
    if re.search(r"\d,\d{3}", text):  # one number, or several
        texts.append(text.replace(",", ", "))
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    several = (parse(f"\\boxed{{{each}}}", latex, fallback_mode="no_fallback", parsing_timeout=None) for each in texts)
    return [reading for found in several for reading in found if digits(reading) <= MAX_DIGITS]


@functools.lru_cache(maxsize=256)
def meanings(text: str) -> tuple[Any, ...]:
    """Return the readings of `text`, and for sets and for inequalities joined by "or", "and" or a comma also the real
    numbers that they describe. Cached, because the completions of a group share their gold answer."""
    found = readings(text)
    solved = (region(reading, text) for reading in found)
    return (*found, *(each for each in solved if each is not None))


RELATIONS = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan, sympy.Ne)


def region(term: Any, text: str) -> sympy.Set | None:
    """Return the real numbers that `term` describes, if it is a combination of conditions on one variable or an
    operation on sets; None for anything else. A comma means "and" if that leaves any number, else "or"."""
    parts = term.args if isinstance(term, sympy.FiniteSet) else (term,)
    several = isinstance(term, sympy.FiniteSet) and any(
        isinstance(part, (*RELATIONS, sympy.And, sympy.Interval)) for part in parts
    )
    if not several and not isinstance(term, (*RELATIONS, sympy.And, sympy.Intersection, sympy.Complement, sympy.Union)):
        return None
    if len(getattr(term, "free_symbols", ())) > 1 or len(parts) > MAX_DEPTH:
        return None
    if unequal := [part for part in parts if isinstance(part, sympy.Ne)]:  # x \\ne 1, 2
        parts = [sympy.Ne(unequal[0].lhs, part) if getattr(part, "is_number", False) else part for part in parts]
    sets = [solution(part) for part in parts]
    if None in sets:
        return None
    if OR.search(text):
        return sympy.Union(*sets)
    if any(isinstance(part, sympy.Interval) for part in parts):
        return None  # points
    common = sympy.Intersection(*sets)
    return sympy.Union(*sets) if common is sympy.EmptySet and "and" not in text else common


def solution(term: Any) -> sympy.Set | None:
    """Return the real numbers that solve a condition, or are in a set; None if sympy cannot determine them."""
    try:
        if isinstance(term, sympy.Set):
            return term.doit()
        if isinstance(term, sympy.And | sympy.Or):
            sets = [solution(part) for part in term.args]
            operation = sympy.Intersection if isinstance(term, sympy.And) else sympy.Union
            return None if None in sets else operation(*sets)
        left, right = term.args
        if left.is_Symbol and isinstance(right, sympy.Set):  # x \\in (1, 2)
            return right.doit()
        if left.is_number:
            left, right, term = right, left, term.reversed
        if left.is_Symbol and right.is_number:
            ends = {
                sympy.Eq: sympy.FiniteSet(right), sympy.Ne: sympy.Complement(sympy.S.Reals, sympy.FiniteSet(right)),
                sympy.StrictLessThan: sympy.Interval.open(-sympy.oo, right),
                sympy.LessThan: sympy.Interval(-sympy.oo, right),
                sympy.StrictGreaterThan: sympy.Interval.open(right, sympy.oo),
                sympy.GreaterThan: sympy.Interval(right, sympy.oo),
            }  # fmt: skip
            return ends.get(type(term))
        return term.as_set() if isinstance(term, RELATIONS) else None
    except (NotImplementedError, TypeError, ValueError, AttributeError):  # raised by sympy if it cannot solve it
        return None


def is_vast(text: str) -> bool:
    """Return whether `text` is a number with more than MAX_DIGITS digits, whose count of digits is still finite."""
    if text.startswith("\0") or not text or len(text) > MAX_LENGTH or BINOMIAL.search(text):
        return False
    found = parse(
        f"\\boxed{{{text}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return any(MAX_DIGITS < digits(reading) < math.inf for reading in found if not isinstance(reading, str))


def listed(text: str) -> list[str]:
    """Return the entries of a list with dots: 1, 2, \\ldots, n; empty for anything else."""
    if len(text) > MAX_LENGTH or text.startswith("\0") or not DOTS.search(text):
        return []
    inside = re.sub(r"\\(?:left|right)(?![a-z])|\\[{}()\[\]]|[()\[\]]|\s|\\[,;:! ]", "", DOTS.sub("...", text))
    entries = inside.split(",")
    return entries if "..." in entries and len(entries) > 2 else []


def same_lists(gold: str, answer: str) -> bool:
    """Return whether two lists with dots have the same entries in the same order."""
    entries, others = listed(gold), listed(answer)
    if len(entries) != len(others) or {bracketed(gold), bracketed(answer)} == {"set", "tuple"}:
        return False
    pairs = zip(entries, others, strict=True)
    return bool(entries) and all(
        one == other or any(same(a, b) for a, b in itertools.product(meanings(one), meanings(other)))
        for one, other in pairs
    )


def same_tuples(gold: str, answer: str) -> bool | None:
    """Return whether two tuples, or open intervals, have the same entries; None if an entry cannot be read alone."""
    sides = [re.sub(r"\\(?:left|right)(?![a-z])", "", side).strip()[1:-1].split(",") for side in (gold, answer)]
    if len(sides[0]) != len(sides[1]):
        return None
    pairs = [(meanings(one.strip()), meanings(other.strip())) for one, other in zip(*sides, strict=True)]
    if not all(one and other for one, other in pairs):
        return None
    return all(any(same(a, b) for a, b in itertools.product(*pair)) for pair in pairs)


def vector(text: str) -> tuple[str, str] | None:
    """Return a column, a row or a tuple, possibly transposed, as (tuple, its kind); None for anything else."""
    found = VECTOR.fullmatch(text.strip()) if len(text) <= MAX_LENGTH else None
    if found is None:
        inside = TUPLE.fullmatch(text)
        return (f"({inside[1]})", "column" if inside[2] else "tuple") if inside else None
    rows = [row for row in re.split(r"\\\\", found[2]) if row.strip()]
    entries = rows if len(rows) > 1 else rows[0].split("&") if rows else []
    if len(entries) < 2 or (len(rows) > 1 and "&" in found[2]):
        return None
    is_column = (len(rows) > 1) != bool(found[3])
    return f"({','.join(entry.strip() for entry in entries)})", "column" if is_column else "row"


def digits(term: Any) -> float:
    """Return a rough upper bound of the decimal digits of `term`, without evaluating it. Symbols count as 2."""
    try:
        parts = [digits(part) for part in term.args] if isinstance(term, sympy.Basic) else []
    except RecursionError:
        return math.inf
    if isinstance(term, sympy.Rational):
        return math.log10(max(abs(term.p), term.q))
    if isinstance(term, sympy.Add | sympy.Mul):
        return sum(parts)
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
    """Return the value of `term` if it consists of rational numbers, +, * and whole powers, else None."""
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
    """Return whether `answer` is an equation of two numbers that differ by more than rounding: 3 = 4."""
    if isinstance(answer, sympy.And) and not answer.free_symbols:  # a chain
        return any(is_false(part) for part in answer.args)
    if not isinstance(answer, sympy.Eq) or answer.free_symbols:
        return False
    sides = [sympy.N(side, 9) for side in answer.args if isinstance(side, sympy.Expr)]
    if not all(isinstance(side, sympy.Float | sympy.Rational) for side in sides) or len(sides) < 2:
        return False
    return bool(abs(sides[0] - sides[1]) > abs(sides[0]) / 100)


def is_nothing(gold: Any) -> bool:
    """Return whether `gold` cannot be the value of an answer: 1/0, or 3 = 4."""
    return is_false(gold) or bool(getattr(gold, "has", lambda *_: False)(sympy.zoo, sympy.nan))


def same(gold: Any, answer: Any) -> bool:
    """Return whether the two are equal: exactly if both are rational numbers, else as judged by the library."""
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
    if isinstance(number, sympy.Rational):  # the library rounds to `places`, which would make a small number 0
        places = max(6, 4 + int(math.log10(number.q) - math.log10(abs(number.p)))) if number else 30
    equal = verify(gold, answer, float_rounding=places, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(equal) or same_where_real(gold, answer)


def same_where_real(gold: Any, answer: Any) -> bool:
    """Return whether expressions with roots are real for the same numbers and have the same values there.

    For example sqrt(1/n) and 1/sqrt(n), which differ as complex functions. They are compared at POINTS, of which three
    must give real values. Sums and integrals are not compared because they take seconds, step functions because points
    do not distinguish them.
    """
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
    """Return the value of `term` at a point as a sympy number; None if it has no value there or is not real."""
    try:
        real, imaginary = sympy.N(term.subs(point), 20).as_real_imag()
        is_real = bool(abs(imaginary) <= TINY * abs(real)) if imaginary else True
        return real if real.is_finite and real.is_number and is_real else None
    except (ArithmeticError, TypeError, ValueError, AttributeError):  # raised by sympy if there is no value
        return None


def has_root(term: Any) -> bool:
    return any(isinstance(power.exp, sympy.Rational) and power.exp.q > 1 for power in term.atoms(sympy.Pow))
