"""The alarms of the viewer, on made metrics: each at its threshold, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_run import make_run, sample, write_metrics, write_samples

from grpo import config as config_module
from grpo.view import alarms
from grpo.view.alarms import Alarm, alarms_of
from grpo.view.api import open_paths

GOOD = {
    "group/count": 2.0, "group/no_spread_fraction": 0.0, "group/all_right_fraction": 0.0, "reward/mean": 0.5,
    "reward/min": 0.0, "reward/max": 1.0, "completion/truncated_fraction": 0.0, "completion/tokens_mean": 100.0,
    "optim/grad_norm": 1.0, "policy/entropy": 1.0, "mismatch/q99": 0.01, "staleness/mean": 0.0,
    "reward/failed_fraction": 0.0, "reward_part/judge/min": 0.0, "reward_part/judge/max": 1.0,
}  # fmt: skip


def run_of(count: int, changes: dict[int, dict[str, float]] | None = None) -> list[dict[str, float]]:
    """The lines of `count` good steps, with changes by step."""
    return [{"step": float(step), **GOOD, **(changes or {}).get(step, {})} for step in range(1, count + 1)]


def during(steps: range, **values: float) -> dict[int, dict[str, float]]:
    return {step: {name.replace("__", "/"): value for name, value in values.items()} for step in steps}


def found(lines: list[dict[str, float]]) -> dict[str, Alarm]:
    return {alarm.kind: alarm for alarm in alarms_of(None, lines)}


def test_a_good_run_has_no_alarm() -> None:
    assert alarms_of(None, run_of(30)) == []
    assert alarms_of(None, []) == []
    assert alarms_of(None, [{"step": 0.0, "eval/accuracy": 0.1}]) == []


@pytest.mark.parametrize(
    ("kind", "name", "at", "below", "steps", "says"),
    [
        (
            "truncation",
            "completion/truncated_fraction",
            0.3,
            0.29,
            3,
            "30 % of the completions reached `sampling.max_tokens`",
        ),
        ("mismatch_tail", "mismatch/q99", 0.5, 0.49, 3, "1 % of the tokens differ by more than 0.5 nats"),
        ("staleness", "staleness/mean", 2.0, 1.9, 3, "2 versions before they were trained on"),
        ("entropy_collapse", "policy/entropy", 0.2, 0.21, 5, "0.2 nats of entropy per token, and 1 at first, in step"),
        ("length_drift", "completion/tokens_mean", 200.0, 199.0, 5, "200 tokens per completion, and 100 at first"),
        ("length_drift", "completion/tokens_mean", 50.0, 51.0, 5, "50 tokens per completion, and 100 at first"),
    ],
)
def test_an_alarm_at_its_threshold(kind: str, name: str, at: float, below: float, steps: int, says: str) -> None:
    """It needs `steps` consecutive steps at the threshold."""
    [alarm] = alarms_of(None, run_of(20, {step: {name: at} for step in range(10, 10 + steps)}))
    assert (alarm.kind, alarm.first_step, alarm.last_step, alarm.steps) == (kind, 10, 9 + steps, steps)
    assert says in alarm.text
    assert alarms_of(None, run_of(20, {step: {name: below} for step in range(10, 20)})) == []
    assert alarms_of(None, run_of(20, {step: {name: at} for step in range(10, 9 + steps)})) == []
    broken = [step for step in range(10, 20) if step != 9 + steps]
    interrupted = alarms_of(None, run_of(9 + 2 * steps - 1, {step: {name: at} for step in broken}))
    assert interrupted == [] if len(broken) < 2 * steps - 1 else True


def test_several_streaks_are_one_alarm() -> None:
    lines = run_of(30, {step: {"mismatch/q99": 0.7} for step in (*range(5, 8), *range(20, 24), 27)})
    [alarm] = alarms_of(None, lines)
    assert (alarm.first_step, alarm.last_step, alarm.steps) == (5, 23, 7)
    assert "0.7 nats in logprob in step 23" in alarm.text


def test_a_part_that_is_always_equal() -> None:
    equal = {"reward_part/judge/min": 0.25, "reward_part/judge/max": 0.25}
    [alarm] = alarms_of(None, run_of(20, dict.fromkeys(range(10, 15), equal)))
    assert (alarm.kind, alarm.first_step, alarm.last_step) == ("part_equal/judge", 10, 14)
    assert alarm.text == "`judge` gave every completion 0.25 and taught nothing in step 14"
    assert alarms_of(None, run_of(20, dict.fromkeys(range(10, 14), equal))) == []
    # the whole reward is equal: grpo.metrics.health reports it, once
    constant = equal | {"reward/min": 1.0, "reward/max": 1.0}
    assert alarms_of(None, run_of(20, dict.fromkeys(range(10, 20), constant))) == []


def test_failures_by_kind() -> None:
    """3 % of the completions fail: two thirds by timeout (2 %), a third by exception (1 %)."""
    some = {"reward/failed_fraction": 0.03, "reward/failed_timeout": 4.0, "reward/failed_exception": 2.0}
    [alarm] = alarms_of(None, run_of(9, {4: some, 5: some}))
    assert (alarm.kind, alarm.title) == ("failed/timeout", "Completions fail: timeout")
    assert (alarm.text, alarm.steps) == ("2.0 % of the completions failed (timeout) in step 5", 2)
    assert alarm.filter == 'failed == "timeout"'
    assert alarms_of(None, run_of(9, {4: some})) == []


def test_a_run_shorter_than_a_threshold_is_judged_by_all_its_steps() -> None:
    [alarm] = alarms_of(None, run_of(2, during(range(1, 3), completion__truncated_fraction=0.9)))
    assert (alarm.kind, alarm.steps) == ("truncation", 2)
    # the evaluation before the first step is no step
    lines = [{"step": 0.0, "eval/accuracy": 0.1}, *run_of(2, during(range(1, 3), completion__truncated_fraction=0.9))]
    assert [alarm.kind for alarm in alarms_of(None, lines)] == ["truncation"]


def test_the_warnings_of_the_run_come_first_and_once() -> None:
    """All rewards are equal after step 20, in a run of 26 steps."""
    config = config_module.load({
        "model": {"path": "base"}, "data": {"train": [{"path": "t"}], "template": "{question}"},
        "algorithm": {"prompts_per_step": 2, "group_size": 2}, "rewards": [{"file": "judge.py"}], "run": {"steps": 26},
    })  # fmt: skip
    broken = {
        "reward/min": 0.0, "reward/max": 0.0, "reward/mean": 0.0, "reward_part/judge/max": 0.0,
        "optim/grad_norm": 0.0, "gradient/no_spread": 64.0, "gradient/sampled": 64.0,
        "group/no_spread_fraction": 1.0,
    }  # fmt: skip
    first, second = alarms_of(config, run_of(26, dict.fromkeys(range(21, 27), broken)))
    assert (first.kind, first.title, first.first_step, first.last_step, first.steps) == (
        "constant_reward", "All rewards are equal", 21, 26, 6,
    )  # fmt: skip
    assert first.text == "every completion got the reward 0, so nothing is learned"
    assert first.cause.startswith("the task is too hard for this model, the prompt does not ask for what the reward")
    assert first.cause.endswith("the reward does not depend on the completion")  # not: the completions are in samples/
    assert (second.kind, second.first_step) == ("zero_gradient", 21)
    # metrics that lack what the warnings read: the other alarms stay
    [alarm] = alarms_of(config, [{"step": float(i), "group/count": 1.0, "staleness/mean": 3.0} for i in range(1, 4)])
    assert alarm.kind == "staleness"


def test_every_warning_of_the_run_has_a_title() -> None:
    from grpo.metrics.health import SIGNS

    assert {sign.name for sign in SIGNS} == {*alarms.TITLES}


def alarms_of_run(folder: Path) -> list[dict[str, Any]]:
    from grpo.view.runs import run_answer

    answer = run_answer(open_paths([folder])[0])
    assert isinstance(answer, dict)
    return answer["alarms"]  # type: ignore[return-value]


def judged(right: int, lowest: int, count: int = 16, **changes: Any) -> list[dict[str, Any]]:
    """`count` completions in groups of 4, of which the last `right` end with the gold answer. The first `lowest` of
    these get 0 by the reward `judge`, the others 1. A bonus of 0.25 is part of every reward."""
    rows = []
    for i in range(count):
        wrong = i < count - right
        value = 0.0 if wrong or i < count - right + lowest else 1.0
        rows.append(sample(i // 4, i % 4, extracted="9" if wrong else "1", gold="so #### 1", reward=value + 0.25,
                           **{"reward_part/judge": value}) | (changes if not wrong else {}))  # fmt: skip
    return rows


def test_right_answers_with_the_lowest_reward(tmp_path: Path) -> None:
    """A grader that reads the wrong number: 3 of 16 completions end with the gold answer and get 0 from it, although
    not the lowest reward. Two of them are in group 2."""
    run = make_run(tmp_path / "run", steps=1)
    bonus = {"reward_part/bonus": pa.array([0.25] * 15 + [0.0])}
    write_samples(
        run, "step-000003", [*judged(6, 3)[:-1], sample(3, 3, reward=0.0, **{"reward_part/judge": 0.0})], **bonus
    )
    [alarm] = alarms_of_run(run)
    assert alarm["kind"] == "grader_disagrees"
    assert alarm["text"] == "3 of 16 completions in step 3 end with the gold answer and got the lowest value of `judge`"
    assert (alarm["first_step"], alarm["last_step"], alarm["file"], alarm["group"]) == (3, 3, "step-000003", 2)
    for changes in (
        {"extracted": "2"},  # the answer is wrong
        {"reward_part/judge": 0.5},  # not the lowest value
        {"gold": None},  # no gold answer
        {"finish_reason": "length"},  # its last number is no answer
        {"reward": None, "failed": "timeout", "reward_part/judge": None},
    ):
        write_samples(run, "step-000003", judged(3, 3, **changes))
        assert alarms_of_run(run) == [], changes
    write_samples(run, "step-000003", judged(16, 0))  # all right: nothing to report
    assert alarms_of_run(run) == []
    write_samples(run, "step-000003", judged(4, 4))  # every value is 0
    assert len(alarms_of_run(run)) == 1


def test_a_form_that_is_learned_is_no_wrong_grader(tmp_path: Path) -> None:
    """In the first step 3 of 7 right answers get 0, or 4; in the last, none."""
    run = make_run(tmp_path / "run", steps=1)
    write_samples(run, "step-000009", judged(7, 0))
    write_samples(run, "step-000001", judged(7, 3))
    assert alarms_of_run(run) == []
    write_samples(run, "step-000001", judged(7, 4))
    [alarm] = alarms_of_run(run)
    assert (alarm["first_step"], alarm["last_step"], alarm["steps"]) == (1, 1, 1)
    write_samples(run, "step-000009", judged(7, 3))
    [alarm] = alarms_of_run(run)
    assert (alarm["first_step"], alarm["last_step"], alarm["steps"]) == (1, 9, 2)
    assert "4 of 16 completions in step 1 " in alarm["text"]


def test_each_data_set_is_judged_by_the_first_reward_that_scores_it(tmp_path: Path) -> None:
    """`judge` scores the first 8 completions, `other` the last 8: it gives 4 right answers its lowest value, -1."""
    run = make_run(tmp_path / "run", steps=1)
    rows = judged(8, 0)
    rows = [row | ({"reward_part/judge": None} if i >= 8 else {}) for i, row in enumerate(rows)]
    other = {"reward_part/other": pa.array([-5.0] * 8 + [-1.0] * 4 + [0.0] * 4)}
    write_samples(run, "step-000003", rows, **other)
    [alarm] = alarms_of_run(run)
    assert alarm["text"] == "4 of 8 completions in step 3 end with the gold answer and got the lowest value of `other`"


def test_alarms_follow_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert alarms_of_run(run) == []
    write_metrics(run, [{**line, "mismatch/q99": 1.0} for line in run_of(3)])
    assert [alarm["kind"] for alarm in alarms_of_run(run)] == ["mismatch_tail"]
