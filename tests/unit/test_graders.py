"""The answer graders of reward_fns/: verdicts written by hand, public grader cases and the data sets' own answers."""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo.config import RewardConfig
from grpo.rewards.golds import corrupt
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.types import Failed, Scored

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
Grader = Callable[..., float]


def load(name: str, function: str | None = None) -> Grader:
    """A function of reward_fns/NAME.py, by default NAME, loaded from its file as the workers do."""
    spec = importlib.util.spec_from_file_location(f"grader_{name}", ROOT / "reward_fns" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function or name)


math_answer, gsm8k, countdown = load("math_answer"), load("gsm8k"), load("countdown")
multiple_choice, think_answer, arithmetic = load("multiple_choice"), load("format"), load("arithmetic")


def rows_of(name: str) -> list[dict[str, Any]]:
    file = SHARED / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"no {name}.jsonl in ../shared/data beside the repository")
    with file.open() as lines:
        return [json.loads(line) for line in lines]


def boxed(answer: str) -> str:
    return f"The answer is \\boxed{{{answer}}}."


def check(grader: Grader, cases: Sequence[tuple[str, Any, float]]) -> None:
    """Every (completion, gold answer or row, reward)."""
    got = [(c, g, grader(c, g if isinstance(g, Mapping) else {"answer": g})) for c, g, _ in cases]
    assert got == list(cases)


# --- public cases and data ------------------------------------------------------------------------------------------


def test_public_graders_core_cases() -> None:
    cases = [case for case in rows_of("grader_cases") if case["core"]]
    graders = {"answer": math_answer, "response": math_answer, "mcq": multiple_choice}
    wrong = [
        case
        for case in cases
        if graders[case["mode"]](case["prediction"], {"answer": case["gold"]}) != float(case["expected"])
    ]
    assert wrong == []
    assert len(cases) > 150


def misjudged(grader: Grader, rows: Sequence[Mapping[str, Any]], write: Callable[[str], str]) -> list[str]:
    """Gold answers that do not get 1, as the row's solution or as `write` puts them, or that get it when changed."""
    bad = []
    for row in rows:
        answer = str(row["answer"])
        right = [write(answer), *([row["solution"]] if "solution" in row else [])]
        if [grader(text, row) for text in right] != [1.0] * len(right) or grader(write(corrupt(answer)), row) != 0.0:
            bad.append(answer)
    return bad


# The digits of these are all one more, and it is the same number and the same plane.
SAME_WHEN_CORRUPTED = {"\\frac{1}{11}", "x + y - z + 1 = 0"}


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("math500_test", 2),
        ("math_train", 40),
        pytest.param("math500_test", 1, marks=pytest.mark.slow),
        pytest.param("math_train", 1, marks=pytest.mark.slow),
    ],
)
def test_gold_answers_of_math(name: str, every: int) -> None:
    rows = rows_of(name)[::every]
    bad = set(misjudged(math_answer, rows, boxed)) - SAME_WHEN_CORRUPTED
    assert len(bad) <= 0.005 * len(rows), bad


@pytest.mark.parametrize("write", [boxed, "It makes {} in all.".format, "#### {}".format])
def test_gold_answers_of_gsm8k(write: Callable[[str], str]) -> None:
    assert misjudged(gsm8k, rows_of("gsm8k_train"), write) == []


def test_median_time_of_a_call() -> None:
    rows, seconds = rows_of("math500_test"), []
    for row in rows[::5]:
        start = time.process_time()
        math_answer(row["solution"], row)
        seconds.append(time.process_time() - start)
    assert statistics.median(seconds) < 0.05


# --- math_answer ----------------------------------------------------------------------------------------------------

