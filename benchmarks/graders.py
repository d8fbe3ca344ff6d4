"""`python -m benchmarks.graders DATA`: test the graders on the public cases and data sets of a folder, as Markdown.

DATA holds grader_cases.jsonl and the data sets that tests/unit/test_graders.py names. The last line of output is one
JSON object with the figures.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.result import print_result
from grpo.rewards.golds import corrupt

SETS = {"gsm8k": ["gsm8k_train", "gsm8k_test", "svamp_test"], "math_answer": ["math500_test", "math_train", "amc23"]}


def main(data: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reward_fns"))
    print("| data | grader | rows | gold answers that get 1 | changed answers that get 0 | ms a call: median, p99 |")
    print("|---|---|---|---|---|---|")
    answers = {}
    for grader, names in SETS.items():
        for name in names:
            found = answers[name] = {"grader": grader, **on_answers(grader, rows_of(data, name))}
            times = f"{found['median_ms']:.2f}, {found['p99_ms']:.1f}"
            print(f"| {name} | {grader} | {found['rows']} | {found['right']} | {found['changed_wrong']} | {times} |")
    print("\n| mode | core | prediction (its end) | gold | public grader | ours |\n|---|---|---|---|---|---|")
    cases = rows_of(data, "grader_cases")
    other = [case for case in cases if verdict(case) != str(float(case["expected"]))]
    for case in other:
        texts = " | ".join(shown(case[key]) for key in ("prediction", "gold"))
        core = "yes" if case["core"] else "no"
        print(f"| {case['mode']} | {core} | {texts} | {float(case['expected'])} | {verdict(case)} |")
    print(f"\nThe other {len(cases) - len(other)} of {len(cases)} cases are judged as expected.")
    print_result("graders", answers=answers, cases=len(cases), cases_as_expected=len(cases) - len(other))


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    with (data / f"{name}.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def on_answers(name: str, rows: list[dict[str, Any]]) -> dict[str, int | float]:
    """Grade each row's solution (or boxed answer), and its boxed answer with changed digits.

    Returns the number of `rows`, of solutions that get 1 (`right`) and of changed answers that get 0 (`changed_wrong`),
    and the milliseconds of a call on a solution (`median_ms`, `p99_ms`).
    """
    grader = getattr(importlib.import_module(name), name)
    seconds, right, wrong = [], 0, 0
    for row in rows:
        answer = str(row["answer"])
        start = time.perf_counter()
        right += grader(row.get("solution", f"The answer is \\boxed{{{answer}}}."), row) == 1.0
        seconds.append(time.perf_counter() - start)
        wrong += grader(f"The answer is \\boxed{{{corrupt(answer)}}}.", row) == 0.0
    p99_s = sorted(seconds)[int(0.99 * len(seconds))]
    return {
        "rows": len(rows),
        "right": right,
        "changed_wrong": wrong,
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * p99_s,
    }


def verdict(case: dict[str, Any]) -> str:
    name = "multiple_choice" if case["mode"] == "mcq" else "math_answer"
    try:
        return str(getattr(importlib.import_module(name), name)(case["prediction"], {"answer": case["gold"]}))
    except ValueError:
        return "error: gold"


def shown(text: str) -> str:
    """Return the end of `text` as a table cell."""
    end = " ".join(text.split())[-60:].replace("|", "\\|")
    return f"`{end}`"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
