"""Reward functions in real worker processes: every style, and every way to misbehave."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.config import RewardConfig
from grpo.rewards.pool import RewardItem, RewardPool, locate
from grpo.rewards.preflight import corrupt, try_out
from grpo.types import Failed, Scored, UserError

FUNCTIONS = """
    import asyncio, os, sys, time
    def length(completion, row): return len(completion)
    def parts(completion, row): return {"a": 1.0, "b": 0.25}
    async def slow_but_async(completion, row):
        await asyncio.sleep(0.01)
        return 3.0
    def with_info(completion, row, info): return info["token_count"] + info["step"]
    def mutates(completion, row):
        row["n"] += 1
        row["deep"].append(1)
        return row["n"] + len(row["deep"])
    def misbehaves(completion, row):
        if completion == "raise": raise ValueError("broken here")
        if completion == "nan": return float("nan")
        if completion == "inf": return float("inf")
        if completion == "str": return "1.0"
        if completion == "none": return None
        if completion == "list": return [1.0]
        if completion == "exit": os._exit(3)
        if completion == "sysexit": sys.exit(1)
        if completion == "loop":
            while True: pass
        if completion == "print": print("x" * 100000, flush=True)
        if completion == "fork" and os.fork() == 0: time.sleep(60)
        return True
    def abstains(completion, row): return None if "skip" in completion else 2.0
    def trl_length(prompts, completions, n, **kwargs): return [float(len(c)) * n[0] for c in completions]
    def trl_chat(prompts, completions, **kwargs):
        assert prompts[0] == [{"role": "user", "content": "hi"}], prompts
        return [float(len(c[0]["content"])) for c in completions]
    async def trl_some(completions, **kwargs): return [None if c == "skip" else 1.0 for c in completions]
    def trl_short(completions, **kwargs): return [1.0]
    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        return {"score": float(solution_str == ground_truth), "length": len(solution_str), "note": data_source}
    def numpyish(completion, row):
        class Scalar:
            def __float__(self): return 0.5
        return Scalar()
    def zero(completion, row): return 0.0
    def takes_three(completion, row, other): return 0.0
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "functions.py"
    path.write_text(textwrap.dedent(FUNCTIONS))
    return path


@pytest.fixture
def pool_of(file: Path, tmp_path: Path) -> Iterator[Callable[..., RewardPool]]:
    pools: list[RewardPool] = []

    def make(*rewards: dict[str, Any], workers: int = 1) -> RewardPool:
        configs = [RewardConfig(file=str(file), **reward) for reward in rewards]
        pools.append(RewardPool(configs, files=[file] * len(configs), workers=workers, log_dir=tmp_path))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def items(*completions: str, row: dict[str, Any] | None = None, messages: Any = None) -> list[RewardItem]:
    return [
        RewardItem(
            completion=completion,
            row=row or {"n": 1, "deep": [], "answer": "7"},
            messages=messages,
            info={"token_count": len(completion), "finish_reason": "stop", "prompt": "p", "step": 5},
        )
        for completion in completions
    ]


def score(pool: RewardPool, group: list[RewardItem]) -> list[Scored | Failed]:
    return pool.submit(group).result(timeout=60)


def values(outcomes: list[Scored | Failed]) -> list[float | str]:
    return [o.value if isinstance(o, Scored) else o.kind for o in outcomes]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"name": "length"}, [2, 3]),
        ({"name": "slow_but_async"}, [3, 3]),
        ({"name": "with_info"}, [7, 8]),
        ({"name": "numpyish"}, [0.5, 0.5]),
        ({"name": "parts"}, [1.25, 1.25]),
        ({"name": "mutates"}, [3, 3]),  # 2 + 1 each time: a call cannot change the row of the next one
        ({"name": "trl_length", "style": "trl"}, [2, 3]),
        ({"name": "compute_score", "style": "verl"}, [0, 0]),
    ],
)
def test_styles_and_returns(pool_of: Callable[..., RewardPool], reward: dict[str, Any], expected: list[float]) -> None:
    row = {"n": 1, "deep": [], "answer": "7"}
    assert values(score(pool_of(reward), items("ab", "abc", row=row))) == expected
    assert row == {"n": 1, "deep": [], "answer": "7"}


