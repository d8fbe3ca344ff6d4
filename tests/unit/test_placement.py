"""Bundles and whether they fit, by hand."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.cluster import session as cluster
from grpo.cluster.placement import Bundle, Node, bundles, check_fit
from grpo.config import Config, load
from grpo.config.schema import ClusterConfig
from grpo.types import UserError


def config_of(tmp_path: Path, **cluster: object) -> Config:
    recipe = {
        "model": {"path": "m"}, "data": {"train": "d.jsonl"}, "rewards": [{"file": "r.py"}],
        "algorithm": {"prompts_per_step": 8, "group_size": 4}, "run": {"steps": 1}, "cluster": cluster,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load(path, [])


def node(cpus: float, gpus: float, free_cpus: float | None = None, free_gpus: float | None = None) -> Node:
    return Node(
        name="n", cpus=cpus, gpus=gpus, free_cpus=cpus if free_cpus is None else free_cpus,
        free_gpus=gpus if free_gpus is None else free_gpus,
    )  # fmt: skip


def test_colocated_engines_share_a_bundle(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, device="gpu", samplers=2, tensor_parallel=2, learner_ranks=4, sampler_cpus=3, learner_cpus=0.5
    )
    assert bundles(config) == [
        Bundle(role="engines", samplers=(0,), ranks=(0, 1), cpus=4, gpus=2),
        Bundle(role="engines", samplers=(1,), ranks=(2, 3), cpus=4, gpus=2),
    ]


def test_disaggregated_engines_have_their_own(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, device="gpu", layout="disaggregated", samplers=1, tensor_parallel=4, learner_ranks=2, sampler_cpus=3
    )
    assert bundles(config) == [
        Bundle(role="samplers", samplers=(0,), ranks=(), cpus=3, gpus=4),
        Bundle(role="learner", samplers=(), ranks=(0,), cpus=1, gpus=1),
        Bundle(role="learner", samplers=(), ranks=(1,), cpus=1, gpus=1),
    ]


@pytest.mark.parametrize(("samplers", "ranks"), [(1, 1), (1, 3), (4, 1), (2, 2)])
def test_on_cpu_any_number_of_each_goes(tmp_path: Path, samplers: int, ranks: int) -> None:
    """Each is in one bundle, and what they ask for is the sum of what each asks for."""
    found = bundles(config_of(tmp_path, samplers=samplers, learner_ranks=ranks, sampler_cpus=0.5))
    assert sorted(i for b in found for i in b.samplers) == list(range(samplers))
    assert sorted(i for b in found for i in b.ranks) == list(range(ranks))
    assert sum(b.cpus for b in found) == 0.5 * samplers + ranks
    assert sum(b.gpus for b in found) == 0


def test_what_fits_and_what_does_not(tmp_path: Path) -> None:
    gpus = {"device": "gpu", "layout": "disaggregated", "tensor_parallel": 4, "learner_ranks": 4}
    config = config_of(tmp_path, **gpus)
    check_fit(config, [node(8, 4), node(8, 4)], "the cluster")
    check_fit(config, [node(8, 8)], "the cluster")
    check_fit(config, [node(1, 1), node(1, 1), node(1, 1), node(1, 1), node(1, 4)], "the cluster")
    with pytest.raises(UserError) as refused:  # 9 GPUs in all, but no node has four
        check_fit(config, [node(8, 3), node(8, 3), node(8, 3)], "the cluster")
    assert str(refused.value).startswith(
        "sampler 0 finds no node with 1 CPUs and 4 GPUs free on the cluster: 1 samplers and 4 learner ranks, "
        "disaggregated, ask for 5 CPUs and 8 GPUs; there is n with 8 of 8 CPUs and 3 of 3 GPUs; n with"
    )
    with pytest.raises(UserError, match=r"learner rank 3 finds no node .*; n with 8 of 8 CPUs and 3 of 4 GPUs; lower"):
        check_fit(config, [node(8, 4), node(8, 4, free_gpus=3)], "c")  # another job holds one
    with pytest.raises(UserError, match=r"there is no node; lower"):
        check_fit(config, [], "the cluster")


def test_shares_that_add_up_to_a_whole_fit(tmp_path: Path) -> None:
    config = config_of(tmp_path, samplers=7, sampler_cpus=0.1, learner_ranks=1, learner_cpus=0.3)
    check_fit(config, [node(1, 0)], "c")
    with pytest.raises(UserError):
        check_fit(config, [node(1, 0, free_cpus=0.9)], "c")


def test_reward_workers_on_nodes_of_their_own(tmp_path: Path) -> None:
    config = config_of(tmp_path, reward_nodes=3, reward_workers=8)
    ours = [bundle for bundle in bundles(config) if bundle.role == "rewards"]
    assert [(bundle.rewards, bundle.cpus, bundle.gpus) for bundle in ours] == [((0,), 3, 0), ((1,), 3, 0), ((2,), 2, 0)]
    check_fit(config, [node(3, 0), node(3, 0), node(4, 0)], "c")
    with pytest.raises(UserError, match=r"learner ranks, colocated, and 8 reward workers ask for 10 CPUs"):
        check_fit(config, [node(3, 0), node(3, 0), node(3, 0)], "c")


@pytest.mark.parametrize("free", [(4, 5), (5, 4)])
def test_the_order_of_nodes_does_not_matter(free: tuple[int, int], tmp_path: Path) -> None:
    """4 on the node of 4, 3 and 2 on the other."""
    config = config_of(
        tmp_path, layout="disaggregated", sampler_cpus=4, learner_cpus=3, reward_nodes=1, reward_workers=2
    )
    check_fit(config, [node(cpus, 0) for cpus in free], "c")
    with pytest.raises(UserError, match=r"^learner rank 0 finds no node with 3 CPUs"):
        check_fit(config, [node(4, 0), node(2, 0), node(2, 0)], "c")


def test_the_fullest_node_is_not_always_the_right_one(tmp_path: Path) -> None:
    """4 on the node of 6 leaves room for two of 3 only; 4 + 3 and 3 + 3 fit."""
    config = config_of(tmp_path, layout="disaggregated", sampler_cpus=4, learner_cpus=3, learner_ranks=3)
    check_fit(config, [node(6, 0), node(7, 0)], "c")
    with pytest.raises(UserError, match=r"^learner rank 2 finds no node with 3 CPUs"):
        check_fit(config, [node(6, 0), node(6, 0, free_cpus=5)], "c")


def test_a_large_cluster_is_no_long_search(tmp_path: Path) -> None:
    """104 bundles for 128 GPUs on 32 nodes, of which one lacks a GPU."""
    config = config_of(
        tmp_path, device="gpu", layout="disaggregated", samplers=8, tensor_parallel=4, learner_ranks=96
    )  # fmt: skip
    nodes = [node(8 + i, 4) for i in range(32)]
    check_fit(config, nodes, "c")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^learner rank 95 finds no node with 1 CPUs and 1 GPUs"):
        check_fit(config, [*nodes[:-1], node(8, 4, free_gpus=3)], "c")
    assert time.monotonic() - start < 30


def test_what_passes_is_what_can_be_placed(tmp_path: Path) -> None:
    """Held against every way to put the bundles on the nodes, in every order of these."""
    draw, base = random.Random(0), config_of(tmp_path)
    passed = refused = 0
    for _ in range(1000):
        layout: Any = draw.choice(["colocated", "disaggregated"])
        device: Any = draw.choice(["cpu", "gpu"])
        cluster = ClusterConfig(
            samplers=draw.randint(1, 3), learner_ranks=draw.randint(1, 3), layout=layout, reward_workers=3,
            sampler_cpus=draw.choice([0.5, 1, 2, 4]), learner_cpus=draw.choice([0.5, 1, 3]), device=device,
            reward_nodes=draw.choice([0, 1, 2]),
        )  # fmt: skip
        config = dataclasses.replace(base, cluster=cluster)
        nodes = [
            node(9, 9, free_cpus=draw.choice([2, 3, 4, 5, 6, 7]), free_gpus=draw.choice([0, 1, 2, 3]))
            for _ in range(draw.randint(1, 3))
        ]
        asked = bundles(config)
        possible = any(
            all(
                sum(b.cpus for b, at in zip(asked, where, strict=True) if at == i) <= n.free_cpus
                and sum(b.gpus for b, at in zip(asked, where, strict=True) if at == i) <= n.free_gpus
                for i, n in enumerate(nodes)
            )
            for where in itertools.product(range(len(nodes)), repeat=len(asked))
        )
        for order in itertools.permutations(nodes):
            try:
                check_fit(config, order, "c")
            except UserError:
                assert not possible, (asked, order)
                refused += 1
            else:
                assert possible, (asked, order)
                passed += 1
    assert min(passed, refused) > 100


class Cluster:
    """Nodes of which a look at a time is given, and a clock that goes on with each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *looks: list[Node]) -> None:
        self.looks, self.now, self.said = list(looks), 0.0, list[str]()
        monkeypatch.setattr(cluster, "nodes_of_cluster", lambda: self.looks.pop(0))
        monkeypatch.setattr(cluster.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cluster.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


FREE, HALF, TAKEN = [node(4, 0)], [node(4, 0, 1.5)], [node(4, 0, 0)]


def test_a_run_that_queues_waits_for_what_others_have_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long; what it waits for is said when that changes."""
    config = config_of(tmp_path, queue=True, sampler_cpus=1, learner_cpus=1)
    there = Cluster(monkeypatch, *[TAKEN] * 100, HALF, HALF, FREE, [])
    cluster.wait_for_room(config, "the cluster at here", 0.0, there.said.append)
    assert there.looks == [[]]
    wanted = (
        "waiting for room: sampler 0 with learner rank 0 finds no node with 2 CPUs and 0 GPUs free on the cluster at "
        "here: 1 samplers and 1 learner ranks, colocated, ask for 2 CPUs and 0 GPUs; there is n with {} of 4 CPUs and "
        "0 of 0 GPUs"
    )
    assert there.said == [wanted.format("0"), wanted.format("1.5"), "there is room, after 102 s"]


def test_a_long_wait_is_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, queue=True)
    there = Cluster(monkeypatch, *[TAKEN] * 1300, FREE)
    cluster.wait_for_room(config, "here", 0.0, there.said.append)
    assert [text.partition(":")[0] for text in there.said] == [
        "waiting for room", "waiting for room", "waiting for room", "there is room, after 1300 s"
    ]  # fmt: skip


def test_there_is_no_queue_for_what_never_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, queue=True, sampler_cpus=8)
    there = Cluster(monkeypatch, TAKEN)
    with pytest.raises(UserError, match=r"finds no node with 9 CPUs .* lower cluster\.samplers"):
        cluster.wait_for_room(config, "here", 0.0, there.said.append)
    assert there.said == []


@pytest.mark.parametrize("queue", [False, True])
def test_a_node_may_come_back_for_as_long_as_patience_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: bool
) -> None:
    config = config_of(tmp_path, queue=queue)
    there = Cluster(monkeypatch, [], [], FREE)
    cluster.wait_for_room(config, "here", 30.0, there.said.append)
    assert there.said == []
    there.looks = [[] for _ in range(40)]
    with pytest.raises(UserError, match="there is no node; lower"):
        cluster.wait_for_room(config, "here", 30.0, there.said.append)
    assert len(there.looks) == 40 - 31


def test_without_a_queue_a_run_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Cluster(monkeypatch, TAKEN)
    with pytest.raises(UserError, match=r"n with 0 of 4 CPUs"):
        cluster.wait_for_room(config_of(tmp_path), "here", 0.0, there.said.append)


def test_a_private_ray_has_no_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"^cluster.queue=true waits for room on a running cluster"):
        cluster.session(config_of(tmp_path, queue=True), None).__enter__()