EQUAL = [
    ("2\\frac12", "5/2"), ("2 1/2", "5/2"), ("1\\,000", "1000"), ("1,\\!000", "1000"), ("1 000 000", "1000000"),
    ("100, 200, 300", "100,200,300"), ("12,345,678", "12345678"), ("2,5", "2.5"), ("1e5", "100000"),
    ("1.5\\times10^{-8}", "1.5e-8"), ("5.", "5"), ("0.333333", "1/3"), ("50\\%", "0.5"), ("50\\%", "50"),
    ("\\$5", "5"), ("5\\text{ cm}^2", "5"), ("5 cm", "5"), ("5 m", "5"), ("90", "90^\\circ"), ("2516", "2516_8"),
    ("2516_{8}", "2516_8"), ("x=5", "5"), ("5", "x=5"), ("\\text{(C)}", "C"), ("x<3", "(-\\infty,3)"),
    ("-2\\le x\\le 7", "x\\in[-2,7]"), ("1-\\frac1e", "1 - \\frac{1}{\\mathrm{e}}"), ("2,1", "1,2"),
    ("1 \\text{ or } 2", "1,2"), ("\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt2}"), ("(x-1)(x+1)", "x^2-1"),
    ("1000!", "1000!"), ("x^{2024}", "x^{2024}"), ("$5$", "5"), ("\\(5\\)", "5"), ("y=2x+1", "2x+1"), (".5", "0.5"),
    ("\u22125", "-5"), ("4t", "4 t"), ("\\sin^2t", "\\sin^2 t"), ("a+b+c", "a + b + c"), ("\\pi r^2 h", "\\pi r^2h"),
    ("\\frac{\\pi}{2}", "\\frac\\pi 2"), ("8.24", "\\approx 8.24 \\text{ mph}"), ("56\\%", "0.56 = 56\\%"),
    ("\\dfrac{2469}{20000}", "\\dfrac{2469}{20,\\!000}"), ("1,2", "2,\\quad1"), ("12:00", "12:00"),
    ("0.\\overline{3}", "\\frac13"), ("\\frac13", "0.\\overline{3}"), ("0.\\overline{3}", "0.\\overline{3}"),
    ("0.1\\overline{6}", "1/6"), ("-2.\\overline 3", "-7/3"), ("1.\\overline{27}", "14/11"), (".\\bar{9}", "1"),
    ("0.\\bar3", "1/3"), ("0.\\dot{3}", "1/3"), ("0.\\dot{1}\\dot{6}", "16/99"), ("0.1\\dot6", "1/6"),
    ("0.\\dot{1}4285\\dot{7}", "1/7"), ("12.\\overline{3}\\%", "37/300"), ("0.333333", "0.\\overline{3}"),
    ("\\color{red}5", "5"), ("\\color{red}{5}", "5"), ("\\textcolor{red}{5}", "5"), ("5", "\\textcolor{red}{5}"),
    ("\\textcolor{blue}{\\frac{1}{2}}", "0.5"), ("\uff15", "5"), ("5\u3002", "5"), ("\uff11\uff12\uff0e\uff15", "12.5"),
    ("\uff081\uff0c2\uff09", "(1,2)"), ("\uff0d5", "-5"), ("2+3=5", "5"), ("\\frac{22}{7}=3.14", "3.14"),
    ("\\sqrt{4}=2", "2"), ("50\\%=0.5", "0.5"), ("0=0", "0"),
    ("x", "x\\text{ dollars}"), ("x\\text{ dollar}", "x\\text{ dollars}"),
    ("5", "The answer is 5"), ("5", "Solution: 5"), ("5", "5 (approximately)"), ("5", "\\text{5 apples}"),
    ("The answer is 5", "5"), ("5 apples", "5"), ("\\text{There are 5}", "5"), ("true", "\\text{True}"),
    ("even", "Even"), ("East", "\\text{east}"), ("\\text{Irrational}", "Irrational"), ("\\text{Yes.}", "Yes"),
    ("no", "\\text{No}"), ("\\text{E, H}", "\\text{H, E}"), ("\\text{H and E}", "\\text{E, H}"),
    ("\\text{north-west}", "North-West"), ("abc", "cba"), ("\\alpha\\beta", "\\beta\\alpha"), ("\\text{Pi}", "Pi"),
    ("\u20135", "-5"), ("\u00bd", "0.5"), ("x\u00b2", "x^2"), ("2\u221a3", "2\\sqrt{3}"), ("\u221e", "\\infty"),
]  # fmt: skip
UNEQUAL = [
    ("0", "0.0000001"), ("10^{-20}", "10^{-30}"), ("2^{100}", "2^{100}+1"), ("101_3", "101_2"), ("1\\,000", "0"),
    ("[1,2]", "(1,2)"), ("1-\\frac{1}{\\mathrm{x}}", "1-\\frac{1}{\\mathrm{y}}"), ("1:30", "12:00"), ("", "5"),
    ("\\text{}", "5"), ("0/0", "5"), ("\\infty", "5"), ("x", "5"), ("5 or 6", "6"), ("5,6", "6"), ("-5", "5"),
    ("x>5", "x\\ge5"), ("3.14", "\\pi"), ("\\text{west}", "\\text{east}"), ("(1,2,3)", "(1,3,2)"), ("0.33", "1/3"),
    ("x+1", "y+1"), ("\\pm 3", "3"), ("3", "\\pm 3"), ("1,2", "1,2,3"), ("5=6=7", "6"), ("1,234", "1.234"), ("4", "4t"),
    ("4t", "4"), ("3", "3ab"), ("\\sin^2", "\\sin^2 t"), ("a+b", "a + b + c"), ("1=2", "0.56 = 56\\%"),
    ("3=4", "4"), ("3=4", "3"), ("1=0", "0"), ("0=1", "1"), ("\\sqrt{2}=2", "2"), ("0.\\overline{3}", "0.3"),
    ("0.\\overline{3}", "0.333"), ("0.3", "0.\\overline{3}"), ("0.\\overline{3}", "3"),
    ("0.\\overline{36}", "0.3\\overline{6}"), ("\\color{red}6", "5"), ("\uff16", "5"),
    ("6", "The answer is 5"), ("silent", "listen"), ("\\text{Tom}", "\\text{Mot}"), ("neon", "\\text{None}"),
    ("\\text{E}", "\\text{H, E}"), ("\\text{Monday}", "\\text{Tuesday}"), ("\\text{Yes}", "\\text{No}"),
]  # fmt: skip


def test_equal_and_unequal_answers() -> None:
    check(math_answer, [(boxed(a), b, 1.0) for a, b in EQUAL])
    check(math_answer, [(boxed(a), b, 0.0) for a, b in UNEQUAL])


@pytest.mark.parametrize("gold", ["\\frac{1}{2}", "(3,\\frac{\\pi}{2})", "[0,1)", "3\\sqrt{13}", "x^2+1", "\\{1,2\\}"])
def test_writing_does_not_matter(gold: str) -> None:
    written = [
        gold.replace("\\frac", "\\dfrac"),
        gold.replace("(", "\\left(").replace(")", "\\right)").replace("[", "\\left["),
        gold.replace("+", " + ").replace(",", " , \\ "),
        f" {gold}\n",
        f"\\displaystyle {gold}",
        f"${gold}$.",
    ]
    check(math_answer, [(boxed(text), gold, 1.0) for text in written])


