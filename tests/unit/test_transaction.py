"""The commands of a weight sync in their order, with a learner and samplers that only write them down."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from grpo.sync import transaction
from grpo.sync.probe import Probe, Reading, Spread
from grpo.sync.transaction import SyncEnd, publish
from grpo.sync.weights import Bucket, SyncReport, describe

LOGPROBS = (np.asarray([-1.0], dtype=np.float32),)
PROBE = Probe(token_ids=((1, 2),))
PEER_DEAD = RuntimeError("the other end has gone")


class Learner:
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._said.append("weights")
        yield "a", torch.zeros(2)
        yield "b", torch.ones(2)

    def read_probe(self, probe: Probe) -> Reading:
        self._said.append("probe")
        return Reading(logprobs=LOGPROBS, noise=Spread(q90=0.1, rms=0.1))

    def gathered(self, ours: Any) -> list[Any]:
        return [ours, ours]

    def __getattr__(self, name: str) -> Any:  # reload, offload, drop_cache, barrier
        return lambda: self._said.append(name)


class Samplers:
    """Two samplers, of which one dies with the bucket of `dies_with`."""

    def __init__(self, said: list[str], dies_with: str = "") -> None:
        self._said, self._dies_with = said, dies_with
        self._consumed: dict[str, int] = {}
        self.lost: Exception | None = None

    def sleep(self) -> None:
        self._said.append("sleep")

    def wake(self, part: str) -> None:
        self._said.append(f"wake {part}")

    def begin_sync(self, policy_version: int) -> None:
        self._said.append(f"begin {policy_version}")

    def load_bucket(self, bucket: Bucket) -> None:
        [spec] = bucket.tensors
        self._said.append(f"load {spec.name}")
        self._consumed[spec.name] = bucket.checksums[0]
        self._last = spec.name

    def loaded(self) -> None:
        self._said.append("loaded")
        if self._last == self._dies_with:
            self.lost = ConnectionError("sampler 1 has died")

    def died(self) -> bool:
        return self.lost is not None

    def finish_sync(self, probe: Probe) -> list[SyncReport]:
        self._said.append("finish")
        report = SyncReport(
            policy_version=5, consumed=self._consumed, unfilled_slots=(), unmapped_tensors=(), probe_logprobs=LOGPROBS
        )
        return [report, report]


class Sender:
    def __init__(self, said: list[str], error: Exception | None = None) -> None:
        self._said, self._error = said, error

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        return describe(tensors, {})

    def transmit(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._said.append("transmit")
        if self._error is not None:
            raise self._error

    def transmitted(self) -> None:
        self._said.append("transmitted")


@pytest.fixture(autouse=True)
def one_tensor_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = transaction.buckets_of
    monkeypatch.setattr(transaction, "buckets_of", lambda tensors: plain(tensors, limit=8))


def end_of(said: list[str], samplers: Samplers, *, sender: Any = None, **changes: Any) -> SyncEnd:
    parts: dict[str, Any] = {
        "learner": Learner(said), "samplers": samplers, "sender": sender or Sender(said), "sending": [0], "rank": 0,
        "ranks": 1, "takes_turns": False,
    }  # fmt: skip
    return SyncEnd(**parts | changes)


def test_each_bucket_is_loaded_before_the_next_and_the_reports_are_last() -> None:
    said: list[str] = []
    result = publish(end_of(said, Samplers(said)), 5, PROBE, dtype="float32", full_check=False)
    assert said == [
        "reload", "probe", "reload", "begin 5", "weights", "load a", "transmit", "loaded", "transmitted", "load b",
        "transmit", "loaded", "transmitted", "finish",
    ]  # fmt: skip
    assert (result.policy_version, result.nbytes) == (5, 16)  # two tensors of two float32 each
    assert result.probe == Spread(q90=0.0, rms=0.0)


def test_turns_in_memory_are_taken_by_all_ranks_at_once() -> None:
    said: list[str] = []
    end = end_of(said, Samplers(said), takes_turns=True, ranks=2, sending=[0, 1])
    publish(end, 5, PROBE, dtype="float32", full_check=False)
    assert said == [
        "barrier", "sleep", "barrier", "reload", "probe",
        "barrier", "sleep", "barrier", "reload", "drop_cache", "barrier", "wake weights", "barrier",
        "begin 5", "weights", "load a", "transmit", "loaded", "transmitted", "barrier",
        "load b", "transmit", "loaded", "transmitted", "barrier", "offload", "barrier", "wake kv_cache",
        "barrier", "finish",
    ]  # fmt: skip


@pytest.mark.parametrize("dies_with", ["", "b"])
def test_nothing_refers_to_a_weight_when_the_learner_leaves_the_memory(dies_with: str) -> None:
    """A view that is still there would keep its whole buffer on the GPU while the sampler works."""

    sent: list[weakref.ref[torch.Tensor]] = []

    class Watched(Learner):
        def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().weights():
                sent.append(weakref.ref(tensor))
                yield name, tensor

        def offload(self) -> None:
            self._said.append(f"offload beside {sum(reference() is not None for reference in sent)}")

    said: list[str] = []
    end = end_of(said, Samplers(said, dies_with), learner=Watched(said), takes_turns=True)
    if dies_with:
        with pytest.raises(ConnectionError):
            publish(end, 5, PROBE, dtype="float32", full_check=False)
    else:
        publish(end, 5, PROBE, dtype="float32", full_check=False)
    assert [each for each in said if each.startswith("offload")] == ["offload beside 0"]
    assert len(sent) == 2


def test_after_a_death_the_learner_completes_its_collectives_without_any_sampler() -> None:
    said: list[str] = []
    end = end_of(said, Samplers(said, dies_with="a"), takes_turns=True, ranks=2, sending=[0, 1])
    with pytest.raises(ConnectionError, match="sampler 1 has died"):
        publish(end, 5, PROBE, dtype="float32", full_check=False)
    assert said[said.index("load a") :] == [
        "load a", "transmit", "loaded", "barrier", "barrier", "offload", "barrier", "barrier",
    ]  # fmt: skip


def test_a_transfer_that_fails_is_a_death_only_if_a_sampler_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    end = end_of(said, Samplers(said), sender=Sender(said, PEER_DEAD))
    with pytest.raises(RuntimeError, match="the other end has gone"):
        publish(end, 5, PROBE, dtype="float32", full_check=False)
    samplers = Samplers(said)

    def died() -> bool:
        samplers.lost = ConnectionError("sampler 0")
        return True

    monkeypatch.setattr(samplers, "died", died)
    with pytest.raises(ConnectionError, match="sampler 0"):
        publish(end_of(said, samplers, sender=Sender(said, PEER_DEAD)), 5, PROBE, dtype="float32", full_check=False)