def test_weights_parts_and_abstention(pool_of: Callable[..., RewardPool]) -> None:
    pool = pool_of({"name": "length", "weight": 0.5}, {"name": "abstains", "weight": 2.0}, {"name": "parts"})
    first, second = score(pool, items("ab", "skip"))
    assert first == Scored(value=0.5 * 2 + 2 * 2 + 1.25, parts={"length": 2, "abstains": 2, "parts": 1.25, "parts/a": 1, "parts/b": 0.25})  # fmt: skip  # noqa: E501
    assert second == Scored(value=0.5 * 4 + 1.25, parts={"length": 4, "parts": 1.25, "parts/a": 1, "parts/b": 0.25})


def test_all_parts_abstaining_is_a_failure_and_any_failed_part_fails_the_rollout(
    pool_of: Callable[..., RewardPool],
) -> None:
    assert values(score(pool_of({"name": "abstains"}), items("skip", "x"))) == ["abstained", 2.0]
    pool = pool_of({"name": "length"}, {"name": "misbehaves"})
    assert values(score(pool, items("raise", "fine"))) == ["exception", 5.0]


def test_trl_gets_whole_groups_conversations_and_none(pool_of: Callable[..., RewardPool]) -> None:
    chat = [{"role": "user", "content": "hi"}]
    pool = pool_of({"name": "trl_chat", "style": "trl"}, {"name": "trl_some", "style": "trl"})
    assert values(score(pool, items("skip", "abc", messages=chat))) == [5.0, 4.0]
    assert values(score(pool_of({"name": "trl_short", "style": "trl"}), items("a", "b"))) == ["wrong_count"] * 2


def test_verl_finds_the_ground_truth_and_logs_its_other_numbers(pool_of: Callable[..., RewardPool]) -> None:
    pool = pool_of({"name": "compute_score", "style": "verl"})
    for row in ({"reward_model": {"ground_truth": "42"}}, {"ground_truth": "42"}, {"answer": "42"}):
        right, wrong = score(pool, items("42", "4", row={"data_source": "gsm8k", **row}))
        assert right == Scored(value=1.0, parts={"compute_score": 1.0, "compute_score/length": 2.0})
        assert wrong == Scored(value=0.0, parts={"compute_score": 0.0, "compute_score/length": 1.0})


def test_whatever_one_call_does_the_others_are_scored(pool_of: Callable[..., RewardPool], tmp_path: Path) -> None:
    completions = [
        "fine",
        "raise",
        "nan",
        "exit",
        "inf",
        "loop",
        "str",
        "fine",
        "none",
        "list",
        "sysexit",
        "print",
        "fork",
    ]
    started = time.monotonic()
    outcomes = score(pool_of({"name": "misbehaves", "timeout_s": 1.0}), items(*completions))
    assert time.monotonic() - started < 15
    expected = [1.0, "exception", "not_finite", "worker_died", "not_finite", "timeout", "wrong_type", 1.0, "abstained",
                "wrong_type", "exception", 1.0, 1.0]  # fmt: skip
    assert values(outcomes) == expected
    details = {c: o.detail for c, o in zip(completions, outcomes, strict=True) if isinstance(o, Failed)}
    assert details["raise"].startswith("misbehaves: ValueError: broken here at line ")
    assert "exited with code 3" in details["exit"]
    assert "longer than 1 s" in details["loop"]
    assert (tmp_path / "reward-worker-0.log").stat().st_size > 100000


def test_no_process_is_left(pool_of: Callable[..., RewardPool]) -> None:
    before = {p.pid for p in psutil.process_iter()}
    pool = pool_of({"name": "misbehaves", "timeout_s": 30.0}, workers=2)
    assert values(score(pool, items("fork", "fine"))) == [1.0, 1.0]
    hanging = pool.submit(items("loop"))
    time.sleep(0.3)
    pool.close()
    assert not hanging.done() or hanging.cancelled()
    time.sleep(0.3)
    new = [p for p in psutil.process_iter(["pid", "status", "cmdline"]) if p.info["pid"] not in before]
    alive = [p for p in new if p.info["status"] != psutil.STATUS_ZOMBIE]
    assert [p for p in alive if "grpo.rewards.worker" in " ".join(p.info["cmdline"] or [])] == []


