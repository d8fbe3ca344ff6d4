"""What the driver is told of a call to an engine that failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo.cluster import engines, watch
from grpo.run.timeline import Timeline
from grpo.types import EngineFailure, SampledBlock, SampleRequest

import ray  # isort: skip - grpo sets what it reads when it is imported


@pytest.mark.parametrize("of_samplers", [True, False])
def test_only_a_call_to_a_sampler_leaves_the_learner_s_state_to_save(
    of_samplers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a learner's call has failed on one rank, the others may wait for it."""

    def get(references: Any) -> None:
        raise ray.exceptions.RayTaskError("call", "traceback", ValueError("no such token"))

    monkeypatch.setattr(watch.ActorWatch, "ready", lambda self, pending, *_: (pending, []))
    monkeypatch.setattr(watch, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    with pytest.raises(EngineFailure, match="while waiting for completions: ValueError: no such token") as failure:
        watch.ActorWatch(Path("logs")).wait([object()], "completions", 1.0, of_samplers=of_samplers)
    assert failure.value.learner_answers == of_samplers


def test_what_each_sampler_still_owes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [SampleRequest(index=i, token_ids=(1,), seeds=(1, 2)) for i in range(3)]
    blocks = {0: [block([0], [0]), block([0], [1])], 1: [block([1, 2], [0, 0]), block([1, 1, 2], [0, 1, 1])]}
    group: Any = engines.Engines.__new__(engines.Engines)
    group.fleet, group._watch = SimpleNamespace(samplers=[None, None]), watch.ActorWatch(Path("logs"))
    group._timeline, group._timeout, group._outstanding = Timeline(None), 1.0, {}
    monkeypatch.setattr(engines.Engines, "_ask", lambda self, i, share, settings: iter(blocks[i]))
    monkeypatch.setattr(watch.ActorWatch, "ready", lambda self, pending, *_: (pending[-1:], []))
    monkeypatch.setattr(watch.ActorWatch, "wait", lambda self, pending, *_, of_samplers: pending)
    seen = [group.outstanding() for _ in group.sample(requests, None)]  # type: ignore[arg-type]
    assert seen == [
        {"sampler-0": 2, "sampler-1": 2}, {"sampler-0": 2, "sampler-1": 0}, {"sampler-0": 1, "sampler-1": 0},
        {"sampler-0": 0, "sampler-1": 0},
    ]  # fmt: skip


def block(index: list[int], samples: list[int]) -> SampledBlock:
    """Completions of one token each."""
    ones = np.ones(len(index), dtype=np.int32)
    return SampledBlock(
        index=np.array(index), sample_index=np.array(samples), lengths=ones, truncated=ones == 1, aborted=ones == 0,
        token_ids=ones, sampler_logprobs=ones.astype(np.float32), policy_versions=ones,
    )  # fmt: skip


def test_a_sampler_that_died_leaves_the_learner_s_state_to_save() -> None:
    assert watch.ActorDied("sampler-0", "it died").learner_answers
    assert not watch.ActorDied("learner-1", "it died").learner_answers