def test_where_the_answer_is_read() -> None:
    check(
        math_answer,
        [
            ("\\boxed{5}. Wait, no, it is \\boxed{6}", "6", 1.0), ("\\boxed{5} or \\boxed{6}", "6", 0.0),
            ("\\boxed{5}\\boxed{6}", "6", 0.0), ("\\boxed{2} and \\boxed{1}", "1,2", 1.0),
            ("\\boxed{5}\n\n\\boxed{5}", "5", 1.0), ("\\boxed{5", "5", 0.0), ("\\boxed{5}, no \\boxed{6", "5", 0.0),
            ("<think>\\boxed{4}</think> so \\boxed{5}", "5", 1.0), ("\\boxed{5}</think> no idea", "5", 0.0),
            ("</think><answer> 5 </answer>", "5", 1.0), ("<answer>It is $5$.</answer>", "5", 1.0),
            ("Final answer: 5", "5", 1.0), ("It is 5", "5", 1.0),
            ("the final answer is $\\frac12$. I hope it is correct.", "0.5", 1.0),
            ("So we get $4t$.", "4", 0.0), ("So we get $4t$.", "4t", 1.0), ("x^2+2x+1", "2", 0.0),
            ("\\boxed{\\boxed{5}}", "5", 1.0), ("\\fbox{5}", "5", 1.0),
            ("so $\\boxed 17.$ Done", "17", 1.0), ("\\boxed7", "$\\boxed 7$", 1.0),
            ("use \\boxed here: \\boxed 3\\)", "5", 0.0), ("\\boxed{\\varnothing}", "\\emptyset", 1.0),
            ("**5**", "5", 1.0), ("5", 5, 1.0), ("\u7b54\u6848\u662f\uff15\u3002", "5", 1.0),
            ("It is \\textcolor{red}{5}.", "5", 1.0), ("\\color{red}\\boxed{5}", "5", 1.0),
            ("\\boxed{\\left\\{1,2\\right\\}}", "\\{1,2\\}", 1.0), ("\\boxed{}. 5", "5", 0.0), ("", "5", 0.0),
            ("I do not know.", "5", 0.0), ("no answer", "5", 0.0),
            ("#### 8", "8", 1.0), ("5 + 3 = 8\n\n#### 8", "8", 1.0), ("$5+3=8$\n\n$8$", "8", 1.0), ("8\n\n8", "8", 1.0),
            ("Answer: 3 or 4", "3", 0.0), ("Answer: 3 or 4", "4", 0.0), ("**Answer:** 3 or 4", "4,3", 1.0),
            ("The answer is $3$ or $4$ or $5$.", "3", 0.0), ("Answer: 3 or 4\nNo. The answer is 3.", "3", 1.0),
            ("= 8", "8", 1.0), ("A: 8", "8", 1.0), ("`8`", "8", 1.0), ("8\n9", "8", 0.0), ("$$\n8\n$$", "8", 1.0),
            ("\\begin{pmatrix}\n1\\\\\n2\n\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1.0),
        ],
    )  # fmt: skip


HOSTILE = [
    "\\boxed{9^{9^{9^9}}}", "\\boxed{100000!}", "\\boxed{((3!)!)!}", "\\boxed{10^{1000000}}", "10**1000000",
    "\\boxed{\\binom{1000000}{500000}}", "\\boxed{(x+y+z)^{1000}}", "\\boxed{e^{e^{e^{e^{79}}}}}",
    "\\boxed{\\prod_{k=1}^{10000000} k}", "\\boxed{" + "9" * 5000 + "}", "\\boxed{" + "(" * 1000 + ")" * 1000 + "}",
    "\\boxed{" + "-" * 900 + "1}", "\\boxed{1" + "!" * 900 + "}", "\\boxed{" * 15000, "\\boxed{1}," * 10000,
    "\\boxed{" + "\\{" * 11 + "1" + "\\}" * 11 + "}", "9" * 100000, "$" * 100000, "(1+" * 33000, "1 1 " * 25000,
    "1/" * 50000, "answer is " * 10000, "The answer is " * 7000, "#### " * 20000, "1," * 50000, "<answer>" * 12000,
    "<answer>" + "(" * 99000 + "</answer>", "<think>" * 14000, "<think>" + "a" * 99000, "(A " * 33000, "*" * 100000,
]  # fmt: skip


@pytest.mark.parametrize("grader", [math_answer, gsm8k, countdown, multiple_choice, think_answer])
def test_absurd_completions_are_wrong_at_once(grader: Grader) -> None:
    row = {"answer": "C" if grader is multiple_choice else "5", "nums": [1, 2], "target": 5}
    for text in HOSTILE:
        start = time.process_time()
        assert grader(text, row) == 0.0, text[:60]
        assert time.process_time() - start < 5.0, text[:60]


CUT = [
    "\\boxed{" + "{1}" * 66_000, "\\boxed{" + "{{1}}" * 40_000, "\\boxed{" + "\\frac{1}{2}+" * 16_000,
    "\\boxed{\\text{Sum} = " + "\\frac{1}{2}+" * 16_000, "\\boxed{" * 28_000, "\\boxed{" + "{" * 200_000,
    "\\boxed{" + "7" * 200_000, "\\boxed" + " " * 200_000, "\\boxed{" + " ." * 100_000 + "x}",
    "\\boxed{" + " " * 200_000 + "x}", "\\boxed{" + "}" * 200_000, "\\text{" * 33_000, "\\textcolor{red}{" * 12_000,
    "".join(f"\\boxed{{{i}}}," for i in range(10, 16_000)), "\\frac" + " " * 200_000 + "x", "\\color" + " " * 200_000,
    "\\dot" * 50_000, "0." + "\\overline{3}" * 16_000, ":" * 200_000, "answer is" + " " * 200_000 + "x",
    "answer" + " " * 200_000 + "x", "Answer: option" + " " * 200_000, "answer is " * 20_000 + "x", "#" * 200_000,
    "#### 7" + " " * 200_000 + "x", "####" + " " * 200_000 + "x", "#### " + "9" * 200_000 + "x", "#### 7, " * 25_000,
    "7" + ",111" * 50_000 + "1", "7/" * 100_000, "-" * 200_000, "7 or " * 40_000, "A" + " " * 200_000 + "x",
    "A\n" * 100_000, "(A)" * 66_000, "A. x\n" * 40_000, "A, " * 66_000, "\n" * 200_000 + "x", " " * 200_000 + "x",
    "<answer>" + "(" * 200_000, "<answer>" + "1+" * 100_000 + "</answer>", "<think>" + "</" * 100_000,
    "<think>" + "<" * 200_000, "<think>a</think>" + " " * 200_000 + "x",
]  # fmt: skip
"""Ends of completions that were cut off, and texts on which a pattern could begin anew at every character."""


@pytest.mark.parametrize("grader", [math_answer, gsm8k, countdown, multiple_choice, think_answer, arithmetic])
def test_no_completion_takes_longer_than_its_length(grader: Grader) -> None:
    """200,000 characters take minutes where the time goes with their square, and for ever where it is exponential."""
    row = {"answer": "C" if grader is multiple_choice else "5", "nums": [1, 2], "target": 5}
    for text in CUT:
        start = time.process_time()
        assert grader(text, row) == 0.0, text[:60]
        assert time.process_time() - start < 3.0, text[:60]


@pytest.mark.parametrize(
    ("grader", "answer", "row"),
    [
        (math_answer, "\\boxed{5}", {"answer": "5"}), (math_answer, "The answer is 5.", {"answer": "5"}),
        (gsm8k, "#### 5", {"answer": "5"}), (gsm8k, "so it is 5", {"answer": "5"}),
        (multiple_choice, "The answer is (B).", {"answer": "B"}),
        (countdown, "<answer>2+3</answer>", {"nums": [2, 3], "target": 5}),
    ],
)  # fmt: skip
def test_reasoning_that_is_not_finished_holds_no_answer(grader: Grader, answer: str, row: dict[str, Any]) -> None:
    """Nor does what stands inside of reasoning, where another answer or none is given behind it. A chat template may
    have begun the reasoning in the prompt."""
    begun, plain = {"prompt": "Solve it.<think>\n"}, {"prompt": "Solve it."}
    assert grader(answer, row) == grader(answer, row, plain) == 1.0
    assert grader(f"<think>hm</think> {answer}", row) == grader(f"hm</think> {answer}", row, begun) == 1.0
    assert grader(f"<think>a</think>b<think>c</think>{answer}", row) == 1.0
    for text in (f"<think> {answer}", f"x <think> y </think> <think> {answer}", f"<think> {answer} </think>"):
        assert grader(text, row) == 0.0, text
    assert grader(answer, row, begun) == 0.0
    assert grader(f"{answer} </think> no idea", row, begun) == 0.0


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        ("\\boxed{CABD}", "CABD", 1.0), ("\\boxed{CABD}", "ABCD", 0.0), ("\\boxed{BA}", "AB", 0.0),
        ("\\boxed{\\text{CAB}}", "CAB", 1.0), ("\\boxed{C A B}", "CAB", 1.0), ("\\boxed{\\text{CAB}}", "ABC", 0.0),
        ("\\boxed{CAB}", "\\text{ABC}", 0.0), ("\\boxed{\\text{cba}}", "\\text{abc}", 0.0),
        ("\\boxed{Odd}", "\\text{odd}", 1.0), ("$odd$", "\\text{odd}", 1.0), ("\\boxed{even}", "\\text{odd}", 0.0),
        ("\\boxed{2BA}", "2AB", 1.0), ("\\boxed{cba}", "abc", 1.0),  # products commute
        ("\\boxed{(2,1)}", "\\{1,2\\}", 0.0), ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", 1.0),
        ("\\boxed{\\{1,2\\}}", "(1,2)", 0.0), ("\\boxed{\\left(2,1\\right)}", "\\left\\{1,2\\right\\}", 0.0),
        ("\\boxed{2,1}", "\\{1,2\\}", 1.0), ("\\boxed{(2,1)}", "(1,2)", 0.0),
        ("\\boxed{(1,2)}", "[1,2]", 0.0), ("\\boxed{[1,2)}", "(1,2)", 0.0), ("\\boxed{[1,2]}", "[1,2]", 1.0),
    ],
)  # fmt: skip
def test_orders_of_letters_and_brackets_count(completion: str, gold: str, reward: float) -> None:
    """Labels are no variables, a set has no order, and an interval has its ends or not."""
    assert math_answer(completion, {"answer": gold}) == reward


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        ("\\boxed{\\frac{1}{\\sqrt{n}}}", "\\sqrt{1/n}", 1.0), ("\\boxed{\\sqrt{1/n}}", "\\frac{1}{\\sqrt n}", 1.0),
        ("\\boxed{\\sqrt{a/b}}", "\\frac{\\sqrt a}{\\sqrt b}", 1.0), ("\\boxed{\\sqrt{a/b}}", "\\sqrt{b/a}", 0.0),
        ("\\boxed{\\sqrt{n}}", "\\sqrt{1/n}", 0.0), ("\\boxed{x}", "\\sqrt{x^2}", 0.0),
        ("\\boxed{|x|}", "\\sqrt{x^2}", 1.0), ("\\boxed{\\sqrt{n+1}}", "\\sqrt{n+2}", 0.0),
        ("\\boxed{\\sqrt{m}}", "\\sqrt{n}", 0.0), ("\\boxed{x\\sqrt{x}}", "x^{3/2}", 1.0),
        # numbers that are tiny or huge beside others
        ("\\boxed{\\frac{\\sqrt{n}}{2^{99}}}", "\\frac{\\sqrt{n}}{2^{100}}", 0.0),
        ("\\boxed{2^{2018}\\sqrt{x}}", "2^{2019}\\sqrt{x}", 0.0),
        ("\\boxed{3\\cdot 10^{-12}\\sqrt{x}}", "10^{-12}\\sqrt{x}", 0.0),
        ("\\boxed{\\lfloor\\sqrt{n+0.01}\\rfloor}", "\\lfloor\\sqrt{n}\\rfloor", 0.0),
        # what takes seconds at a point, or has no value there
        ("\\boxed{\\sum_{k=1}^{n}\\sqrt{k}}", "\\frac{n(n+1)}{2}", 0.0),
        ("\\boxed{\\prod_{k=1}^{n}k}", "\\sqrt{n}", 0.0),
        ("\\boxed{\\int \\frac{1}{\\sqrt{x}}dx}", "\\sqrt{x}", 0.0),
    ],
)  # fmt: skip
def test_expressions_with_roots_are_compared_where_they_are_real(completion: str, gold: str, reward: float) -> None:
    assert math_answer(completion, {"answer": gold}) == reward


