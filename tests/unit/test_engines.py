"""What the driver is told of a call to an engine that failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from grpo import engines
from grpo.types import EngineFailure

import ray  # isort: skip - grpo sets what it reads when it is imported


@pytest.mark.parametrize("of_samplers", [True, False])
def test_only_a_call_to_a_sampler_leaves_the_learner_s_state_to_save(
    of_samplers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a learner's call has failed on one rank, the others may wait for it."""

    def get(references: Any) -> None:
        raise ray.exceptions.RayTaskError("call", "traceback", ValueError("no such token"))

    group = engines.Engines.__new__(engines.Engines)
    monkeypatch.setattr(engines.Engines, "_ready", lambda self, pending, *_: (pending, []))
    monkeypatch.setattr(engines, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    with pytest.raises(EngineFailure, match="while waiting for completions: ValueError: no such token") as failure:
        group._wait([object()], "completions", 1.0, of_samplers=of_samplers)
    assert failure.value.learner_answers == of_samplers


def test_a_sampler_that_died_leaves_the_learner_s_state_to_save() -> None:
    assert engines.ActorDied("sampler-0", "it died").learner_answers
    assert not engines.ActorDied("learner-1", "it died").learner_answers
