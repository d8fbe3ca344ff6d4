"""A sampler that fails in the middle of a broadcast: the learner must not wait for a collective that cannot end.

Real broadcasts between Ray actors; the peers stand for samplers that receive the first bucket and then fail.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from grpo.cluster import session as cluster
from grpo.cluster.actors import LearnerActor
from grpo.sync.probe import Probe, Reading, Spread
from grpo.sync.transport import BroadcastSender, broadcast, broadcast_group, finish, join_store
from grpo.sync.weights import Bucket, WeightSyncError

PATIENCE_S = 120.0
CPU = torch.device("cpu")


class Peer:
    """A sampler with one worker."""

    def __init__(self, end: str) -> None:
        """`end`: what becomes of the second bucket."""
        self._end, self._buckets = end, 0

    def init_transfer(self, info: dict[str, Any]) -> None:
        if self._end == "never joins":
            raise ValueError("no way to the learner")
        store = join_store(info["host"], info["port"], info["world_size"], PATIENCE_S)
        self._group = broadcast_group(CPU, store, info["rank_offset"], info["world_size"], PATIENCE_S)

    def begin_sync(self, policy_version: int) -> None:
        self._buckets = 0

    def load_bucket(self, bucket: Bucket) -> None:
        self._buckets += 1
        if self._buckets == 2 and self._end == "raises":
            raise ValueError("no memory left")
        if self._buckets == 2 and self._end == "dies":
            os._exit(1)
        flat = torch.empty(bucket.transport["nbytes"], dtype=torch.uint8)
        finish(broadcast(self._group, flat), PATIENCE_S)

    def finish_sync(self, probe: Probe) -> None:
        raise AssertionError("the sync goes on although a sampler has failed")


class Weights:
    """A learner with five tensors, of which each fills a bucket."""

    device = CPU

    def reload(self) -> None: ...

    def read_probe(self, probe: Probe) -> Reading:
        return Reading(logprobs=(np.zeros(1, dtype=np.float32),), noise=Spread(q90=1.0, rms=1.0))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((str(i), torch.full((300 << 20,), float(i), dtype=torch.uint8)) for i in range(5))


def learner_with(weights: Weights) -> Any:
    """Return a learner of which only the policy of a weight sync is used."""
    return SimpleNamespace(device=CPU, synced=weights)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="grpo-test-")  # short: socket paths below it are limited to 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", cluster._token())  # Ray reads it once in a process, whoever starts it first
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=1 << 28, _temp_dir=folder, _node_ip_address="127.0.0.1",
        )  # fmt: skip
    yield
    ray.shutdown()


def connected(ends: list[str]) -> tuple[LearnerActor, list[Any]]:
    """Rank 0 of a learner, its transfer open to a peer for each of `ends`."""
    learner: Any = LearnerActor.__new__(LearnerActor)
    learner._config = SimpleNamespace(
        sampler_workers=1, takes_turns=False, cluster=SimpleNamespace(learner_ranks=1),
        model=SimpleNamespace(dtype="float32"),
    )  # fmt: skip
    learner._rank, learner._learner, learner._sender = 0, learner_with(Weights()), None
    peers = connect(learner, ends)
    assert isinstance(learner._sender, BroadcastSender)
    return learner, peers


def connect(learner: LearnerActor, ends: list[str]) -> list[Any]:
    """Open the learner's transfer to new peers."""
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    make: Any = ray.remote(num_cpus=0, runtime_env=environment)(Peer)
    peers = [make.remote(end) for end in ends]
    place: Any = SimpleNamespace(node="n", host=ray.util.get_node_ip_address(), gpus=())
    learner.connect([place], peers, [place] * len(ends), "gloo", PATIENCE_S)
    return peers


def in_full(*cases: list[str]) -> list[Any]:
    """Return the cases, marked for `--full`."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("ends", [["receives", "raises"], *in_full(["raises"], ["raises", "receives"])])
def test_a_sampler_that_raises_ends_the_sync_with_its_error(local_ray: None, ends: list[str]) -> None:
    learner, peers = connected(ends)
    started = time.monotonic()
    with pytest.raises(ray.exceptions.RayTaskError, match="no memory left"):
        learner.publish(1, Probe(token_ids=((1, 2),)), False, PATIENCE_S)
    assert time.monotonic() - started < 30
    for peer in peers:
        ray.kill(peer)


@pytest.mark.parametrize("ends", [["receives", "dies"], *in_full(["dies"])])
def test_a_sampler_that_dies_ends_the_sync_with_its_death(local_ray: None, ends: list[str]) -> None:
    learner, peers = connected(ends)
    started = time.monotonic()
    with pytest.raises(ray.exceptions.RayActorError):
        learner.publish(1, Probe(token_ids=((1, 2),)), False, PATIENCE_S)
    assert time.monotonic() - started < 30
    for peer in peers:
        ray.kill(peer)


@pytest.mark.parametrize("ends", [["receives", "never joins"], *in_full(["never joins"])])
def test_a_sampler_that_cannot_join_ends_the_rendezvous(local_ray: None, ends: list[str]) -> None:
    started = time.monotonic()
    with pytest.raises(ray.exceptions.RayTaskError, match="no way to the learner"):
        connected(ends)
    assert time.monotonic() - started < 30


def test_after_a_death_the_samplers_that_replace_them_are_connected(local_ray: None) -> None:
    learner, peers = connected(["receives", "dies"])
    with pytest.raises(ray.exceptions.RayActorError):
        learner.publish(1, Probe(token_ids=((1, 2),)), False, PATIENCE_S)
    for peer in peers:
        ray.kill(peer)
    peers = connect(learner, ["receives", "raises"])
    with pytest.raises(ray.exceptions.RayTaskError, match="no memory left"):  # of the second sync, which took place
        learner.publish(2, Probe(token_ids=((1, 2),)), False, PATIENCE_S)
    for peer in peers:
        ray.kill(peer)


def test_weights_that_are_not_finite_are_refused_before_they_are_sent(local_ray: None) -> None:
    class Broken(Weights):
        def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "broken", torch.full((4,), float("nan"))

    learner, peers = connected(["receives"])
    learner._learner = learner_with(Broken())
    with pytest.raises(WeightSyncError, match="not finite"):
        learner.publish(1, Probe(token_ids=((1, 2),)), False, PATIENCE_S)
    ray.kill(peers[0])