OUTSIDE = "(-\\infty,1)\\cup(2,\\infty)"


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        (f"\\boxed{{{OUTSIDE}}}", "x<1 \\text{ or } x>2", 1.0), ("\\boxed{x<1\\text{ or }x>2}", OUTSIDE, 1.0),
        ("\\boxed{x > 2 or x < 1}", OUTSIDE, 1.0), ("\\boxed{x<1 \\lor x>2}", OUTSIDE, 1.0),
        ("\\boxed{x \\le 1\\text{ or }x>2}", OUTSIDE, 0.0), ("\\boxed{(2,\\infty)}", "x<1 \\text{ or } x>2", 0.0),
        ("\\boxed{x<1\\text{ or }x>3}", OUTSIDE, 0.0), ("\\boxed{x>2}", "(2,\\infty)", 1.0),
        ("\\boxed{x=1\\text{ or }x=2}", "\\{1,2\\}", 1.0),
        ("\\boxed{x<1} or \\boxed{x>2}", "x<1 \\text{ or } x>2", 1.0),
        ("\\boxed{x<1, x>2}", "x<1 \\text{ or } x>2", 1.0), ("\\boxed{x<1 \\text{ or } x>2}", "x<1, x>2", 1.0),
    ],
)  # fmt: skip
def test_inequalities_with_or_between_are_the_numbers_that_solve_one(completion: str, gold: str, reward: float) -> None:
    assert math_answer(completion, {"answer": gold}) == reward


