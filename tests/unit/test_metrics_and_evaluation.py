"""Numbers of a step and of an evaluation, by hand."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from grpo.evaluation.metrics import eval_metrics
from grpo.evaluation.statistics import Judged, SetEvaluation, evaluate_groups, judge, judged
from grpo.metrics.measures import (
    counted_quantile,
    learner_metrics,
    metrics_by_set,
    mismatch_counts,
    rollout_metrics,
    staleness_metrics,
)
from grpo.types import Completion, Failed, Group, Logged, Mean, Prompt, Rollout, Scored, StepResult

PROMPT = Prompt(prompt_id="d:0:x", token_ids=(1, 2, 3), text="p", row={}, messages=None, dataset="d", where="d[0]")


def rollout(reward: float | None, tokens: int = 2, reason: str = "stop", version: int = 0) -> Rollout:
    outcome = Failed(kind="timeout", detail="") if reason is None or reward is None else Scored(
        value=reward, parts={"f": reward}
    )  # fmt: skip
    completion = Completion(
        token_ids=np.zeros(tokens, dtype=np.int32),
        sampler_logprobs=np.zeros(tokens, dtype=np.float32),
        sampled_mask=np.ones(tokens, dtype=bool),
        policy_versions=np.full(tokens, version, dtype=np.int32),
        finish_reason="length" if reason == "length" else "stop",
        seed=None,
    )
    return Rollout(prompt=PROMPT, completion=completion, text="", outcome=outcome)


def group(*members: Rollout, prompt: Prompt = PROMPT) -> Group:
    return Group(prompt=prompt, rollouts=members)


def test_rollout_metrics_by_hand() -> None:
    groups = [
        group(rollout(1.0, tokens=2), rollout(0.0, tokens=5, reason="length"), rollout(None, tokens=3)),
        group(rollout(1.0), rollout(1.0), rollout(1.0)),
        group(rollout(0.0), rollout(None), rollout(None)),
    ]
    numbers = rollout_metrics(groups, 2)
    assert numbers["reward/mean"] == pytest.approx(4 / 6)
    assert numbers["reward/failed_fraction"] == pytest.approx(3 / 9)
    assert numbers["reward/failed_timeout"] == 3
    assert numbers["completion/tokens_mean"] == pytest.approx(22 / 9)
    assert numbers["completion/truncated_fraction"] == pytest.approx(1 / 9)
    assert numbers["completion/tokens_right_mean"] == 2
    assert numbers["completion/tokens_wrong_mean"] == pytest.approx(3.5)
    assert numbers["group/dropped"] == 1  # the third has a single scored member
    assert numbers["group/no_spread_fraction"] == 0.5
    assert numbers["group/all_right_fraction"] == 0.5
    assert numbers["group/mixed_fraction"] == 0.5
    assert numbers["group/pass_at_group_size"] == 1.0
    assert numbers["group/reward_std_mean"] == pytest.approx(np.sqrt(0.5) / 2)
    assert numbers["tokens/sampled"] == 22


def with_logs(member: Rollout, **metrics: tuple[float, int]) -> Rollout:
    return dataclasses.replace(member, outcome=dataclasses.replace(member.outcome, logged=Logged(metrics=metrics)))


def test_logged_metrics_are_averaged_over_what_was_logged() -> None:
    """Not over groups or calls: one value of 4, and three that sum up to 2; also where the reward itself failed."""
    groups = [
        group(with_logs(rollout(1.0), a=(4.0, 1)), rollout(0.0)),
        group(with_logs(rollout(None), a=(2.0, 3), b=(-1.0, 2)), rollout(1.0)),
    ]
    numbers = rollout_metrics(groups, 2)
    assert {name: value for name, value in numbers.items() if name in ("reward/a", "reward/b")} == {
        "reward/a": 1.5, "reward/b": -0.5
    }  # fmt: skip
    shown = eval_metrics(evaluate_groups({"d": groups[:1], "e": groups[1:]}))
    assert (shown["eval/reward/a"], shown["eval/reward/b"]) == (1.5, -0.5)


def test_data_sets_are_told_apart() -> None:
    other = dataclasses.replace(PROMPT, dataset="owner/e:main")
    groups = [
        group(rollout(1.0, tokens=4), rollout(0.0, tokens=5, reason="length")),
        group(rollout(1.0), rollout(1.0), prompt=other),
        group(rollout(0.5), rollout(None), prompt=dataclasses.replace(PROMPT, dataset="f")),
    ]
    assert metrics_by_set(groups, 2) == {
        "reward/mean/d": 0.5, "completion/tokens_mean/d": 4.5, "completion/truncated_fraction/d": 0.5,
        "group/no_spread_fraction/d": 0.0, "group/count/d": 1.0,
        "reward/mean/owner/e:main": 1.0, "completion/tokens_mean/owner/e:main": 2.0,
        "completion/truncated_fraction/owner/e:main": 0.0, "group/no_spread_fraction/owner/e:main": 1.0,
        "group/count/owner/e:main": 1.0,
        "reward/mean/f": 0.5, "completion/tokens_mean/f": 2.0, "completion/truncated_fraction/f": 0.0,
        "group/count/f": 1.0,
    }  # fmt: skip


def test_dropped_groups_are_those_that_the_advantage_cannot_use() -> None:
    groups = [group(rollout(1.0), rollout(0.0), rollout(1.0)), group(rollout(0.0), rollout(None), rollout(None))]
    assert [rollout_metrics(groups, least)["group/dropped"] for least in (1, 2, 4)] == [0, 1, 2]
    assert rollout_metrics(groups, 1)["group/mixed_fraction"] == 1.0  # of the groups of two or more
    assert rollout_metrics([group(rollout(1.0))], 1)["group/dropped"] == 0


def test_a_step_without_any_reward_has_no_reward_number() -> None:
    numbers = rollout_metrics([group(rollout(None), rollout(None))], 2)
    assert "reward/mean" not in numbers
    assert numbers["reward/failed_fraction"] == 1.0


def test_staleness_counts_versions() -> None:
    numbers = staleness_metrics([rollout(1.0, version=3), rollout(1.0, tokens=6, version=4)], 5)
    assert numbers == {"staleness/mean": pytest.approx((2 * 2 + 6 * 1) / 8), "staleness/max": 2.0}


def test_learner_sums_become_means_and_shares() -> None:
    result = StepResult(
        optimizer_steps=4,
        skipped_updates=0,
        metrics={
            "policy/loss": (0.6, 0.0),
            "policy/entropy": (30.0, 10.0),
            "policy/clip_fraction_low": (1.0, 10.0),
            "policy/clip_fraction_high": (2.0, 10.0),
            "mismatch/importance_weight_mean": (8.0, 4.0),
            "mismatch/importance_weight_square": (20.0, 4.0),
            "policy/kl_old": (0.0, 0.0),
        },
        maxima={"policy/updates": 2.0, "mismatch/max": 0.1},
        minima={"mismatch/importance_weight_min": 0.5},
        mismatch_square=Mean(0.08, 2.0),
        kl_ref=Mean(),
        learner_logprob_sums={},
        mismatch_counts=mismatch_counts(np.asarray([0.0] + 97 * [1e-4] + [0.02, 0.5])),
    )
    numbers = learner_metrics(result)
    assert numbers["policy/loss"] == pytest.approx(0.3)
    assert numbers["policy/entropy"] == 3.0
    assert numbers["policy/clip_fraction"] == pytest.approx(0.3)
    assert numbers["mismatch/effective_sample_fraction"] == pytest.approx(64 / (4 * 20))
    assert numbers["mismatch/importance_weight_min"] == 0.5
    assert numbers["mismatch/max"] == 0.1
    assert numbers["mismatch/rms"] == pytest.approx(0.2)
    assert 0.02 <= numbers["mismatch/q99"] < 0.02 * 1.06  # of a hundred tokens the second largest
    assert not {"policy/kl_old", "policy/kl_ref"} & numbers.keys()  # nothing was observed


def test_counted_quantiles_hold_what_they_count() -> None:
    """0 and what is smaller than every bound is in the first bin; NaN and infinity are in the last."""
    assert counted_quantile(mismatch_counts(np.asarray([0.0, 1e-12, 0.0])), 0.99) == 0.0
    assert counted_quantile(mismatch_counts(np.asarray([1.0, np.nan])), 0.99) == np.inf
    values = np.random.default_rng(0).lognormal(-5, 2, 10_001)
    counts = mismatch_counts(values)
    assert counts.sum() == len(values)
    for q in (0.1, 0.5, 0.99):
        exact = float(np.quantile(values, q))
        assert exact / 1.06 < counted_quantile(counts, q) < exact * 1.06


def test_accuracy_is_the_mean_over_prompts_of_scored_samples() -> None:
    other = Prompt(prompt_id="d:1:y", token_ids=(1,), text="q", row={}, messages=None, dataset="d", where="d[0]")
    right = group(rollout(1.0), rollout(0.0))
    result = evaluate_groups({"d": [right, group(rollout(1.0), rollout(None), prompt=other)]}).sets["d"]
    assert result.per_prompt == {"d:0:x": 0.5, "d:1:y": 1.0}
    assert result.accuracy == 0.75
    assert result.failed == 1
    wrong = group(rollout(0.0), rollout(0.0), prompt=other)
    assert evaluate_groups({"d": [right, wrong]}).sets["d"].pass_at_k == 0.5
    with pytest.raises(ValueError, match="no completion"):
        evaluate_groups({"d": [group(rollout(None), rollout(None))]})


def test_parts_of_a_data_set_by_the_values_of_columns() -> None:
    """Four prompts of two levels, one of no subject, one whose completions all failed."""

    def of(index: int, values: list[float | None], **row: Any) -> Group:
        prompt = Prompt(
            prompt_id=f"d:{index}:x", token_ids=(1,), text="q", row=row, messages=None, dataset="d", where="d"
        )
        return group(*(rollout(value) for value in values), prompt=prompt)

    groups = [
        of(0, [1.0, 0.0], level=1, subject="a"), of(1, [1.0, 1.0], level=5, subject="b"),
        of(2, [0.0, None], level=5), of(3, [None, None], level=5, subject="c"),
    ]  # fmt: skip
    found = evaluate_groups({"d": groups}, ["level", "subject"])
    assert {name: (part.accuracy, part.failed) for name, part in found.parts.items()} == {
        "d/level/1": (0.5, 0), "d/level/5": (0.5, 3), "d/subject/a": (0.5, 0), "d/subject/b": (1.0, 0),
    }  # fmt: skip
    metrics = eval_metrics(found)
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/accuracy/d/subject/b"] == 1.0
    assert metrics["eval/failed/d/level/5"] == 3
    assert "eval/accuracy/d" not in metrics  # one data set
    state = json.loads(json.dumps(dataclasses.asdict(found)))
    assert {name: SetEvaluation(**part) for name, part in state["parts"].items()} == found.parts


def test_a_data_set_is_judged_by_the_first_reward_that_scores_it() -> None:
    """Where that one abstains there is no verdict, and none by another reward."""
    parts = [{"format": 1.0}, {"right": 0.0, "format": 1.0}, {}, {"right": 1.0, "format": 0.0}]
    assert judge(parts) == "right"
    assert judge([{"format": 1.0}, {}]) == "format"
    assert judge([{}]) is None
    members = [
        dataclasses.replace(rollout(1.0), outcome=Scored(value=1.0, parts=some) if some else rollout(None).outcome)
        for some in parts
    ]
    found = evaluate_groups({"d": [group(*members)]}).sets["d"]
    assert found.per_prompt == {"d:0:x": 0.5}
    assert found.failed == 2


def test_what_counts_of_a_completion() -> None:
    both = rollout(1.0, tokens=4, reason="length")
    both = dataclasses.replace(both, text="#### 12", outcome=Scored(value=0.3, parts={"right": 0.0, "format": 1.0}))
    assert judged(both, "right") == Judged(value=0.0, answer="12", tokens=4, truncated=True)
    assert judged(rollout(None), "right").value is None
