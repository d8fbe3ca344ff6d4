"""A sampler that fails while the others are in a collective: the learner ends its side of it at once.

A broadcast of NCCL that is not aborted waits on the GPU without a limit. tests/integration/test_broken_transfer.py has
failing samplers in real processes, with gloo, where nothing shows whether the learner has aborted.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.cluster import remote_samplers
from grpo.cluster.remote_samplers import RemoteSamplers
from grpo.sync.transport import BroadcastSender

import ray  # isort: skip - grpo sets what it reads when it is imported

CAUSE = ray.exceptions.RayTaskError("load_bucket", "ValueError: no memory left", ValueError("no memory left"))
DEATH = ray.exceptions.RayActorError()


class Sender:
    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


def samplers(monkeypatch: pytest.MonkeyPatch, *ends: object) -> tuple[RemoteSamplers, Sender]:
    """Return samplers whose calls end in this way; None: it is in the collective until that is aborted."""
    sender: Any = Sender()

    def wait(references: Sequence[int], num_returns: int = 1, timeout: float = 0) -> tuple[list[int], list[int]]:
        ended = [each for each in references if ends[each] is not None or sender.aborted]
        return ended[:num_returns], [each for each in references if each not in ended[:num_returns]]

    def get(references: Any) -> Any:
        for each in references if isinstance(references, list) else [references]:
            if isinstance(ends[each], Exception):
                raise ends[each]
        return references

    monkeypatch.setattr(remote_samplers, "ray", SimpleNamespace(wait=wait, get=get, exceptions=ray.exceptions))
    return RemoteSamplers([], sender, 5.0), sender


def references(count: int) -> Any:
    return list(range(count))


def test_the_answers_of_all_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    found, sender = samplers(monkeypatch, "a", "b")
    assert found.all_of(references(2)) == [0, 1]
    assert (found.lost, sender.aborted) == (None, 0)


@pytest.mark.parametrize("ends", [(CAUSE, None), (None, CAUSE), (None, None, CAUSE)])
def test_an_error_ends_the_collective_and_is_raised(ends: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    found, sender = samplers(monkeypatch, *ends)
    with pytest.raises(ray.exceptions.RayTaskError, match="no memory left"):
        found.all_of(references(len(ends)))
    assert (found.lost, sender.aborted) == (None, 1)


@pytest.mark.parametrize("ends", [(DEATH, None), (None, DEATH), (CAUSE, DEATH)])
def test_a_death_ends_the_collective_and_is_the_cause(
    ends: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of an error that another sampler gets from it."""
    found, sender = samplers(monkeypatch, *ends)
    assert found.all_of(references(len(ends))) == []
    assert found.lost is DEATH
    assert sender.aborted == 1


def test_a_sender_ends_its_own_group_once_it_has_one() -> None:
    sender = BroadcastSender("127.0.0.1", 1, 1, 5.0, torch.device("cpu"))
    sender.abort()
    aborted: list[bool] = []
    group: Any = SimpleNamespace(abort=lambda: aborted.append(True))
    sender._group = group
    sender.abort()
    assert aborted == [True]