@pytest.mark.parametrize(
    "gold", ["", "$$", "\\boxed{}", "\\frac{1}{", "((1", "9^{9^{9^9}}", "...", ")(", "A\\cup B", "1/0", "0/0", "3=4"]
)
def test_a_gold_that_cannot_be_parsed_is_an_error(gold: str) -> None:
    with pytest.raises(ValueError, match=r"the gold answer .* cannot be parsed"):
        math_answer(boxed(gold), {"answer": gold})


@pytest.mark.parametrize("gold", ["None", "nan", float("nan"), "NULL", "N/A", " none "])
def test_what_is_written_where_there_is_no_answer_is_no_gold(gold: str | float) -> None:
    with pytest.raises(ValueError, match=r"the gold answer is .*, as where there is none"):
        math_answer(boxed(str(gold)), {"answer": gold})


def test_null_is_no_word() -> None:
    """str(None) would be what a model can write."""
    with pytest.raises(ValueError, match="the gold answer is null"):
        arithmetic("None", {"answer": None})
    assert arithmetic(" 57\n", {"answer": 57}) == 1.0


@pytest.mark.parametrize("grader", [math_answer, gsm8k, multiple_choice])
def test_a_row_without_a_usable_answer_is_an_error(grader: Grader) -> None:
    for answer in (None, True, ["5"], b"5", float("nan") if grader is gsm8k else {}):
        with pytest.raises(ValueError, match="the gold answer"):
            grader("5", {"answer": answer})
    with pytest.raises(KeyError, match="no column 'answer', only \\['gold'\\]"):
        grader("5", {"gold": "5"})


# --- the others -----------------------------------------------------------------------------------------------------


