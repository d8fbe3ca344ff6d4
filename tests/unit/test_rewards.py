"""Reward workers: real child processes, hostile functions, outcomes written down by hand."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from grpo.config import RewardConfig
from grpo.rewards import golds as golds_module
from grpo.rewards.child.errors import user_place
from grpo.rewards.golds import Unsampled, corrupt, declares_gold, try_golds
from grpo.rewards.groups import RewardItem, parse_answer
from grpo.rewards.imports import locate
from grpo.rewards.pool import RewardPool
from grpo.rewards.preflight import check_loads, key_hint, try_out
from grpo.rewards.process import parse_greeting
from grpo.types import Failed, Logged, Moment, Prompt, Scored, UserError

ROOT = Path(__file__).resolve().parents[2]
ROW = {"question": "1+1", "answer": "2", "sum": 2}
PATIENCE_S = 60

EVALUATE = """
import os, signal, sys, time
def f(completion, row):
    return eval(completion)
"""
"""A reward function that does what the completion says."""

DAEMON = """
import subprocess, sys
def daemon():
    code = "import os, time\\nif os.fork(): os._exit(0)\\nos.setsid()\\ntime.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], env={}, start_new_session=True).wait()
"""

UNSAMPLED = Unsampled(encode=lambda text: [*map(ord, text), 2], moment=Moment(max_steps=40))

Write = Callable[..., RewardConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(source, file=..., **options) -> the config of a reward in tmp_path."""

    def make(source: str, file: str = "f.py", **options: Any) -> RewardConfig:
        path = tmp_path / file
        path.write_text(textwrap.dedent(source))
        return RewardConfig(file=str(path), **{"name": "f", **options})

    return make


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) == before


def items(
    texts: Sequence[str],
    row: Mapping[str, Any] = ROW,
    messages: Sequence[Mapping[str, str]] | None = None,
    dataset: str = "d",
) -> list[RewardItem]:
    info = {"token_count": 3, "finish_reason": "stop", "prompt": "1+1=", "step": 7}
    return [
        RewardItem(
            completion=text, row=row, messages=messages, info={**info, "token_count": len(text)}, dataset=dataset,
            completion_ids=np.asarray([*map(ord, text), 2], dtype=np.int32),
            moment=Moment(step=7, global_step=12, max_steps=40, epoch=1.5),
        )
        for text in texts
    ]  # fmt: skip


def open_pool(rewards: Sequence[RewardConfig], tmp_path: Path, workers: int = 1) -> RewardPool:
    return RewardPool(rewards, files=[Path(r.file) for r in rewards], workers=workers, log_dir=tmp_path / "logs")


def scored(
    rewards: RewardConfig | Sequence[RewardConfig], tmp_path: Path, texts: Sequence[str], **options: Any
) -> list[Scored | Failed]:
    """Outcomes of one group under a pool of its own."""
    several = [rewards] if isinstance(rewards, RewardConfig) else rewards
    with open_pool(several, tmp_path) as pool:
        return pool.submit(items(texts, **options)).result(timeout=PATIENCE_S)


def values(outcomes: Sequence[Scored | Failed]) -> list[float | str]:
    """The value of each, or the kind of failure."""
    return [o.value if isinstance(o, Scored) else o.kind for o in outcomes]


# --- what a function may return --------------------------------------------------------------------------------------


def test_numbers_count_and_nothing_else_does(write: Write, tmp_path: Path) -> None:
    expected: dict[str, float | str] = {
        "1": 1.0, "0.25": 0.25, "-2": -2.0, "True": 1.0, "False": 0.0, "__import__('fractions').Fraction(1, 4)": 0.25,
        "__import__('numpy').float32(0.5)": 0.5, "__import__('numpy').bool_(True)": 1.0,
        "None": "abstained", "float('nan')": "not_finite", "float('inf')": "not_finite", "-float('inf')": "not_finite",
        "10 ** 400": "not_finite", "__import__('numpy').float64('nan')": "not_finite", "'1.0'": "wrong_type",
        "b'1'": "wrong_type", "[1.0]": "wrong_type", "(1.0,)": "wrong_type", "object()": "wrong_type",
        "1j": "wrong_type", "__import__('numpy').array([1.0])": "wrong_type", "{}": "wrong_type",
        "{'a': 'x'}": "wrong_type",
        "{str(i): 1 for i in range(65)}": "wrong_type", "{'a': float('nan')}": "not_finite", "1 / 0": "exception",
        "sys.exit(0)": "exception", "exec('raise KeyboardInterrupt')": "exception",
    }  # fmt: skip
    assert values(scored(write(EVALUATE), tmp_path, list(expected))) == list(expected.values())


