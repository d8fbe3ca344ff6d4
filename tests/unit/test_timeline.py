"""Spans, by a clock that is held."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from grpo.rewards.counts import Counted
from grpo.rollout.collect import submit
from grpo.run import timeline as module
from grpo.run.heartbeat import Watch
from grpo.run.timeline import Timeline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_spans_are_written_once_and_in_order(tmp_path: Path, clock: list[float]) -> None:
    timeline = Timeline(tmp_path / "trace")
    later = timeline.begin("sampler 1", "sample", prompts=3)
    clock[0] = 101.5
    with timeline.span("learner", "update"):
        clock[0] = 103.0
    later()
    timeline.write(7)
    with timeline.span("driver", "save"):
        clock[0] = 104.0
    timeline.write(8)
    first, second = (json.loads((tmp_path / "trace" / f"step-00000{i}.json").read_text()) for i in (7, 8))
    assert first["traceEvents"] == [
        {"name": "sample", "ph": "X", "pid": "grpo", "tid": "sampler 1", "args": {"prompts": 3}, "ts": 0, "dur": 3e6},
        {"name": "update", "ph": "X", "pid": "grpo", "tid": "learner", "args": {}, "ts": 1.5e6, "dur": 1.5e6},
    ]
    assert [(event["name"], event["ts"], event["dur"]) for event in second["traceEvents"]] == [("save", 3e6, 1e6)]


def test_what_fails_ends_its_span(tmp_path: Path, clock: list[float]) -> None:
    timeline = Timeline(tmp_path)

    def failing() -> None:
        with timeline.span("learner", "update"):
            clock[0] += 2
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        failing()
    timeline.write(1)
    assert json.loads((tmp_path / "step-000001.json").read_text())["traceEvents"][0]["dur"] == 2e6


def test_scoring_lasts_until_the_verdict(tmp_path: Path, clock: list[float]) -> None:
    future: Future[Any] = Future()

    class Later:
        def submit(self, items: Any) -> Future[Any]:
            return future

        def counts(self) -> Counted:
            return Counted()

    timeline, scorer, sampler = Timeline(tmp_path), Later(), None
    watch = Watch("step 1", 2, sampler=sampler, scorer=scorer, timeline=timeline, say=print)  # type: ignore[arg-type]
    assert submit(["one", "two"], scorer, watch) is future  # type: ignore[list-item]
    clock[0] += 5
    future.set_result([])
    timeline.write(1)
    [event] = json.loads((tmp_path / "step-000001.json").read_text())["traceEvents"]
    assert (event["tid"], event["dur"], event["args"]) == ("rewards", 5e6, {"completions": 2})


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    timeline = Timeline(None)
    with timeline.span("learner", "update"):
        pass
    timeline.write(1)
    assert list(tmp_path.iterdir()) == []
