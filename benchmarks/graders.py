"""`python -m benchmarks.graders DATA`: the answer graders on the public cases and data sets of a folder, as Markdown.

DATA holds grader_cases.jsonl and the data sets that tests/unit/test_graders.py names.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from grpo.rewards.preflight import corrupt

SETS = {"gsm8k": ["gsm8k_train", "gsm8k_test", "svamp_test"], "math_answer": ["math500_test", "math_train", "amc23"]}


def main(data: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reward_fns"))
    print("| data | grader | rows | gold answers that get 1 | changed answers that get 0 | ms a call: median, p99 |")
    print("|---|---|---|---|---|---|")
    for grader, names in SETS.items():
        for name in names:
            print(f"| {name} | {grader} | {on_answers(grader, rows_of(data, name))} |")
    print("\n| mode | core | prediction (its end) | gold | public grader | ours |\n|---|---|---|---|---|---|")
    cases = rows_of(data, "grader_cases")
    other = [case for case in cases if verdict(case) != str(float(case["expected"]))]
    for case in other:
        texts = " | ".join(shown(case[key]) for key in ("prediction", "gold"))
        core = "yes" if case["core"] else "no"
        print(f"| {case['mode']} | {core} | {texts} | {float(case['expected'])} | {verdict(case)} |")
    print(f"\nThe other {len(cases) - len(other)} of {len(cases)} cases are judged as expected.")


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    with (data / f"{name}.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def on_answers(name: str, rows: list[dict[str, Any]]) -> str:
    """rows | right | wrong | times, of the solution (or the boxed answer) and of the boxed answer with other digits."""
    grader = getattr(importlib.import_module(name), name)
    seconds, right, wrong = [], 0, 0
    for row in rows:
        answer = str(row["answer"])
        start = time.perf_counter()
        right += grader(row.get("solution", f"The answer is \\boxed{{{answer}}}."), row) == 1.0
        seconds.append(time.perf_counter() - start)
        wrong += grader(f"The answer is \\boxed{{{corrupt(answer)}}}.", row) == 0.0
    times = f"{1e3 * statistics.median(seconds):.2f}, {1e3 * sorted(seconds)[int(0.99 * len(seconds))]:.1f}"
    return f"{len(rows)} | {right} | {wrong} | {times}"


def verdict(case: dict[str, Any]) -> str:
    name = "multiple_choice" if case["mode"] == "mcq" else "math_answer"
    try:
        return str(getattr(importlib.import_module(name), name)(case["prediction"], {"answer": case["gold"]}))
    except ValueError:
        return "error: gold"


def shown(text: str) -> str:
    """The end of `text`, as a cell of a table."""
    end = " ".join(text.split())[-60:].replace("|", "\\|")
    return f"`{end}`"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