def test_gsm8k() -> None:
    right = {
        "72": ["#### 72", "#### 72.", "####72", "#### **72**", "#### $72", "#### 71\n#### 72", "72", "$72.00",
               "#### Step 4\nso it is \\boxed{72}", "#### 1. Do\nIt is 72.", "\\boxed{\\$72\\text{ in 2 days}}",
               "\\boxed{x=72}", "#### 72 clips", "48 + 24 = 72", "(72)"],
        "1234.5": ["#### 1,234.50", "\\boxed{1{,}234.5}", "\\boxed{1,\\!234.5}"],
        "0.75": ["It is 3/4", "\\boxed{\\frac{3}{4}}", ".75", "#### 3/4"],
        "-5": ["is -5", "is \u22125", "-$5", "$-5"],
        "5": ["10-5=5", "10 - 5", "- 5 apples", "5%", "a 10/2=5\n#### 5", "#### 10-5=5", "\uff15", "5\u3002",
              "#### 5 (5 apples)", "#### 5 or 6\n#### 5", "#### 1. Do 3 things\nIt is 5.", "#### 2) Add 3\n#### 5",
              "\\boxed{{{5}}}"],
    }  # fmt: skip
    wrong = {
        "72": ["#### 72\n#### 73", "\\boxed{72", "\\boxed{72}, \\boxed{73}", "72 #### 71", "nothing", "", "720", "7.2"],
        "2": ["\\boxed{10^2}"],
        "1/3": ["0.333"],
        "1": ["1/0"],
        "0": ["1/0", "0/0", "#### 1/0", "\\boxed{\\frac{1}{0}}", "1/\uff10"],
        "6": [
            "#### 5 or 6",
            "#### 5-6",
            "#### 5, 6",
            "#### 5 to 6",
            "#### 5/1/6",
            "#### 6\n#### 5 or 6",
            "#### 5 or 6\nIt is 6.",
            "#### 5 or 6\n\\boxed{6}",
        ],
        "5": ["#### 5 or 6", "#### 5-6", "#### 5.5.5", "\\boxed{" + "{1}" * 24, "\\boxed{5 or 6}"],
        "7": ["7e3", "#### 7e3", "\\boxed{7e3}", "7E3 in all", "7e1000", "0.7e999999999"],
    }
    right |= {"7000": ["7e3", "#### 7E+3", "\\boxed{70e2}", "7,000e0", "0.7e4", "700000e-2"]}
    check(gsm8k, [(text, gold, 1.0) for gold, texts in right.items() for text in texts])
    check(gsm8k, [(text, gold, 0.0) for gold, texts in wrong.items() for text in texts])
    check(gsm8k, [("72", "48/2 = <<48/2=24>>24\n#### 72", 1.0), ("72.0", 72, 1.0), ("1/2", 0.5, 1.0)])
    for gold in ("", "abc", "72 clips", "1/0"):
        with pytest.raises(ValueError, match="is no number"):
            gsm8k("72", {"answer": gold})


def test_countdown() -> None:
    row = {"nums": [1, 2, 3, 4], "target": 24}
    right = ["1*2*3*4", "(1+2+3)*4", " (1+2+3)*4 = 24 ", "1 \u00d7 2 \u00d7 3 \u00d7 4", "4*3*2/1", "--1*2*3*4"]
    wrong = [
        "4*3*2", "1*2*3*4*1", "12*(3-1)", "24", "1+2+3+4", "(1+2+3)*4 = 25", "1*2*3*4=24=24", "1*2*3**4", "1*2*3*4)",
        "(1*2*3*4", "1*2*3*4.0", "1*2*3 4", "", "=24", "1*2*3*4=", "2//1*3*4", "__import__('os')",
        "x", "-" * 99 + "1*2*3*4",
    ]  # fmt: skip
    check(countdown, [(f"<answer>{text}</answer>", row, 1.0) for text in right])
    check(countdown, [(f"<answer>{text}</answer>", row, 0.0) for text in wrong])
    exact = {"numbers": [3, 3, 8, 8], "target": 24}
    zero = {"nums": [3, 1, 1], "target": 3}
    check(
        countdown,
        [("<answer>8/(3-8/3)</answer>", exact, 1.0), ("<answer>3/(1-1)</answer>", zero, 0.0), ("1*2*3*4", row, 0.0)],
    )
    for bad in ({"nums": "12", "target": 1}, {"nums": [1.0], "target": 1}, {"nums": [True], "target": 1},
                {"nums": [], "target": 1}, {"nums": [1], "target": "1"}):  # fmt: skip
        with pytest.raises(ValueError, match="whole number"):
            countdown("<answer>1</answer>", bad)
    for short in ({}, {"nums": [1]}, {"target": 1}):
        with pytest.raises(KeyError, match="the row has no column"):
            countdown("<answer>1</answer>", short)