def test_failures_say_which_reward_what_and_where(write: Write, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def divide(n):\n    return 1 / n\n")
    reward = write(
        """
        import json
        from beside import divide

        class Loud(Exception):
            def __str__(self):
                raise RuntimeError

        def f(completion, row):
            if completion == "loud":
                raise Loud
            if completion == "long":
                raise ValueError("line one\\nline two " + "x" * 5000)
            return json.loads("{") if completion == "json" else divide(0)
        """
    )
    texts = ["", "json", "long", "loud"]
    beside, inside, long, loud = scored(reward, tmp_path, texts)
    assert beside == Failed(
        kind="exception", detail=f"f: ZeroDivisionError: division by zero at {tmp_path / 'beside.py'}:2"
    )
    assert isinstance(inside, Failed)
    assert inside.detail.startswith("f: JSONDecodeError: Expecting property name")
    assert inside.detail.endswith(f" at {tmp_path / 'f.py'}:14")
    assert isinstance(long, Failed)
    assert long.detail.startswith("f: ValueError: line one line two xxx")
    assert len(long.detail) <= 300
    assert isinstance(loud, Failed)
    assert "f: Loud: (its message cannot be printed)" in loud.detail


def test_a_mapping_is_summed_and_logged(write: Write, tmp_path: Path) -> None:
    reward = write("def f(completion, row): return {'right': 1, 'form': 0.25}", name="f", weight=2.0)
    assert scored(reward, tmp_path, ["x"]) == [
        Scored(value=2.5, parts={"f": 1.25, "f/right": 1.0, "f/form": 0.25}),
    ]


def test_parts_are_weighted_and_may_abstain(write: Write, tmp_path: Path) -> None:
    a = write("def a(completion, row): return None if 'A' in completion else 3.0", file="a.py", name="a", weight=0.5)
    b = write(
        """
        def b(completion, row):
            if "!" in completion:
                raise ValueError("no")
            return None if "B" in completion else 4.0
        """,
        file="b.py", name=None, weight=-1.0,
    )  # fmt: skip
    both, only_b, only_a, neither, broken = scored([a, b], tmp_path, ["", "A", "B", "AB", "A!"])
    assert both == Scored(value=0.5 * 3.0 - 4.0, parts={"a": 3.0, "b": 4.0})
    assert only_b == Scored(value=-4.0, parts={"b": 4.0})
    assert only_a == Scored(value=1.5, parts={"a": 3.0})
    assert neither == Failed(kind="abstained", detail="a, b: returned None")
    assert broken == Failed(kind="exception", detail=f"b: ValueError: no at {tmp_path / 'b.py'}:4")


def test_a_sum_beyond_floats_is_not_finite(write: Write, tmp_path: Path) -> None:
    assert values(scored(write(EVALUATE, weight=10.0), tmp_path, ["1e308", "1e307"])) == ["not_finite", 1e308]


def test_sigterm_is_the_drivers_to_answer_and_ends_what_a_function_has_forked(write: Write, tmp_path: Path) -> None:
    """Ray sends it to every process below a job that is stopped, also to a worker in the middle of a call."""
    reward = write(
        """
        import os, signal, time
        def f(completion, row):
            os.kill(os.getpid(), signal.SIGTERM)
            child = os.fork()
            if not child:
                time.sleep(600)
            time.sleep(0.1)
            os.kill(child, signal.SIGTERM)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        """
    )
    assert values(scored(reward, tmp_path, ["a", "b"])) == [-15.0, -15.0]


# --- what a function is given ----------------------------------------------------------------------------------------


def test_row_survives_and_cannot_be_changed_for_others(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        def f(completion, row, *, info):
            row["list"].append(0)
            row["answer"] = None
            info["step"] += 1
            same = row["set"] == {1} and row["none"] is None
            return {"length": len(row["list"]), "step": info["step"], "tokens": info["token_count"], "same": same}
        """
    )
    row = {"answer": "2", "list": [1], "set": {1}, "none": None}
    expected = {"f/length": 2.0, "f/step": 8.0, "f/same": 1.0}
    outcomes = scored(reward, tmp_path, ["a", "bb"], row=row)
    assert outcomes == [
        Scored(value=2.0 + 8 + 1 + 1, parts={"f": 12.0, **expected, "f/tokens": 1.0}),
        Scored(value=2.0 + 8 + 2 + 1, parts={"f": 13.0, **expected, "f/tokens": 2.0}),
    ]
    assert row == {"answer": "2", "list": [1], "set": {1}, "none": None}


def test_async_functions_share_one_loop(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        import asyncio
        loops = set()
        async def f(completion, row):
            await asyncio.sleep(0)
            loops.add(id(asyncio.get_running_loop()))
            if completion == "raise":
                raise SystemExit(1)
            return len(loops) + float(completion)
        """
    )
    assert values(scored(reward, tmp_path, ["1", "raise", "2"])) == [2.0, "exception", 3.0]


def test_trl_is_given_plain_groups_and_columns(write: Write, tmp_path: Path) -> None:
    takes_all = write(
        """
        def f(prompts, completions, **columns):
            assert prompts == ["1+1="] * 3, prompts
            assert completions == ["a", "bb", ""], completions
            given = {"question": ["1+1"] * 3, "answer": ["2"] * 3, "sum": [2] * 3}
            assert {name: columns.pop(name) for name in given} == given, columns
            assert [*columns] == ["completion_ids", "trainer_state", "log_extra", "log_metric"], columns
            return [len(c) for c in completions]
        """,
        style="trl",
    )
    assert values(scored(takes_all, tmp_path, ["a", "bb", ""])) == [1.0, 2.0, 0.0]
    names = write(
        """
        async def f(completions, sum, environments=None):
            assert environments is None
            return [n + len(c) for n, c in zip(sum, completions)]
        """,
        style="trl",
    )
    assert values(scored(names, tmp_path, ["a", "bb"])) == [3.0, 4.0]


def test_trl_is_given_what_its_trainer_gives(write: Write, tmp_path: Path) -> None:
    """By name and through **kwargs; the ids are Python's own, for functions that look them up."""
    body = """
            assert completion_ids == [[97, 2], [98, 98, 2]] and type(completion_ids[0][0]) is int, completion_ids
            assert (trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch) == (12, 40, 1.5)
            log_metric("length", 1)
            log_extra(column="seen", values=["x", None])
            return [float(len(ids)) for ids in completion_ids]
    """
    by_name = write(
        f"""
        def f(completions, completion_ids, trainer_state, log_extra, log_metric):{body}
        """,
        style="trl",
    )
    outcomes = scored(by_name, tmp_path, ["a", "bb"])
    assert values(outcomes) == [2.0, 3.0]
    names = ("completion_ids", "trainer_state", "log_extra", "log_metric")
    kwargs = write(
        f"def f(completions, **kwargs):\n    return g(*map(kwargs.get, {names}))\n"
        + textwrap.dedent(f"""
        def g({", ".join(names)}):{body}
        """),
        style="trl",
    )
    assert scored(kwargs, tmp_path, ["a", "bb"]) == outcomes
    absent = write("def f(completions, trainer_state): return [trainer_state.log_history]", style="trl")
    [outcome] = scored(absent, tmp_path, ["a"])
    assert isinstance(outcome, Failed)
    assert outcome.detail.startswith(
        "f: AttributeError: trainer_state has no log_history here, only global_step, max_steps, epoch at "
    )
    none = write("def f(completions, **kwargs): return [e.score for e in kwargs['environments']]", style="trl")
    [outcome] = scored(none, tmp_path, ["a"])
    assert isinstance(outcome, Failed)
    assert outcome.detail.startswith("f: KeyError: 'environments' (style trl gives no environments) at ")


def test_a_column_does_not_hide_what_trl_gives(write: Write, tmp_path: Path) -> None:
    reward = write("def f(completion_ids, **kw): return [len(ids) for ids in completion_ids]", style="trl")
    assert values(scored(reward, tmp_path, ["aaa"], row={"completion_ids": [1]})) == [4.0]


def test_one_dimensional_arrays_are_lists_of_rewards(write: Write, tmp_path: Path) -> None:
    reward = write("import numpy, torch\ndef f(completions): return eval(completions[0])", style="trl", memory_gib=16)
    cases: dict[str, list[float | str]] = {
        "numpy.array([1, 0.25])": [1.0, 0.25], "numpy.array([True, False])": [1.0, 0.0],
        "torch.tensor([0.5, -1.0])": [0.5, -1.0], "torch.tensor([2, 3], dtype=torch.int8)": [2.0, 3.0],
        "torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)": [1.0, 2.0],
        "[torch.tensor(1.0), numpy.float32(0.5)]": [1.0, 0.5],
        "torch.tensor([float('nan'), 1.0])": ["not_finite", 1.0],
        "numpy.zeros(3)": ["wrong_count"] * 2, "numpy.zeros((2, 1))": ["wrong_type"] * 2,
        "torch.tensor(1.0)": ["wrong_type"] * 2, "numpy.array(['a', 'b'])": ["wrong_type"] * 2,
    }  # fmt: skip
    with open_pool([reward], tmp_path) as pool:
        futures = [pool.submit(items([case, ""])) for case in cases]
        assert [values(f.result(timeout=PATIENCE_S)) for f in futures] == list(cases.values())


# --- what a function logs --------------------------------------------------------------------------------------------


LOGS = """
import enum, json
class Color(enum.Enum):
    RED = 1
def f(completions, log_extra, log_metric, **kwargs):
    exec(completions[0])
    return [1.0, None]
"""


def logged(write: Write, tmp_path: Path, code: str) -> list[Logged] | str:
    """What `code` logs in a call on two completions, or how it fails."""
    first, second = scored(write(LOGS, style="trl"), tmp_path, [code, ""])
    if isinstance(first, Failed):
        assert first == second
        return f"{first.kind}: {first.detail.removeprefix('f: ')}"
    return [first.logged, second.logged]


def test_logs_come_with_their_completions_also_with_failed_ones(write: Write, tmp_path: Path) -> None:
    code = """
import numpy
log_extra("text", ["a\\ud800", "b"])
log_extra("number", numpy.array([0.5, 1.5]))
log_extra("mixed", (None, Color.RED)); log_extra("whole", [2 ** 70, numpy.int64(3)])
for _ in completions: log_extra("one by one", [[1, "x"]])
log_metric("right", 1.0); log_metric("right", numpy.float32(0)); log_metric("n", True)
"""
    assert logged(write, tmp_path, code) == [
        Logged(
            columns={"f/text": "a?", "f/number": 0.5, "f/mixed": None, "f/whole": str(2**70),
                     "f/one by one": "[1, 'x']"},
            metrics={"f/metric/right": (1.0, 2), "f/metric/n": (1.0, 1)},
        ),
        Logged(
            columns={"f/text": "b", "f/number": 1.5, "f/mixed": "Color.RED", "f/whole": 3,
                     "f/one by one": "[1, 'x']"},
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("log_extra('x', [1])", "wrong_count: log_extra('x') was given 1 values for 2 completions"),
        ("log_extra('x', [1, 2, 3])", "exception: LogError: log_extra('x') was given 3 values for 2 completions at"),
        ("log_extra('x', 'ab')", "exception: LogError: log_extra('x') needs a list of values, one per completion, not "
         "str at"),
        ("log_extra(1, [1, 2])", "exception: LogError: log_extra needs a name of 1 to 100 printable characters, not 1 "
         "at"),
        ("log_metric('', 1)", "exception: LogError: log_metric needs a name of 1 to 100 printable characters, not '' "
         "at"),
        ("log_metric('m', 'x')", "exception: LogError: log_metric('m') needs a finite number, not str 'x' at"),
        ("log_metric('m', 0 * 1e999)", "exception: LogError: log_metric('m') needs a finite number, not float nan at"),
        ("log_metric('m', 1e308), log_metric('m', 1e308)", "exception: LogError: log_metric('m') was given numbers "
         "whose sum is not finite at"),
        ("for i in range(65): log_metric(str(i), 1)", "exception: LogError: log_metric('64') is one name more than the "
         "64 that a reward may log by at"),
        ("for i in range(64): log_extra(str(i), [[chr(0x1f600) * 2000] * 2] * 2)", "exception: LogError: "
         "log_extra('21') goes beyond 1048576 bytes, more than one call may log at"),
        ("try: log_extra('x', 'ab')\nexcept Exception: pass", "exception: LogError: log_extra('x') needs a list of "
         "values, one per completion, not str"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_the_users_mistake(write: Write, tmp_path: Path, code: str, sentence: str) -> None:
    said = logged(write, tmp_path, code)
    assert isinstance(said, str)
    assert said.startswith(sentence)
    assert f"{tmp_path / 'f.py'}:6" in said or not sentence.endswith(" at")


def test_rewards_of_our_own_style_log_a_value_of_their_completion(write: Write, tmp_path: Path) -> None:
    reward = write(
        "def f(completion, row, info=None, log_extra=None, log_metric=None):\n"
        "    log_extra('read', completion.upper()); log_metric('length', len(completion))\n"
        "    return 1.0\n"
    )
    assert [outcome.logged for outcome in scored(reward, tmp_path, ["ab", "c"])] == [
        Logged(columns={"f/read": "AB"}, metrics={"f/metric/length": (2.0, 1)}),
        Logged(columns={"f/read": "C"}, metrics={"f/metric/length": (1.0, 1)}),
    ]


def test_an_error_in_a_library_is_at_the_line_of_the_reward_that_called_it(tmp_path: Path) -> None:
    """A built-in reward is itself in site-packages; an environment may be in the folder of a reward."""
    for folder in (tmp_path / "site-packages" / "grpo" / "reward_fns", tmp_path / "mine"):
        library = folder / ".venv" / "site-packages" / "library.py"
        library.parent.mkdir(parents=True)
        file = folder / "graded.py"
        names: dict[str, Any] = {}
        exec(compile("def call():\n    raise ValueError('bad')\n", str(library), "exec"), names)
        exec(compile("def score():\n    value = 1\n    return call()\n", str(file), "exec"), names)
        with pytest.raises(ValueError, match="bad") as caught:
            names["score"]()
        assert user_place(caught.value, str(file), "graded") == "graded.py:3"


def test_half_surrogate_pairs_are_replaced_in_what_a_reward_says(write: Write, tmp_path: Path) -> None:
    """No file takes them: the samples would not be written, for a completion that a function has quoted."""
    reward = write(
        "def f(completion, row):\n    if completion == 'a': raise ValueError('cannot parse \\ud83d')\n"
        "    return {'b\\ud83d': 1.0}\n"
    )
    failed, scored_one = scored(reward, tmp_path, ["a", "b"])
    assert isinstance(failed, Failed)
    assert "cannot parse ?" in failed.detail
    assert isinstance(scored_one, Scored)
    assert [*scored_one.parts] == ["f", "f/b?"]


def test_long_texts_are_cut_and_say_so(write: Write, tmp_path: Path) -> None:
    said = logged(write, tmp_path, "log_extra('x', ['a' * 2000, 'b' * 2010])")
    assert not isinstance(said, str)
    assert [one.columns["f/x"] for one in said] == ["a" * 2000, "b" * 2000 + "... (+10 characters)"]


def test_a_reward_has_64_names_for_all_of_its_calls(write: Write, tmp_path: Path) -> None:
    reward = write("def f(completions, log_metric): log_metric(completions[0], 1); return [1.0]", style="trl")
    with open_pool([reward], tmp_path) as pool:
        futures = [pool.submit(items([str(n)])) for n in (*range(64), 64, 5)]
        every = [f.result(timeout=PATIENCE_S)[0] for f in futures]
    assert values(every) == [1.0] * 64 + ["exception", 1.0]


def test_a_call_that_fails_logs_nothing_and_the_others_do(write: Write, tmp_path: Path) -> None:
    source = "def {}(completions, log_metric):\n    log_metric('m', 2)\n    return [{}]"
    fine = write(source.format("fine", "1.0"), file="fine.py", name=None, style="trl")
    broken = write(source.format("broken", "1 / 0"), file="broken.py", name=None, style="trl")
    [outcome] = scored([broken, fine], tmp_path, ["x"])
    assert isinstance(outcome, Failed)
    assert outcome.logged == Logged(metrics={"fine/metric/m": (2.0, 1)})


def test_trl_is_given_turns_when_the_prompt_has_them(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        def f(prompts, completions, **kwargs):
            turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
            assert prompts == [turns, turns], prompts
            assert [c[0]["role"] for c in completions] == ["assistant"] * 2
            prompts[0][0].clear()
            return [len(c[0]["content"]) for c in completions]
        """,
        style="trl",
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert values(scored([reward, dataclasses.replace(reward)], tmp_path, ["a", "bb"], messages=messages)) == [2.0, 4.0]


def test_trl_wrong_counts_fail_the_group_and_bad_values_their_own(write: Write, tmp_path: Path) -> None:
    reward = write("def f(prompts, completions): return eval(completions[0])", style="trl")
    cases: dict[str, list[float | str]] = {
        "[1.0]": ["wrong_count"] * 3, "[1.0] * 4": ["wrong_count"] * 3, "[]": ["wrong_count"] * 3,
        "1.0": ["wrong_type"] * 3, "None": ["wrong_type"] * 3, "'123'": ["wrong_type"] * 3,
        "{0: 1, 1: 1, 2: 1}": ["wrong_type"] * 3, "1 / 0": ["exception"] * 3,
        "[float('nan'), None, 2]": ["not_finite", "abstained", 2.0], "['1', 1, True]": ["wrong_type", 1.0, 1.0],
    }  # fmt: skip
    with open_pool([reward], tmp_path) as pool:
        futures = [pool.submit(items([case, "", ""])) for case in cases]
        assert [values(f.result(timeout=PATIENCE_S)) for f in futures] == list(cases.values())
        [first, *_] = futures[0].result()
    assert first == Failed(kind="wrong_count", detail="f: returned 1 rewards for 3 completions")


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        ({"answer": "a", "ground_truth": "g", "reward_model": {"ground_truth": "r"}}, "r"),
        ({"answer": "a", "ground_truth": "g", "reward_model": {}}, "g"),
        ({"answer": "a"}, "a"),
    ],
)
def test_verl_finds_the_ground_truth(write: Write, tmp_path: Path, row: Mapping[str, Any], truth: str) -> None:
    reward = write(
        """
        def f(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
            assert (data_source, extra_info, kwargs) == ("set", {"i": 1}, {})
            return {"score": solution_str == ground_truth, "length": 5, "text": "x", "nan": float("nan")}
        """,
        style="verl",
    )
    texts = [truth, "x"]
    outcomes = scored(reward, tmp_path, texts, row={"data_source": "set", "extra_info": {"i": 1}, **row})
    assert [(o.value, o.parts) for o in outcomes if isinstance(o, Scored)] == [
        (1.0, {"f": 1.0, "f/length": 5.0}), (0.0, {"f": 0.0, "f/length": 5.0})
    ]  # fmt: skip
    assert [{name: repr(value) for name, value in o.logged.columns.items()} for o in outcomes] == [
        {"f/text": "'x'", "f/nan": "nan"}
    ] * 2


def test_a_returned_mapping_with_a_text_is_told_the_key(write: Write, tmp_path: Path) -> None:
    verl = "; style: verl takes score as the reward and logs the others"
    for returned, style, kind, detail in (
        ("{'score': 1.0, 'pred': 'x'}", "grpo", "wrong_type", f"returned str 'x' for 'pred', not a number{verl}"),
        ("{'right': 1.0, 'form': 'x'}", "grpo", "wrong_type", "returned str 'x' for 'form', not a number"),
        ("{'right': 1.0, 'form': float('nan')}", "grpo", "not_finite", "returned nan for 'form'"),
        ("{'score': 'high', 'pred': 'x'}", "grpo", "wrong_type", "returned str 'high' for 'score', not a number"),
        ("{'score': 'high', 'pred': 'x'}", "verl", "wrong_type", "returned str 'high' for 'score', not a number"),
    ):
        parameters = "solution_str" if style == "verl" else "completion, row"
        reward = write(f"def f({parameters}): return {returned}", style=style)
        assert scored(reward, tmp_path, ["x"]) == [Failed(kind=kind, detail=f"f: {detail}")]


def test_a_reward_that_needs_more_memory_is_told_the_option(write: Write, tmp_path: Path) -> None:
    """Of one process, which gets a MemoryError, and of all that a worker has started."""
    reward = write(
        """
        import mmap, time
        def f(completion, row):
            if completion == "one":
                return float(len(bytearray(2**34)))
            shared = mmap.mmap(-1, 2**29)
            for i in range(0, 2**29, 4096):
                shared[i] = 1
            time.sleep(60)
        """,
        memory_gib=0.375,
    )
    one, shared = scored(reward, tmp_path, ["one", "shared"])
    limit = "memory_gib=0.375; if it needs more, set rewards[{}].memory_gib higher, such as 0.75"
    said = f"f: MemoryError (a worker may use {limit.format(0)}) at {tmp_path / 'f.py'}:5"
    assert one == Failed(kind="exception", detail=said)
    said = f"f: the worker and its processes used more than {limit.format('i')}"
    assert shared == Failed(kind="worker_died", detail=said)


def test_a_missing_column_is_told_with_those_of_the_row_the_nearest_first() -> None:
    row = {f"c{i}": i for i in range(12)} | {"question": "", "answer": ""}
    listed = "answer, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10 and 2 more"
    assert key_hint("f: KeyError: 'anwser' at f.py:1", row) == f"; the row has {listed}"
    assert key_hint("f: KeyError: 'anwser' at f.py:1", {}) == "; the row has none"
    for detail in ("KeyError: 'answer'", "KeyError: \"the row has no column 'anwser', only ['c0']\"", "KeyError: 3"):
        assert key_hint(detail, row) == ""
    assert (
        key_hint("KeyError: 'truth'", {"gold": {"truth": 1}})
        == '; it is inside another: columns: {truth: "{gold[truth]}"}'
    )


def test_verl_scalars_and_missing_truth(write: Write, tmp_path: Path) -> None:
    plain = write("def f(solution_str, ground_truth, scale=2.0): return scale * (solution_str == ground_truth)",
                  style="verl")  # fmt: skip
    assert values(scored(plain, tmp_path, ["2", "3"])) == [2.0, 0.0]
    [outcome] = scored(plain, tmp_path, ["2"], row={"question": "?"})
    assert outcome == Failed(
        kind="exception",
        detail="f: the row has no reward_model.ground_truth, ground_truth or answer; it has question",
    )
    no_score = write("def f(solution_str): return {'reward': 1.0}", style="verl")
    assert values(scored(no_score, tmp_path, ["2"])) == ["wrong_type"]


# --- functions that do not come back ---------------------------------------------------------------------------------


def test_a_timeout_in_the_middle_fails_alone(write: Write, tmp_path: Path) -> None:
    texts = ["1", "2", "exec('while True: pass')", "4", "time.sleep(60)", "6", "7", "8", "9", "10"]
    started = time.monotonic()
    outcomes = scored(write(EVALUATE, timeout_s=0.7), tmp_path, texts)
    assert values(outcomes) == [1.0, 2.0, "timeout", 4.0, "timeout", 6.0, 7.0, 8.0, 9.0, 10.0]
    assert outcomes[2] == Failed(kind="timeout", detail="f: ran longer than 0.7 s (timeout_s)")
    assert 1.4 <= time.monotonic() - started < 10.0


def test_the_deadline_is_of_a_call_not_of_a_job(write: Write, tmp_path: Path) -> None:
    reward = write("import time\ndef f(completion, row): time.sleep(0.25); return 1.0", timeout_s=1.0)
    assert values(scored(reward, tmp_path, ["x"] * 5)) == [1.0] * 5  # 1.25 s in one job


def test_a_trl_timeout_fails_its_group_only(write: Write, tmp_path: Path) -> None:
    source = (
        "import time\ndef f(completions): return [time.sleep(60) if c == 'hang' else float(c) for c in completions]"
    )
    with open_pool([write(source, style="trl", timeout_s=1.0)], tmp_path) as pool:
        hang, fine = pool.submit(items(["1", "hang", "3"])), pool.submit(items(["1", "2"]))
        assert values(hang.result(timeout=PATIENCE_S)) == ["timeout"] * 3
        assert values(fine.result(timeout=PATIENCE_S)) == [1.0, 2.0]


def test_a_death_is_told_by_code_or_signal_and_fails_alone(write: Write, tmp_path: Path) -> None:
    texts = [
        "1",
        "os._exit(3)",
        "3",
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "5",
        "os.closerange(3, 100)",
        "7",
        "os._exit(0)",
    ]
    outcomes = scored(write(EVALUATE), tmp_path, texts)
    died = "worker_died"
    assert values(outcomes) == [1.0, died, 3.0, died, 5.0, died, 7.0, died]
    assert [o.detail for o in outcomes if isinstance(o, Failed)] == [
        "f: the worker exited with code 3",
        "f: the worker was killed by SIGSEGV",
        "f: the worker exited with code 1",  # it could not answer
        "f: the worker exited with code 0",
    ]


def test_a_death_is_seen_although_a_grandchild_holds_the_socket(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        import os, time
        def f(completion, row):
            if os.fork() == 0:
                time.sleep(60)
            os._exit(4)
        """
    )
    started = time.monotonic()
    assert scored(reward, tmp_path, ["x"]) == [Failed(kind="worker_died", detail="f: the worker exited with code 4")]
    assert time.monotonic() - started < 10


def test_prints_go_to_the_log_and_do_not_disturb(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        import os, sys, subprocess
        def f(completion, row):
            for _ in range(2000):
                print('{"results": [{"value": 9.0, "parts": {}}]}')
            os.write(1, b"raw\\n")
            print("complaint", file=sys.stderr)
            subprocess.run(["echo", "grandchild"], check=True)
            assert sys.stdin.read() == ""
            return float(completion)
        """
    )
    assert values(scored(reward, tmp_path, ["1", "2"])) == [1.0, 2.0]
    log = (tmp_path / "logs" / "reward-worker-0.log").read_text()
    assert log.count("results") == 4000
    assert log.count("raw\n") == log.count("complaint\n") == log.count("grandchild\n") == 2


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", '{"results": [{"value": 1.0, "parts": {}}], "columns": {"a": [1, 2]}}',
     '{"results": [{"value": 1.0, "parts": {}}], "columns": {"a": [[1]]}}',
     '{"results": [{"value": 1.0, "parts": {}}], "columns": {"a\\u0007": [1]}}',
     '{"results": [{"value": 1.0, "parts": {}}], "metrics": {"a": [NaN, 1]}}',
     '{"results": [{"value": 1.0, "parts": {}}], "metrics": {"a": [1.0, 0]}}',
     '{"results": [{"value": 1.0, "parts": {}}], "metrics": [1]}',
     '{"results": 1}', '{"results": []}', '{"results": [{"value": NaN, "parts": {}}]}',
     '{"results": [{"value": 1.0, "parts": {"a": "b"}}]}', '{"results": [{"value": "1", "parts": {}}]}',
     '{"results": [{"value": 1.0}]}', '{"results": [{"failed": "whatever"}]}', '{"results": [3]}'],
)  # fmt: skip
def test_what_is_no_answer_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        parse_answer(line.encode(), "f", 1)
    with pytest.raises(ValueError):
        parse_greeting(line.encode())


def test_writing_to_the_socket_fails_the_call(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        import os, sys
        def f(completion, row):
            if completion == "forge":
                os.write(int(sys.argv[1]), b"not an answer\\n")
                import time; time.sleep(60)
            return 1.0
        """
    )
    assert values(scored(reward, tmp_path, ["x", "forge", "x"])) == [1.0, "worker_died", 1.0]


# --- the pool --------------------------------------------------------------------------------------------------------


def test_groups_from_many_threads_large_and_small(write: Write, tmp_path: Path) -> None:
    reward = write("def f(completion, row): return len(completion) + row['i']")
    sizes = [0, 1, 7, 8, 9, 33]
    with open_pool([reward], tmp_path, workers=2) as pool:
        futures: dict[tuple[int, int], Future[list[Scored | Failed]]] = {}

        def submit(i: int) -> None:
            for size in sizes:
                futures[i, size] = pool.submit(items(["x" * n for n in range(size)], row={"i": i}))

        threads = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        big = pool.submit(items(["x" * 1_000_000] * 16, row={"i": 0.5, "pad": "y" * 3_000_000}))
        for (i, size), future in futures.items():
            assert values(future.result(timeout=PATIENCE_S)) == [float(n + i) for n in range(size)]
        assert values(big.result(timeout=PATIENCE_S)) == [1_000_000.5] * 16


def test_a_thousand_completions_take_a_moment(tmp_path: Path) -> None:
    reward = RewardConfig(file=str(ROOT / "reward_fns" / "arithmetic.py"))
    with open_pool([reward], tmp_path, workers=2) as pool:
        pool.submit(items(["2"] * 64)).result(timeout=PATIENCE_S)
        durations = [math.inf]
        while min(durations) >= 0.2 and len(durations) < 50:  # the best of many: other processes may be at work
            started = time.monotonic()
            futures = [pool.submit(items(["2", " 2\n", "3", ""] * 5)) for _ in range(50)]
            outcomes = [o for future in futures for o in future.result(timeout=PATIENCE_S)]
            durations.append(time.monotonic() - started)
            assert values(outcomes) == [1.0, 1.0, 0.0, 0.0] * 250
    assert min(durations) < 0.2, durations


def test_one_row_per_group(tmp_path: Path, write: Write) -> None:
    with open_pool([write(EVALUATE)], tmp_path) as pool, pytest.raises(ValueError, match="one row"):
        pool.submit([*items(["1"]), *items(["1"], row={"answer": "3"})])


def test_close_leaves_nobody_and_ends_every_wait(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        import subprocess, time
        def f(completion, row):
            subprocess.Popen(["sleep", "600"])
            time.sleep(600)
        """
    )
    pool = open_pool([reward], tmp_path, workers=2)
    futures = [pool.submit(items(["x"] * 20)) for _ in range(3)]
    until = time.monotonic() + 30
    children: list[psutil.Process] = []
    while time.monotonic() < until and len(children) < 6:  # two reapers, two workers and what each has started
        children = psutil.Process().children(recursive=True)
        time.sleep(0.05)
    assert len(children) == 6
    futures[2].cancel()
    pool.close()
    pool.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=1)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(items(["x"]))


@pytest.mark.parametrize("struck", ["driver", "reaper"])
def test_nothing_outlives_a_killed_driver_or_reaper(struck: str, write: Write, tmp_path: Path) -> None:
    """The function has started a process that has left its session, its parent and its environment."""
    hang = write(DAEMON + "import time\ndef f(completion, row):\n    daemon()\n    time.sleep(600)\n")
    code = f"""
import sys, time
from pathlib import Path
from grpo.config import RewardConfig
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
pool = RewardPool([RewardConfig(file={hang.file!r}, name="f")], files=[Path({hang.file!r})], workers=1,
                  log_dir=Path({str(tmp_path)!r}))
pool.submit([RewardItem(completion="x", row={{}}, messages=None, info={{}}, dataset="d")])
time.sleep(600)
"""
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        below: dict[str, psutil.Process] = {}
        until = time.monotonic() + PATIENCE_S
        while "daemon" not in below and time.monotonic() < until:
            time.sleep(0.2)
            every = [(p, " ".join(p.cmdline())) for p in psutil.Process(driver.pid).children(recursive=True)]
            known = {"reaper.py": "reaper", "worker.py": "worker", "os.setsid()": "daemon"}
            below = {name: p for p, command in every for word, name in known.items() if word in command}
            if "daemon" in below and below["daemon"].ppid() != below["reaper"].pid:  # it has not detached itself yet
                del below["daemon"]
        assert below.keys() == {"reaper", "worker", "daemon"}
        if struck == "reaper":  # that takes the worker with it; what it kept goes to the driver's side
            below.pop("daemon").kill()
        below["reaper"].kill() if struck == "reaper" else driver.kill()
        _, alive = psutil.wait_procs(below.values(), timeout=10)
        assert alive == []
    finally:
        driver.kill()
        driver.wait()


def test_a_worker_that_is_killed_while_it_loads_is_started_again(write: Write, tmp_path: Path) -> None:
    """The files have loaded before: the second and third worker die of something else."""
    marks = tmp_path / "marks"
    marks.mkdir()
    reward = write(
        f"""
        import os, pathlib
        marks = pathlib.Path({str(marks)!r})
        (marks / str(len(list(marks.iterdir())))).touch()
        if len(list(marks.iterdir())) in (2, 3):
            os.kill(os.getpid(), 9)
        def f(completion, row):
            return 1.0 if completion else os._exit(1)
        """
    )
    assert values(scored(reward, tmp_path, ["x", "", "x"])) == [1.0, "worker_died", 1.0]
    assert len(list(marks.iterdir())) == 4


def test_workers_keep_the_environment_that_the_pool_was_made_in(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started while another thread changes the environment, a child may find none at all and not start (EFAULT)."""
    reward = write(
        "import os\ndef f(completion, row): return float('LATER' in os.environ) if completion else os._exit(1)"
    )
    with RewardPool([reward], files=[Path(reward.file)], workers=1, log_dir=tmp_path) as pool:
        monkeypatch.setenv("LATER", "1")
        assert values(pool.submit(items(["", "x"])).result(timeout=PATIENCE_S)) == ["worker_died", 0.0]


def test_an_edited_file_changes_nothing_in_a_started_run(write: Write, tmp_path: Path) -> None:
    reward = write("import os\ndef f(completion, row): return 1.0 if completion else os._exit(1)")
    with open_pool([reward], tmp_path) as pool:
        assert values(pool.submit(items(["x"])).result(timeout=PATIENCE_S)) == [1.0]
        Path(reward.file).write_text("def f(completion, row): return 2.0")
        assert values(pool.submit(items(["", "x"])).result(timeout=PATIENCE_S)) == ["worker_died", 1.0]


def test_a_pool_whose_files_do_not_load_says_so_to_everyone(write: Write, tmp_path: Path) -> None:
    with open_pool([write("import missing_module")], tmp_path) as pool:
        with pytest.raises(UserError, match="ModuleNotFoundError"):
            pool.submit(items(["x"])).result(timeout=PATIENCE_S)
        with pytest.raises(UserError, match="ModuleNotFoundError"):
            pool.submit(items(["x"]))


def test_the_worker_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "asyncio", "omegaconf", "grpo.types", "grpo.config"}
    code = f"import sys, grpo.rewards.worker; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_working_directory_hides_nothing_but_can_be_imported(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("json", "grpo", "fractions"):
        Path(f"{name}.py").write_text("raise SystemExit")
    Path("mine.py").write_text("VALUE = 0.5")
    reward = write("import fractions, mine\ndef f(completion, row): return fractions.Fraction(1, 2) + mine.VALUE")
    assert values(scored(reward, tmp_path, ["x"])) == [1.0]


def test_a_worker_runs_its_own_code_and_a_reward_may_import_another_grpo(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "grpo.py").write_text("VALUE = 0.25")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))
    reward = write("import grpo\ndef f(completion, row): return grpo.VALUE")
    assert values(scored(reward, tmp_path, ["x"])) == [0.25]


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "source", "sentence"),
    [
        ("grpo", "def f(completion, row):\n    x = (1\n", "rewards[0]: {file}:2: SyntaxError: '(' was never closed"),
        ("grpo", "import os\nimport nowhere", "rewards[0]: {file}:2: ModuleNotFoundError: No module named 'nowhere'"),
        ("grpo", "\n\nimport sys; sys.exit('bye')", "rewards[0]: {file}:3: SystemExit: bye"),
        ("grpo", "import os; os._exit(5)", "rewards[0]: {file}: loading it ended the worker, which exited with code 5"),
        ("grpo", "while True: pass", "rewards[0]: {file}: loading it took longer than 0.5 s"),
        ("grpo", "def ff(completion, row): pass", "rewards[0]: {file} has no function f; did you mean ff?"),
        ("grpo", "def other(completion, row): pass", "rewards[0]: {file} has no function f; it has other"),
        (
            "grpo",
            "\ndef f(completion): pass",
            "rewards[0]: {file}:2: f(completion) does not fit style grpo, which gives (completion, row, info, "
            "log_extra, log_metric): too many positional arguments",
        ),
        (
            "grpo",
            "def f(completion, answer): return float(completion == answer)",
            "rewards[0]: {file}:1: f(completion, answer): the second argument is the whole row, not the gold answer: "
            "call it row, and use row[COLUMN]",
        ),
        (
            "grpo",
            "def f(completion, row, truth): pass",
            "rewards[0]: {file}:1: f(completion, row, truth) does not fit style grpo, which gives "
            "(completion, row, info, log_extra, log_metric): missing a required argument: 'truth'",
        ),
        (
            "grpo",
            "def f(prompts, completions, **kwargs): pass",
            "rewards[0]: {file}:1: f(prompts, completions, **kwargs) is written for trl; set its style: trl",
        ),
        (
            "trl",
            "def f(prompts, completions, environments): pass",
            "rewards[0]: {file}:1: f asks for environments, which is not supplied; give it a default",
        ),
        (
            "trl",
            "def f(prompts, completions, completions_ids): pass",
            "rewards[0]: {file}:1: f asks for completions_ids, which is not a column of the rows; did you mean "
            "completion_ids?; they have question, answer",
        ),
        (
            "trl",
            "def f(prompts, completions, anwser): pass",
            "rewards[0]: {file}:1: f asks for anwser, which is not a column of the rows; did you mean answer?; "
            "they have answer, question",
        ),
        (
            "verl",
            "def f(solution_str, truth): pass",
            "rewards[0]: {file}:1: f(solution_str, truth) does not fit style verl, which gives (data_source, "
            "solution_str, ground_truth, extra_info): missing a required argument: 'truth'",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(write: Write, style: Any, source: str, sentence: str) -> None:
    reward = write(source, style=style)
    limit = 0.5 if "while True" in source else 30.0
    with pytest.raises(UserError) as caught:
        check_loads([reward], [Path(reward.file)], columns=[["question", "answer"]], deadline_s=limit)
    assert str(caught.value) == sentence.format(file=reward.file)


def test_loading_names_the_reward_and_the_file_at_fault(write: Write, tmp_path: Path) -> None:
    good = write(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Record:\n    a: int\n"
        "def good(completion, row): return 1.0\n",
        file="good.py", name=None,
    )  # fmt: skip
    (tmp_path / "beside.py").write_text("\n\nx = [\n")
    bad = write("import beside\ndef bad(completion, row): return 1.0", file="bad.py", name=None)
    check_loads([good], [Path(good.file)])
    with pytest.raises(UserError) as caught:
        check_loads([good, bad], [Path(good.file), Path(bad.file)])
    assert str(caught.value) == f"rewards[1]: {tmp_path / 'beside.py'}:3: SyntaxError: '[' was never closed"
    with pytest.raises(UserError, match=r"rewards\[0\]: .*gone.py cannot be read: No such file"):
        check_loads([dataclasses.replace(good, file="gone.py")], [tmp_path / "gone.py"])


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "base/recipes", "base/reward_fns"):
        (tmp_path / place).mkdir(parents=True)
    recipe = tmp_path / "base" / "recipes" / "r.yaml"
    above, beside = tmp_path / "base/reward_fns/x.py", tmp_path / "base/recipes/y.py"
    above.touch()
    beside.touch()
    monkeypatch.chdir(tmp_path / "here")
    rewards = [RewardConfig(file=f) for f in ("reward_fns/x.py", "y.py", str(above))]
    assert [p.resolve() for p in locate(rewards, recipe)] == [above, beside, above]
    (tmp_path / "here" / "y.py").touch()
    assert locate(rewards[1:2], recipe)[0].resolve() == tmp_path / "here" / "y.py"
    with pytest.raises(UserError) as caught:
        locate([rewards[0], RewardConfig(file="reward_fns/xx.py")], recipe)
    assert str(caught.value) == f"rewards[1].file=reward_fns/xx.py does not exist; did you mean {above}?"
    with pytest.raises(
        UserError, match=r"xx.py does not exist; change to the directory in which the run was started, or give"
    ):
        locate([RewardConfig(file="reward_fns/xx.py")], tmp_path / "runs" / "a" / "config.yaml")
    with pytest.raises(UserError, match=r"rewards\[0\]\.file=\.\. is a folder"):
        locate([RewardConfig(file="..")], recipe)


# --- trying out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [("12", "23"), ("-9.0 m", "-0.1 m"), ("Paris", "Qbsjt"), ("zZ", "Aa"), ("", "x"), ("²", "²x"), ("a1", "a2")],
)
def test_corrupt(answer: str, wrong: str) -> None:
    assert corrupt(answer) == wrong


def tried(
    reward: RewardConfig, tmp_path: Path, rows: Sequence[Mapping[str, Any]] = (ROW,), **options: Any
) -> list[str]:
    prompts = [prompt(row, "d", i + 1) for i, row in enumerate(rows)]
    settings: dict[str, Any] = {
        "gold_template": "{answer}", "answer_column": "answer", "unsampled": UNSAMPLED, **options
    }  # fmt: skip
    return try_out([reward], [Path(reward.file)], {"data.train": prompts}, log_dir=tmp_path, **settings)


def test_a_gold_answer_that_scores_passes(write: Write, tmp_path: Path) -> None:
    exact = RewardConfig(file=str(ROOT / "reward_fns" / "arithmetic.py"), gold=True, weight=-1.0)
    rows = [{"answer": "14"}, {"answer": 5}]
    assert tried(exact, tmp_path, rows) == ["arithmetic on data.train: gold 1, corrupted 0 on 2 rows"]
    own = write("def f(completion, row): return completion == row['backwards']", gold=True)
    assert tried(own, tmp_path, [{"backwards": "04", "answer": "40"}], answer_column="backwards") == [
        "f on data.train: gold 1, corrupted 0 on 1 rows"  # {answer} is the gold answer, whatever its column is called
    ]
    assert tried(own, tmp_path, [{"backwards": "04"}], answer_column="backwards") == [
        "f on data.train: gold 1, corrupted 0 on 1 rows"
    ]
    with pytest.raises(UserError, match=r"KeyError\('x'\); it may name answer, .* and the columns backwards"):
        tried(own, tmp_path, [{"backwards": "04"}], answer_column="backwards", gold_template="{x}")
    boxed = write("def f(completion, row): return completion == f'[{row[\"sum\"]:03d}]'", gold=True)
    assert tried(boxed, tmp_path, [{"sum": 7}], gold_template="[{sum:03d}]", answer_column="sum") == [
        "f on data.train: gold 1, corrupted 0 on 1 rows"
    ]
    grouped = write(
        "def f(completions, answer):\n    assert len(completions[0])\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]", style="trl", gold=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="AssertionError"):  # fails on the empty completion, so on the whole group
        tried(grouped, tmp_path)
    assert tried(write("def f(completion, row): return None or None"), tmp_path, [ROW, ROW]) == [
        "f on data.train: warning: it returned None (abstained) on each of the 2 rows tried; a completion that no "
        "reward scores counts as failed"
    ]
    for body in ("pass", "\n    number = 1.0\n    return"):
        with pytest.raises(UserError, match=r"\.py:2: f has no return statement with a value, so it gives no reward"):
            tried(write(f"\ndef f(completion, row): {body}"), tmp_path, [ROW])
    some = write("def f(completion, row): return 1.0 if completion else None")
    assert tried(some, tmp_path) == ["f on data.train: ran on 1 rows"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("return 0.0", "gives the gold answer '2' 0, the corrupted '3' 0 and an empty completion 0"),
        ("return 1.0", "gives the gold answer '2' 1, the corrupted '3' 1 and an empty completion 1"),
        ("return -1.0 if completion == '2' else -2.0", "gives the gold answer '2' -1, the corrupted '3' -2"),
        ("return None if completion == '3' else 1.0", "the corrupted '3' abstained (f: returned None)"),
        ("return 1 / 0 if completion == '2' else 0.0", "the gold answer '2' exception (f: ZeroDivisionError"),
    ],
)
def test_a_gold_answer_that_does_not_stand_out_is_refused(write: Write, tmp_path: Path, source: str, said: str) -> None:
    reward = write(f"def f(completion, row): {source}", gold=True)
    with pytest.raises(UserError) as caught:
        tried(reward, tmp_path)
    assert str(caught.value).startswith("rewards[0]: f on data.train gives the gold answer '2' ")
    assert said in str(caught.value)
    assert "on d.jsonl:1: {'question': '1+1'" in str(caught.value)
    assert str(caught.value).endswith("to turn the test off: rewards.0.gold=false)")


def test_the_gold_answer_stands_behind_reasoning_that_the_prompt_has_begun() -> None:
    plain = prompt(ROW, "d", 1)
    begun = dataclasses.replace(plain, text="1+1<think>\n")
    for given, template, written in (
        (plain, "{answer}", "2"), (begun, "{answer}", "</think>2"), (begun, "so</think>{answer}", "so</think>2"),
    ):  # fmt: skip
        assert golds_module.gold_text(given, "rewards[0]", template, "answer") == written
        corrupted = golds_module.gold_text(given, "rewards[0]", template, "answer", corrupted=True)
        assert corrupted == written.replace("2", "3")


def test_a_corrupted_number_stays_a_number() -> None:
    given = prompt({"question": "1+1", "answer": 1.95}, "d", 1)
    template = "{answer:.1f} or {answer}"
    assert golds_module.gold_text(given, "rewards[0]", template, "answer") == "1.9 or 1.95"
    assert golds_module.gold_text(given, "rewards[0]", template, "answer", corrupted=True) == "2.1 or 2.06"


def test_rewards_that_fail_on_every_row_are_refused(write: Write, tmp_path: Path) -> None:
    good = write("def good(completion, row): return 1.0", file="good.py", name=None)
    source = "def bad(completion, row): return 1.0 if row['answer'] == completion else row['missing']"
    bad = write(source, file="bad.py", name=None)
    prompts = [prompt(ROW, "d", 1), prompt(ROW, "d", 2)]
    options: Any = {
        "gold_template": "{answer}", "answer_column": "answer", "unsampled": UNSAMPLED, "log_dir": tmp_path
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        try_out([good, bad], [Path(good.file), Path(bad.file)], {"data.train": prompts}, **options)
    assert str(caught.value) == (
        "rewards[1]: bad on data.train fails on every row tried; the first: d.jsonl:1: exception: bad: KeyError: "
        f"'missing' at {tmp_path / 'bad.py'}:1; the row has question, answer, sum"
    )
    fitting = [*prompts, prompt({"answer": "", "question": "", "missing": 0}, "d", 3)]
    assert try_out([bad], [Path(bad.file)], {"data.train": fitting}, **options) == [
        "bad on data.train: warning: ran on 1 of 3 rows tried; failed on d.jsonl:1: exception: bad: KeyError: "
        f"'missing' at {tmp_path / 'bad.py'}:1; the row has question, answer, sum"
    ]
    with pytest.raises(UserError, match=r"bad on data\.eval\.sets\[0\] fails on every row"):
        try_out([bad], [Path(bad.file)], {"data.train": fitting, "data.eval.sets[0]": prompts}, **options)
    with pytest.raises(UserError, match=r"timeout: f: ran longer than 0\.5 s"):
        tried(write("def f(completion, row):\n    while True: pass", timeout_s=0.5), tmp_path, [ROW] * 8)


def test_rewards_that_fail_on_some_rows_are_told_with_the_first(write: Write, tmp_path: Path) -> None:
    some = write("def f(completion, row): return 1 / row['n']")
    assert tried(some, tmp_path, [{"n": n} for n in (1, 1, 0, 1, 0)]) == [
        "f on data.train: warning: ran on 3 of 5 rows tried; failed on d.jsonl:3: exception: f: ZeroDivisionError: "
        f"division by zero at {some.file}:1"
    ]
    assert tried(some, tmp_path, [{"n": n} for n in (1, 2)]) == ["f on data.train: ran on 2 rows"]
    slow = write("def f(completion, row):\n    while row['n']: pass\n    return 1.0", timeout_s=0.5)
    [said] = tried(slow, tmp_path, [{"n": n} for n in (0, 1, 0)])
    assert said.startswith("f on data.train: warning: ran on 1 of 2 rows tried; failed on d.jsonl:2: timeout: ")
    shy = write("def f(completion, row): return None if row['n'] else row['m']")
    [said] = tried(shy, tmp_path, [{"n": n} for n in (1, 0)])
    assert said.startswith("f on data.train: warning: ran on 1 of 2 rows tried; failed on d.jsonl:2: exception: ")


@pytest.mark.parametrize(
    ("source", "declared"),
    [
        ("GOLD = True\n", True), ("GOLD: bool = True", True), ("x = 1\nGOLD = True  # why\n", True),
        ("GOLD = False\n", False), ("GOLD = 1\n", False), ("def f(completion, row):\n    GOLD = True\n", False),
        ("# GOLD = True\n", False), ("'GOLD = True'\n", False), ("", False), ("GOLD = True\ndef f(:\n", False),
        ("raise SystemExit\nGOLD = True\n", True), ("\0", False),
    ],
)  # fmt: skip
def test_a_file_declares_that_it_compares_with_gold(tmp_path: Path, source: str, declared: bool) -> None:
    (tmp_path / "f.py").write_text(source)
    assert declares_gold(tmp_path / "f.py") is declared


def test_which_graders_declare_it() -> None:
    files = sorted((ROOT / "reward_fns").glob("*.py"))
    assert [file.stem for file in files if declares_gold(file)] == [
        "arithmetic", "gsm8k", "math_answer", "multiple_choice"
    ]  # fmt: skip


def test_gold_needs_its_column_and_template(write: Write, tmp_path: Path) -> None:
    reward = write("def f(completion, row): return 1.0", gold=True)
    with pytest.raises(
        UserError, match=r"rewards\[0\]: f on data\.train has gold: true, .* data\.answer_column=answer is no column"
    ):
        tried(reward, tmp_path, [{"solution": "2"}])
    with pytest.raises(UserError, match=r"data\.gold_template='\{anwser\}' does not fit d\.jsonl:1: KeyError"):
        tried(reward, tmp_path, gold_template="{anwser}")


def test_a_try_out_knows_the_ids_and_where_the_run_stands(write: Write, tmp_path: Path) -> None:
    reward = write(
        """
        def f(completions, completion_ids, trainer_state):
            assert (trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch) == (0, 40, 0.0)
            return [float(ids == [*map(ord, c), 2]) for c, ids in zip(completions, completion_ids)]
        """,
        style="trl", gold=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="gives the gold answer '2' 1, the corrupted '3' 1"):
        tried(reward, tmp_path)
    plain = write("def f(completion, row, info): return float(info['token_count'] == len(completion) + 1)")
    assert tried(plain, tmp_path) == ["f on data.train: ran on 1 rows"]
    bad = write("def f(completions, log_extra): log_extra('x', [1]); return [1.0] * len(completions)", style="trl")
    with pytest.raises(UserError, match=r"fails on every row tried; .*log_extra\('x'\) was given 1 values for 2 compl"):
        tried(bad, tmp_path)


@pytest.mark.parametrize(
    ("style", "source", "row", "said"),
    [
        ("grpo", "def f(completion, row, info=None): return 1.0", ROW, []),
        ("grpo", "def f(completion, row, scale=1.0, *rest, judge=None): return 1.0", ROW,
         ["f: style grpo: the default is kept for scale, judge"]),
        ("trl", "def f(completions, answer=None, log_extra=None, **kw): return [1.0 for _ in completions]", ROW,
         ["f: style trl: no environments; trainer_state has global_step, max_steps, epoch"]),
        ("trl", "def f(completions, anwser=None, environments=None): return [1.0 for _ in completions]", ROW,
         ["f: style trl: no environments; trainer_state has global_step, max_steps, epoch; the default is kept for "
          "anwser, environments"]),
        ("verl", "def f(data_source, solution_str, ground_truth, extra_info=None): return 1.0",
         {"data_source": "d", "answer": "1", "extra_info": {"index": 0}},
         ["f: style verl: extra_info has no num_turns and rollout_reward_scores"]),
        ("verl", "def f(data_source, solution_str, ground_truth, extra_info=None, method='strict'):\n"
         "    assert extra_info == {} and data_source is None\n    return 1.0", {"answer": "1", "extra_info": None},
         ["f: style verl: extra_info has no num_turns and rollout_reward_scores; data_source is None on 2 of 2 rows, "
          "which have no such column; extra_info is empty on 2 of 2 rows, which have no such column; the default is "
          "kept for method"]),
    ],
)  # fmt: skip
def test_what_a_style_does_not_give_is_said(
    write: Write, tmp_path: Path, style: Any, source: str, row: Mapping[str, Any], said: list[str]
) -> None:
    assert tried(write(source, style=style), tmp_path, [row] * 2) == [*said, "f on data.train: ran on 2 rows"]


SECRET = {"JUDGE_API_KEY": "key-31415", "SOME_DSN": "dsn-31415"}
WITHHELD = "rewards do not see JUDGE_API_KEY, which looks like a secret; rewards[1].env: [JUDGE_API_KEY] passes it on"


@pytest.mark.parametrize(
    "source",
    [
        "key = os.environ['JUDGE_API_KEY']\ndef bad(completion, row): return 1.0",
        "def bad(completion, row): return float(os.environ['JUDGE_API_KEY'] != '')",
        "def bad(completion, row): return len('Bearer ' + os.getenv('JUDGE_API_KEY'))",
        "def bad(completion, row): raise RuntimeError(f'set {\"JUDGE_API\"}_KEY or api_key=')",
    ],
)
def test_a_secret_that_is_kept_from_a_reward_is_named_with_its_option(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    for name, value in SECRET.items():
        monkeypatch.setenv(name, value)
    good = write("def good(completion, row): return 1.0", file="good.py", name=None)
    bad = write(f"import os\n{source}", file="bad.py", name=None)
    options: Any = {
        "gold_template": "{answer}", "answer_column": "answer", "unsampled": UNSAMPLED, "log_dir": tmp_path
    }  # fmt: skip
    prompts = {"data.train": [prompt(ROW, "d", 1)]}
    with pytest.raises(UserError) as caught:
        try_out([good, bad], [Path(good.file), Path(bad.file)], prompts, **options)
    assert str(caught.value).count(WITHHELD) == 1
    assert "31415" not in str(caught.value)
    if "raise" not in source:
        given = dataclasses.replace(bad, env=("JUDGE_API_KEY",))
        lines = try_out([good, given], [Path(good.file), Path(bad.file)], prompts, **options)
        assert lines[1:] == ["bad on data.train: ran on 1 rows"]


def test_a_secret_that_a_reward_names_and_does_without_is_in_the_plan(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "key-31415")
    reward = write("import os\ndef f(completion, row): return float('JUDGE_API_KEY' in os.environ)")
    [warning, _] = tried(reward, tmp_path)
    assert warning == f"f: warning: {WITHHELD.replace('[1]', '[0]')}"
    monkeypatch.delenv("JUDGE_API_KEY")  # what is not set is not kept back
    assert tried(reward, tmp_path) == ["f on data.train: ran on 1 rows"]


def test_a_secret_is_named_in_the_middle_of_a_run(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "key-31415")
    reward = write("import os\ndef f(completion, row): return len(os.environ['JUDGE_API_KEY'])")
    [outcome] = scored(reward, tmp_path, ["x"])
    assert isinstance(outcome, Failed)
    assert outcome.detail == (f"f: KeyError: 'JUDGE_API_KEY' ({WITHHELD.replace('[1]', '[0]')}) at {reward.file}:2")
    assert values(scored(dataclasses.replace(reward, env=("JUDGE_API_KEY",)), tmp_path, ["x"])) == [9.0]


# --- data sets -------------------------------------------------------------------------------------------------------


def test_a_reward_scores_the_rows_of_its_sets_and_abstains_on_others(write: Write, tmp_path: Path) -> None:
    one = write("def one(completion, row): return 1.0", file="one.py", name=None, sets=("a", "b"))
    two = write("def two(completions, **kw): return [2.0 for _ in completions]", file="two.py", name=None, sets=("b",),
                style="trl", weight=10.0)  # fmt: skip
    with open_pool([one, two], tmp_path) as pool:
        outcomes = {name: pool.submit(items(["x", "y"], dataset=name)).result(timeout=PATIENCE_S) for name in "abc"}
    assert outcomes["a"] == [Scored(value=1.0, parts={"one": 1.0})] * 2
    assert outcomes["b"] == [Scored(value=21.0, parts={"one": 1.0, "two": 2.0})] * 2
    assert values(outcomes["c"]) == ["abstained"] * 2


def prompt(row: Mapping[str, Any], dataset: str, place: int) -> Prompt:
    return Prompt(prompt_id=f"{dataset}:{place}:h", token_ids=(1,), text="q", row=row, messages=None, dataset=dataset,
                  where=f"{dataset}.jsonl:{place}")  # fmt: skip


def golds(reward: RewardConfig, tmp_path: Path, sets: Mapping[str, Sequence[Mapping[str, Any]]], **options: Any) -> Any:
    prompts = {name: [prompt(row, name, i + 1) for i, row in enumerate(rows)] for name, rows in sets.items()}
    settings: dict[str, Any] = {
        "gold_template": "{answer}", "answer_column": "answer", "unsampled": UNSAMPLED, "workers": 2,
        "say": lambda text: None, **options,
    }  # fmt: skip
    return try_golds([reward], [Path(reward.file)], prompts, log_dir=tmp_path, **settings)


READS_NUMBERS = """
def f(completion, row):
    gold = int(row["answer"])
    return None if gold == 9 else float(int(completion) == gold and gold < 7)
"""


def test_every_gold_answer_is_tried(write: Write, tmp_path: Path) -> None:
    reward = write(READS_NUMBERS, gold=True)
    rows = [{"answer": str(i % 7)} for i in range(600)]
    assert golds(
        reward, tmp_path, {"a": rows, "b": [*rows[:3], {"answer": "8"}, {"answer": "9"}, {"answer": "7"}]}
    ) == [
        "f on a: 600 of 600 gold answers score above 0",
        "f on b: warning: 3 of 6 gold answers score above 0; not those of b.jsonl:4, b.jsonl:5, b.jsonl:6",
    ]
    [many] = golds(reward, tmp_path, {"a": [{"answer": "8"}] * 12})
    assert many.endswith("a.jsonl:9, a.jsonl:10 and 2 more")
    other = dataclasses.replace(reward, sets=("b",))
    assert [line[:7] for line in golds(other, tmp_path, {"a": [{"answer": "x"}], "b": rows})] == ["f on b:"]
    assert golds(dataclasses.replace(reward, gold=False), tmp_path, {"a": [{"answer": "x"}]}) == []


def test_a_gold_answer_that_cannot_be_read_is_an_error_that_names_its_row(write: Write, tmp_path: Path) -> None:
    reward = write(READS_NUMBERS, gold=True)
    rows = [{"answer": str(i % 7)} for i in range(600)]
    with pytest.raises(UserError) as caught:
        golds(reward, tmp_path, {"a": [*rows, {"answer": "n/a"}, *rows]})
    assert str(caught.value).startswith("rewards[0]: f on a cannot read the gold answer of a.jsonl:601: exception: f: ")
    assert str(caught.value).endswith(
        "; correct the data, or turn the test off: rewards.0.gold=false (completions of such rows are then Failed and "
        "left out of averages)"
    )
    assert "invalid literal for int() with base 10: 'n/a'" in str(caught.value)
    calls = tmp_path / "calls"
    counting = write(f"def f(completion, row): open({str(calls)!r}, 'a').write('.'); return 1 / 0", gold=True)
    with pytest.raises(UserError) as caught:
        golds(counting, tmp_path, {"a": rows * 10})
    assert str(caught.value).count("ZeroDivisionError") == 3  # the first few
    assert len(calls.read_text()) < 2000  # and the rest is not tried
    slow = write("def f(completion, row):\n    while True: pass", gold=True, timeout_s=0.3)
    with pytest.raises(UserError, match=r"a\.jsonl:1: timeout"):
        golds(slow, tmp_path, {"a": rows[:1]})
    with pytest.raises(UserError, match=r"data\.answer_column=answer is no column of a\.jsonl:6: \{'gold': 1\}"):
        golds(reward, tmp_path, {"a": [*rows[:5], {"gold": 1}]})


def test_of_large_sets_an_even_share_of_the_golds_is_tried(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golds_module, "MAX_GOLDS", 4)
    monkeypatch.setattr(golds_module, "SAY_EVERY_S", 0.0)
    said: list[str] = []
    reward = write("def f(completion, row): return float(row['n'] in (0, 2, 5))", gold=True)
    assert golds(reward, tmp_path, {"a": [{"answer": "7", "n": i} for i in range(10)]}, say=said.append) == [
        "f on a: warning: 3 of 4 gold answers score above 0 (of 10 rows, evenly spread); not those of a.jsonl:8"
    ]
    assert said[-1] == "rewards[0]: f on a: 4 of 4 gold answers scored"
    assert golds_module.evenly_spread(range(10), 10) == range(10)
    assert golds_module.evenly_spread(range(10), 3) == [0, 3, 6]


def test_rewards_are_tried_on_the_sets_that_they_are_for(write: Write, tmp_path: Path) -> None:
    one = write("def one(completion, row): return float(row['x'])", file="one.py", name=None, sets=("a",))
    two = write("def two(completions, x): return [None for _ in x]", file="two.py", name=None, style="trl")
    samples = {name: [prompt({"x": 1, name: 2}, name, 1)] for name in "ab"}
    options: Any = {
        "gold_template": "{answer}", "answer_column": "answer", "unsampled": UNSAMPLED, "log_dir": tmp_path
    }  # fmt: skip
    assert try_out([one, two], [Path(one.file), Path(two.file)], samples, **options) == [
        "one on a: ran on 1 rows",
        "two: style trl: no environments; trainer_state has global_step, max_steps, epoch",
        "two on a: warning: it returned None (abstained) on each of the 1 rows tried; a completion that no reward "
        "scores counts as failed",
        "two on b: warning: it returned None (abstained) on each of the 1 rows tried; a completion that no reward "
        "scores counts as failed",
    ]
    asks = write("def asks(completions, b): return [1.0 for _ in b]", file="asks.py", name=None, style="trl")
    with pytest.raises(UserError, match="asks asks for b, which is not a column of the rows"):
        try_out([asks], [Path(asks.file)], samples, **options)
    own = dataclasses.replace(asks, sets=("b",))
    assert try_out([own], [Path(own.file)], samples, **options)[1:] == ["asks on b: ran on 1 rows"]