def test_many_groups_over_several_workers(pool_of: Callable[..., RewardPool]) -> None:
    pool = pool_of({"name": "length"}, workers=2)
    futures = [pool.submit(items(*["x" * n for n in range(20)])) for _ in range(30)]
    assert all(values(f.result(timeout=60)) == list(range(20)) for f in futures)


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("def f(a, b):\n    return (1\n", "f", r"functions.py:2: SyntaxError: '\(' was never closed"),
        ("import nothing_of_that_name\n", "f", r"bad_functions.py:1: ModuleNotFoundError"),
        ("raise SystemExit(1)\n", "f", r"bad_functions.py:1: SystemExit"),
        ("def score(a, b): return 0\n", "scores", r"has no function scores; did you mean score\?"),
        ("def f(a): return 0\n", "f", r"f must be f\(completion, row\)"),
        ("def f(a, b, c): return 0\n", "f", r"f must be f\(completion, row\)"),
        ("def f(a, b): return 0\n", "f", r"gives the gold answer '7' 0 and the corrupted '8' 0"),
        ("def f(a, b): return 1\n", "f", r"gives the gold answer '7' 1 and the corrupted '8' 1"),
        ("def f(a, b): raise KeyError('x')\n", "f", r"f fails on every row tried; the first: exception: f: KeyError"),
    ],
)
def test_what_try_out_refuses(tmp_path: Path, text: str, name: str, words: str) -> None:
    path = tmp_path / "bad_functions.py"
    path.write_text(text)
    good = tmp_path / "good.py"
    good.write_text("def good(c, row): return float(c == row['answer'])\n")
    rewards = [RewardConfig(file="good.py", gold=True), RewardConfig(file="bad_functions.py", name=name, gold=True)]
    with pytest.raises(UserError, match=words) as caught:
        try_out(rewards, [good, path], items(""), gold_template="{answer}", answer_column="answer", log_dir=tmp_path)
    assert "rewards[1]" in str(caught.value)


def test_try_out_reports_gold(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text("def good(c, row): return float(c == '<' + row['answer'] + '>')\n")
    reward = RewardConfig(file="good.py", gold=True)
    kwargs = {"answer_column": "answer", "log_dir": tmp_path}
    [line] = try_out([reward], [path], items(""), gold_template="<{answer}>", **kwargs)
    assert line == "good: gold 1, corrupted 0, checked on 1 rows"
    with pytest.raises(UserError, match="gives the gold answer"):
        try_out([reward], [path], items(""), gold_template="{answer}", **kwargs)
    with pytest.raises(UserError, match=r"data\.answer_column=gold"):
        try_out([reward], [path], items(""), gold_template="{answer}", answer_column="gold", log_dir=tmp_path)


def test_corrupted_answers_differ() -> None:
    assert [corrupt(a) for a in ("799", "A", "-1/2", "zZ", "", "?")] == ["800", "B", "-2/3", "Aa", "x", "?x"]  # fmt: skip  # noqa: E501


def test_files_are_found_beside_the_recipe_and_near_misses_are_named(tmp_path: Path) -> None:
    (tmp_path / "reward_fns").mkdir()
    (tmp_path / "reward_fns" / "maths.py").write_text("")
    recipe = tmp_path / "recipes" / "r.yaml"
    recipe.parent.mkdir()
    assert locate([RewardConfig(file="reward_fns/maths.py")], recipe) == [tmp_path / "reward_fns" / "maths.py"]
    with pytest.raises(
        UserError, match=r"rewards\[0\].file=reward_fns/math.py does not exist; did you mean .*maths.py"
    ):
        locate([RewardConfig(file="reward_fns/math.py")], recipe)