def test_multiple_choice() -> None:
    right = {
        "C": ["C", "(C)", "**C**", "C.", "\\boxed{c}", "I think the correct answer is C", "The answer is option C",
              "The answer is $\\boxed{C}$", "(C) Paris", "The correct option is C because A is wrong"],
        "B": ["The answer is (B).", "**Answer:** B", "**Answer: B**", "\\boxed{\\text{(B)}}", "\\boxed{B) 5}",
              "The answer is A. No, the answer is B.", "We see it.\n\n**(B)**", "<think>Answer: A</think> B",
              "<answer> (B) </answer>", "B. it can't be A or C", "B. U.S.", "B. Q", "B. J. K. Rowling", "B. CD",
              "B. Paris\nA. London is wrong", "B. A is wrong", "\\boxed{B. U.S.}", "\\boxed{A}. No, \\boxed{B}",
              "\\boxed{B}\n\n\\boxed{B}", "\\boxed{\\boxed{B}}", "A. 4\nB. 5\nC. 6\n\nThe answer is B.",
              "A. 4\nB. 5\nC. 6\n\nB", "The answer is B. C is wrong",
              "The answer is choice B", 'The answer is "B"', "The answer is 'B'.", "Answer: [B]",
              "The answer is \uff22"],
        "Z": ["Z. z"],
    }  # fmt: skip
    # fmt: off
    wrong = ["", "c", "A or C", "The answer is A or C", "The answer is C or A", "The answer is a cat", "Cats",
             "C dogs", "\\boxed{AC}", "\\boxed{A, C}", "\\boxed{5}\nThe answer is C",
             "The answer is Cat", "C's", "\\boxed{C", "B\nC", "A\nB\nC", "Is it\nA\nB\nC", "(C)(D)", "(C) (D)",
             "C. D. E.", "C) D) E)", "Answer: C D", "Answer: (C)(D)", "C. Paris\nD. London", "(C) Paris\n(D) London",
             "C.\nD.", "\\boxed{C. D.}", "\\boxed{B} or \\boxed{C}", "\\boxed{C}\\boxed{D}",
             "$\\boxed{A}$, $\\boxed{C}$", "\\boxed{D} \\text{ and } \\boxed{C}", "\\boxed{5}, \\boxed{C}",
             "\\boxed{C} \\boxed{C", "Answer: C; D", "Answer: C + D", "Answer: C or maybe D", "The answer is C's"]
    # fmt: on
    check(multiple_choice, [(text, gold, 1.0) for gold, texts in right.items() for text in texts])
    check(multiple_choice, [(text, "C", 0.0) for text in wrong])
    check(multiple_choice, [("C", gold, 1.0) for gold in ("c", "(C)", "C. Paris", "(C) Paris", "\\text{(C)}")])
    for gold in ("", "A dog", "AB", "5"):
        with pytest.raises(ValueError, match="must be a letter"):
            multiple_choice("A", {"answer": gold})


def test_format() -> None:
    whole = "<think>a</think><answer>b</answer>"
    spaced = " <think>\na\n</think>\n\n<answer>\nb\n</answer>\n"
    wrong = ["", "x" + whole, whole + "x", whole * 2, "<think></think><answer>b</answer>", "<think>a</think>",
             "<think>a</think><answer> </answer>", "<answer>b</answer><think>a</think>",
             "a</think><answer>b</answer>"]  # fmt: skip
    check(think_answer, [(whole, {}, 1.0), (spaced, {}, 1.0), *[(text, {}, 0.0) for text in wrong]])
    prefilled = {"prompt": "Solve it.<think>\n"}
    assert think_answer(whole.removeprefix("<think>"), {}, prefilled) == 1.0
    assert think_answer(whole, {}, prefilled) == 0.0
    assert think_answer(whole, {}, {"prompt": "Solve it."}) == 1.0


def test_graders_run_in_the_workers(tmp_path: Path) -> None:
    """As rewards of a run: a timeout kills what sympy would take ages for, and a bad gold fails."""
    reward = RewardConfig(file=str(ROOT / "reward_fns" / "math_answer.py"), timeout_s=2.0)
    form = RewardConfig(file=str(ROOT / "reward_fns" / "format.py"))
    slow = boxed("\\int_0^1 " + "\\sin(" * 9 + "x^x" + ")" * 9 + "dx")
    info = {"token_count": 3, "finish_reason": "stop", "prompt": "Solve it.<think>", "step": 1}

    def outcomes(config: RewardConfig, texts: Sequence[str], gold: str) -> list[Scored | Failed]:
        with RewardPool([config], files=[Path(config.file)], workers=1, log_dir=tmp_path / "logs") as pool:
            items = [
                RewardItem(completion=t, row={"answer": gold}, messages=None, info=info, dataset="d") for t in texts
            ]
            return pool.submit(items).result(timeout=120)

    right, late, wrong = outcomes(reward, ["</think>" + boxed("5"), "</think>" + slow, "</think>" + boxed("6")], "5")
    assert isinstance(right, Scored)
    assert (right.value, right.parts) == (1.0, {"math_answer": 1.0})
    assert right.logged.columns == {"math_answer/extracted": "5", "math_answer/why": None}
    assert isinstance(late, Scored | Failed)
    assert late.parts == {"math_answer": 0.0} if isinstance(late, Scored) else late.kind == "timeout"
    assert isinstance(wrong, Scored)
    assert (wrong.value, wrong.parts) == (0.0, {"math_answer": 0.0})
    assert wrong.logged.columns == {"math_answer/extracted": "6", "math_answer/why": "it is not 5"}
    (bad,) = outcomes(reward, [boxed("5")], "\\frac{1}{")
    assert isinstance(bad, Failed)
    assert bad.kind == "exception"
    assert "cannot be parsed" in bad.detail
    [formed] = outcomes(form, ["a</think><answer>b</answer>"], "5")
    assert isinstance(formed, Scored)
    assert (formed.value, formed.parts) == (1.0, {"format": 1.0})
    assert formed.logged.columns == {"format/why": None}


# --- what the graders log ---------------------------------------------------------------------------------------------

