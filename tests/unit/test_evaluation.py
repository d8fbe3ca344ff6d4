"""Statistics of evaluations against naive enumeration, and intervals against simulated models."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import load
from grpo.evaluation.answers import final_answer
from grpo.evaluation.metrics import evaluation_line
from grpo.evaluation.statistics import (
    Evaluation,
    Judged,
    SetEvaluation,
    bounds,
    interval,
    majority,
    paired,
    paired_gain,
    pass_at_k,
    sign_test,
    statistics_of,
    student_quantile,
    summarize,
    with_bounds,
)


def sample(value: float | None, answer: str = "", tokens: int = 1, truncated: bool = False) -> Judged:
    return Judged(value=value, answer=answer, tokens=tokens, truncated=truncated)


def evaluation(**sets: dict[str, float]) -> Evaluation:
    return Evaluation(
        sets={
            name: SetEvaluation(
                per_prompt=values, pass_at_k=0, maj_at_k=0, tokens_mean=1, truncated_fraction=0, failed=0
            )
            for name, values in sets.items()
        }
    )


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = [any(subset) for subset in itertools.combinations(right, k)]
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_of_impossible_counts_is_refused(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(n, right, k)


@given(st.lists(st.tuples(st.sampled_from(["", "1", "2", "3"]), st.booleans()), min_size=1, max_size=9))
def test_majority_is_the_mean_over_every_way_to_break_ties(votes: list[tuple[str, bool]]) -> None:
    counts = Counter(answer for answer, _ in votes if answer != "")
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    outcomes = []  # of each winner, the verdict of each completion that gave it, every winner with the same weight
    for winner in winners:
        verdicts = [right for answer, right in votes if answer == winner]
        outcomes += [right for right in verdicts for _ in range(math.lcm(*range(1, 10)) // len(verdicts))]
    assert majority(votes) == pytest.approx(sum(outcomes) / len(outcomes) if outcomes else 0.0)


def test_statistics_by_hand() -> None:
    samples = {
        "a": [sample(1.0, "7"), sample(0.0, "8"), sample(0.0, "8"), sample(0.5, "9")],
        "b": [sample(1.0, "3"), sample(1.0, "3"), sample(None, "5"), sample(0.0, "")],
        "c": [sample(None)] * 4,
    }
    found = statistics_of(samples)
    assert found["avg"] == {"a": 0.375, "b": pytest.approx(2 / 3)}
    assert found["pass"] == {"a": 1.0, "b": 1.0}
    assert found["maj"] == {"a": 0.0, "b": 1.0}
    assert found["pass@1"] == {"a": 0.25, "b": pytest.approx(2 / 3)}  # a reward of 0.5 is not right
    assert found["pass@2"] == {"a": 0.5, "b": 1.0}
    assert found["pass@4"] == {"a": 1.0}  # b has three scored completions
    assert set(found) == {"avg", "pass", "maj", "pass@1", "pass@2", "pass@4"}


def test_the_order_in_which_prompts_were_finished_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    prompts = {f"p{i}": [sample(value) for value in rng.random(4)] for i in range(50)}
    turned = dict(reversed(prompts.items()))
    for statistic, values in statistics_of(prompts).items():
        assert interval(list(values.values())) == interval(list(statistics_of(turned)[statistic].values()))
    empty = {name: [sample(0.0)] for name in prompts}
    assert paired_gain(
        Evaluation(sets={"a": summarize(empty)}), Evaluation(sets={"a": summarize(prompts)})
    ) == paired_gain(
        Evaluation(sets={"a": summarize(dict(reversed(empty.items())))}), Evaluation(sets={"a": summarize(turned)})
    )


def test_summary_by_hand() -> None:
    samples = {
        "a": [sample(1.0, "7", tokens=3), sample(0.0, "8", tokens=9, truncated=True), sample(0.0, "8", tokens=3)],
        "b": [sample(0.0, "3", tokens=1), sample(0.0, "3", tokens=1), sample(None, "5", tokens=1)],
    }
    found = summarize(samples)
    assert found.accuracy == pytest.approx((1 / 3 + 0) / 2)
    assert found.pass_at_k == 1.0  # of the prompt that has all three; b has two
    assert found.maj_at_k == 0.0
    assert found.tokens_mean == 3.0
    assert found.truncated_fraction == pytest.approx(1 / 6)
    assert found.failed == 1
    with pytest.raises(ValueError, match="no completion"):
        summarize({"a": [sample(None)]})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("12 + 3 = 15\n#### 1,005\nand more", "1005"),
        ("<think>maybe 4</think> <answer> 5 + 6 </answer>", "5+6"),
        ("first 12, then -3.5.", "-3.5"),
        ("  Paris \n is it. ", "Parisisit"),
        (r"\boxed{\frac{1} {2}}", r"\frac{1}{2}"),
        (r"\boxed{3}, no, and unclosed \boxed{\frac{1}{2", ""),
        ("", ""),
        (r"\boxed{(1,2)}", "(1,2)"),
        (r"\boxed{(12)}", "(12)"),
        (r"\boxed{1,2}", "1,2"),
        (r"\boxed{1,234,5}", "1,234,5"),
        (r"\boxed{[100,200]}", "[100,200]"),
        (r"\boxed{\{100,200\}}", r"\{100,200\}"),
        (r"\boxed{-1,234,567.5}", "-1234567.5"),
        (r"\boxed{\$1,234}", r"\$1234"),
        ("(it costs 1,234).", "1234"),
        ("x is 1,2", "2"),
        ("#### 5, as said", "5,assaid"),
        ("#### 5,", "5"),
        (
            r"\boxed{\frac{1}{1+\frac{2}{\frac{3}{\sqrt{\frac{4}{5}}}}}} or so",
            r"\frac{1}{1+\frac{2}{\frac{3}{\sqrt{\frac{4}{5}}}}}",
        ),
        (r"\boxed{\left\{x}", r"\left\{x"),
        (r"put it into \boxed{}: $\boxed 7$", "7"),
        (r"{\boxed -3.5}", "-3.5"),
        (r"so \boxed 7, which is 5 + 2", "7"),
        ("The answer is (A), no, the answer is (B): 3 of 5.", "B"),
        ("**Final answer:** $\\text{C}$, of 12", "C"),
        ("Answer: D. 16 apples", "D"),
        ("The answer is 42. Check: 6 * 7", "42"),
        ("The answer is 1,234 dollars, of 5 people", "1234"),
        ("The answer is 5 + 2 = 7", "7"),
        ("The answer is N = 12", "12"),
        ("The answer is A or B, one of 2", "2"),
        ("The answer is I think 9", "9"),
        ("<answer>(B)</answer>", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        ("By 1 and 2\n**B.**", "B"),
        ("(B)", "B"),
        ("The answer is (A)\n#### 5", "5"),
        ("The answer is 5\n<answer>6</answer>", "6"),
        ("The answer is \u22125", "-5"),
        ("#### \u22125", "-5"),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("start", "repeated", "end"),
    [
        ("", "{", ""), ("", r"\boxed{", ""), (r"\boxed{", "{", ""), (r"\boxed", " ", "x"), (r"\boxed{1", ",000", ",5}"),
        ("", "1,111", ""), ("answer is", " ", "x"), ("answer is A", " ", "or b"), ("answer is option", " ", "I"),
        ("answer is 1", " ", "x"), ("", "answer", ""), ("", "\\", ""),
    ],
)  # fmt: skip
def test_a_vote_is_read_in_linear_time(start: str, repeated: str, end: str) -> None:
    started = time.process_time()
    final_answer(start + repeated * (200_000 // len(repeated)) + end)
    assert time.process_time() - started < 5  # a square of 200,000 would take minutes


def test_accuracy_and_gain_weigh_data_sets_alike() -> None:
    before = evaluation(big={str(i): 0.0 for i in range(100)}, small={"x": 0.5, "y": 0.5})
    after = evaluation(big={str(i): 0.2 for i in range(100)}, small={"x": 0.5, "y": 0.9, "z": 0.0})
    assert before.accuracy == 0.25
    gain, low, high = paired_gain(before, after)
    assert gain == pytest.approx((0.2 + 0.2) / 2)  # z is in one of them only
    assert low < gain < high
    assert list(paired(before, after)) == ["big", "small"]
    with pytest.raises(ValueError, match="share no prompt"):
        paired(before, evaluation(big={"other": 1.0}))


def test_paired_interval_is_narrower_than_the_spread_between_prompts() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 0.6, 400)
    noise = rng.normal(0, 0.1, 400)
    before = evaluation(d={str(i): float(v) for i, v in enumerate(hard)})
    after = evaluation(d={str(i): float(v) for i, v in enumerate(hard + 0.3 + noise)})
    gain, low, high = paired_gain(before, after)
    standard_error = noise.std(ddof=1) / np.sqrt(400)
    assert gain == pytest.approx(0.3 + noise.mean(), abs=1e-9)
    assert low == pytest.approx(gain - 1.96 * standard_error, abs=0.002)
    assert high == pytest.approx(gain + 1.96 * standard_error, abs=0.002)


def test_an_accuracy_has_the_interval_of_its_data_sets() -> None:
    """Of two, the mean of independent means: standard error sqrt(s1^2/n1 + s2^2/n2) / 2."""
    rng = np.random.default_rng(1)
    big, small = rng.uniform(0.2, 0.6, 500), rng.uniform(0.1, 0.9, 250)
    found = evaluation(**{
        name: {str(i): float(v) for i, v in enumerate(values)} for name, values in (("big", big), ("small", small))
    })  # fmt: skip
    both = found.interval()
    error = math.sqrt(big.var(ddof=1) / 500 + small.var(ddof=1) / 250) / 2
    assert both.mean == found.accuracy == pytest.approx((big.mean() + small.mean()) / 2)
    assert both.low == pytest.approx(both.mean - 1.96 * error, abs=0.001)
    assert both.high == pytest.approx(both.mean + 1.96 * error, abs=0.001)
    assert found.sets["small"].interval() == interval(list(small))
    assert with_bounds(both) == f"{both.mean:.3f} ({both.low:.3f} to {both.high:.3f})"
    single = evaluation(big={"a": 0.5, "b": 1.0}, small={"a": 0.25}).interval()
    assert single.mean == 0.5
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert with_bounds(single) == "0.500"


def test_the_line_of_an_evaluation(tmp_path: Path) -> None:
    """Two of two right: Clopper and Pearson's bounds are 0.025^(1/2) = 0.158 and 1; one of two: 0.013 and 0.987."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {path: x}\ndata: {train: x, eval: {sets: x, samples_per_prompt: 4}}\nrewards: [{file: x.py}]\n"
        "algorithm: {prompts_per_step: 4, group_size: 8}\nrun: {steps: 1}\n"
    )
    config = load(recipe, [])
    right, half = {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}
    [line, both] = [evaluation_line(found, config) for found in (evaluation(d=right), evaluation(d=right, e=half))]
    assert re.fullmatch(r"accuracy 1.000 \(0.1[56]\d to 1.000\): d, avg@4 of 2", line)
    own = r"d 1.000 \(0.1[56]\d to 1.000\), avg@4 of 2; e 0.500 \(0.01\d to 0.98\d\), avg@4 of 2"
    assert re.fullmatch(rf"accuracy 0.750 \([\d.]+ to [\d.]+\): {own}", both)