OPEN = {"token_count": 3, "finish_reason": "stop", "prompt": "Solve it.<think>", "step": 1}
NOTHING = "there is no text after the reasoning"


def logged(grader: Grader, completion: str, row: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a grader logs about a completion. Its reward must be the same without a log."""
    found: dict[str, Any] = {}
    reward = grader(completion, row, log_extra=found.__setitem__, **more)
    assert reward == grader(completion, row, **more)
    assert (reward == 1.0) == (found["why"] is None), found
    return found


@pytest.mark.parametrize(
    ("completion", "answer", "extracted", "why"),
    [
        ("so 3\n#### 1,000", "1000", "1,000", None),
        ("\\boxed{$5} apples", "6", "$5", "it is not 6"),
        ("7 and then 8", "7/2", "8", "it is not 7/2"),
        ("#### 5 or 6", "5", None, "#### is followed by several numbers"),
        ("it is \\boxed{5 and 6}", "5", None, "the last box does not have one number"),
        ("it is \\boxed{5", "5", None, "the last box is not closed"),
        ("no idea", "5", None, "there is no number"),
        ("it is 5/0", "5", "5/0", "it is too long, or divides by 0"),
        ("<think>it is 5", "5", None, NOTHING),
    ],
)
def test_gsm8k_logs_what_it_reads(completion: str, answer: str, extracted: str | None, why: str | None) -> None:
    assert logged(gsm8k, completion, {"answer": answer}) == {"extracted": extracted, "why": why}


@pytest.mark.parametrize(
    ("completion", "answer", "extracted", "why"),
    [
        (boxed("\\frac12"), "0.5", "\\frac{1}{2}", None),
        ("we get $x=7$ in the end", "7", "Eq(x, 7)", None),
        ("we get 42", "41", "42", "it is not 41"),
        (boxed("5") + " <think>", "5", None, NOTHING),
        ("no idea", "5", None, "there is no answer"),
        ("", "5", None, NOTHING),
        (boxed("1"), "9" * 300, "1", f"it is not {'9' * 100}"),
    ],
)
def test_math_answer_logs_what_it_reads(completion: str, answer: str, extracted: str | None, why: str | None) -> None:
    assert logged(math_answer, completion, {"answer": answer}) == {"extracted": extracted, "why": why}


@pytest.mark.parametrize(
    ("completion", "extracted", "why"),
    [
        ("Answer: B", "B", None),
        ("Answer: C", "C", "it is not B"),
        ("A or B", None, "no letter is chosen, or several"),
        ("<think>B", None, NOTHING),
    ],
)
def test_multiple_choice_logs_the_letter(completion: str, extracted: str | None, why: str | None) -> None:
    assert logged(multiple_choice, completion, {"answer": "B"}) == {"extracted": extracted, "why": why}


@pytest.mark.parametrize(
    ("expression", "extracted", "why"),
    [
        ("<answer> 2*3+4 </answer>", "2*3+4", None),
        ("<answer>2+3+4</answer>", "2+3+4", "its value is 9, not 10"),
        ("<answer>2*5</answer>", "2*5", "it does not use each of the numbers once"),
        ("<answer>2*3+4 = 11</answer>", "2*3+4 = 11", "it is set equal to something else than 10"),
        ("<answer>2/(3-3)+4</answer>", "2/(3-3)+4", "it does not use each of the numbers once"),
        ("<answer>2 3 4</answer>", "2 3 4", "it is no expression: it does not end"),
        ("<answer>x</answer>", "x", "it is no expression: neither number nor operator"),
        (f"<answer>{'1' * 1001}</answer>", "1" * 1001, "it is longer than 1000 characters"),
        ("10", None, "there is no <answer>...</answer>"),
        ("<think>10", None, NOTHING),
    ],
)
def test_countdown_logs_the_expression(expression: str, extracted: str | None, why: str | None) -> None:
    row = {"nums": [2, 3, 4], "target": 10}
    assert logged(countdown, expression, row) == {"extracted": extracted, "why": why}
    assert logged(countdown, "<answer>4/(2-2)</answer>", {"nums": [2, 2, 4], "target": 1})["why"] == "it divides by 0"


def test_arithmetic_and_format_log_why() -> None:
    assert logged(arithmetic, " 12\n", {"answer": 12}) == {"extracted": "12", "why": None}
    why = "the whole completion is not the gold answer"
    assert logged(arithmetic, "12 apples", {"answer": 12}) == {"extracted": "12 apples", "why": why}
    assert logged(think_answer, "a</think><answer>b</answer>", {}, info=OPEN) == {"why": None}
    why = "a tag is missing or repeated, or there is text outside of the tags"
    assert logged(think_answer, "a</think><answer>b</answer>", {}) == {"why": why}
    why = "there is nothing inside a pair of tags"
    assert logged(think_answer, "<think> </think><answer>b</answer>", {}) == {"why": why}


@pytest.mark.parametrize("name", ["gsm8k", "math_answer", "countdown", "multiple_choice"])
def test_the_unclosed_graders_log_too(name: str) -> None:
    row = {"answer": "5", "nums": [5], "target": 5} if name != "multiple_choice" else {"answer": "B"}
    answer = {"countdown": "<answer>5</answer>", "multiple_choice": "Answer: B"}.get(name, "5")
    read = {"multiple_choice": "B"}.get(name, "5")
    assert logged(load(name, f"{name}_unclosed"), f"<think>{answer}", row) == {"extracted": read, "why": None}