@pytest.mark.parametrize(("degrees", "expected"), [(5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_student_quantiles_are_those_of_the_tables(degrees: int, expected: float) -> None:
    assert student_quantile(degrees) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("prompts", "k"), [(30, 64), (200, 64), (200, 1)])
def test_intervals_cover_the_models_accuracy(prompts: int, k: int) -> None:
    """Simulated models: a prompt's chance of a right completion is drawn, then its k completions. The share of
    evaluations whose interval holds the mean chance must be 95 %, within 3 standard errors of 400 trials."""
    rng = np.random.default_rng(prompts + k)
    covered = 0
    for trial in range(400):
        chances = rng.beta(0.6, 1.4, size=prompts)  # most prompts nearly always right or wrong; mean 0.3
        found = interval(list(rng.binomial(k, chances) / k), seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert abs(covered / 400 - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize(("prompts", "k"), [(5, 64), (30, 64), (30, 1)])
@pytest.mark.parametrize(("a", "b"), [(0.05, 0.95), (0.1, 1.1), (0.95, 0.05)])
def test_intervals_cover_where_most_prompts_are_alike(a: float, b: float, prompts: int, k: int) -> None:
    """Models that are nearly always wrong, or right: resampling alone covers 0.23 to 0.93 of these, 95 % are due."""
    rng = np.random.default_rng(prompts + k)
    covered = 0
    for trial in range(400):
        found = interval(list(rng.binomial(k, rng.beta(a, b, size=prompts)) / k), seed=trial)
        covered += found.low <= a / (a + b) <= found.high
    assert covered / 400 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)


def test_ordinary_samples_get_students_width() -> None:
    """Of 21 values the plain percentile interval is 0.92 as wide."""
    values = np.random.default_rng(1).uniform(0.2, 0.8, size=21)
    found = interval(list(values))
    width = 2 * 2.086 * values.std(ddof=1) / math.sqrt(21)
    assert found.high - found.low == pytest.approx(width, rel=0.05)


def test_intervals_where_all_prompts_agree() -> None:
    none, every = interval([0.0] * 20), interval([1.0] * 20)
    assert (none.mean, none.low, every.mean, every.high) == (0, 0, 1, 1)
    assert (1 - none.high) ** 20 == pytest.approx(0.025, rel=5e-3)
    assert every.low == pytest.approx(1 - none.high)
    alone = interval([0.5])
    assert alone.mean == 0.5
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


def test_one_prompt_that_hardly_differs_hardly_changes_the_interval() -> None:
    every, nearly = interval([1.0] * 20), interval([1.0] * 19 + [0.9999])
    assert (nearly.low, nearly.high) == pytest.approx((every.low, every.high), abs=1e-3)


def test_intervals_of_few_right_ones_are_the_binomials() -> None:
    def at_most(right: int, share: float) -> float:
        return sum(math.comb(40, i) * share**i * (1 - share) ** (40 - i) for i in range(right + 1))

    found = interval([1.0] * 3 + [0.0] * 37)
    assert at_most(3, found.high) == pytest.approx(0.025, abs=0.005)  # Clopper and Pearson, by their definition
    assert 1 - at_most(2, found.low) == pytest.approx(0.025, abs=0.005)


def test_gains_that_are_all_alike_have_an_interval() -> None:
    """Of 30 prompts that all stayed as they were, one in 1 / (1 - 0.025**(1/30)) may not have."""
    same = evaluation(d={str(i): 0.5 for i in range(30)})
    gain, low, high = paired_gain(same, same)
    assert gain == 0
    assert (low, high) == pytest.approx((0.025 ** (1 / 30) - 1, 1 - 0.025 ** (1 / 30)), rel=1e-3)
    gain, low, high = paired_gain(same, evaluation(d={str(i): 0.75 for i in range(30)}))
    assert low < 0.25 - 0.1
    assert high > 0.25


def test_the_sign_test_against_all_assignments() -> None:
    gains = np.asarray([0.5, 0.25, 0.0, 1.0, -0.25, 0.5, 0.75, 0.25])
    extreme = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True))) >= gains.sum() - 1e-12
        for signs in itertools.product((-1, 1), repeat=len(gains))
    ]
    assert sign_test([gains]) == pytest.approx(sum(extreme) / len(extreme), abs=0.005)
    assert sign_test([np.zeros(5)]) == 1.0


def test_the_sign_test_keeps_its_level() -> None:
    rng = np.random.default_rng(3)
    small = sum(sign_test([rng.normal(0, 1, 40), rng.normal(0, 3, 40)], seed=i) < 0.05 for i in range(200))
    assert abs(small / 200 - 0.05) <= 3 * math.sqrt(0.05 * 0.95 / 200)


def test_resampling_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import grpo.evaluation.statistics

    values = np.random.default_rng(0).uniform(size=37)
    whole = bounds([values], (0, 1))
    monkeypatch.setattr(grpo.evaluation.statistics, "BLOCK", 37 * 7)
    assert bounds([values], (0, 1)) == pytest.approx(whole, abs=0.004)
