"""Bundles and whether they fit, by hand."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config import Config, load
from grpo.config.schema import ClusterConfig
from grpo.placement import Bundle, Node, bundles, check_fit
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


def test_what_passes_can_be_placed(tmp_path: Path) -> None:
    """Held against every way to put the bundles on the nodes. The other way round, largest first misses a few."""
    draw, base = random.Random(0), config_of(tmp_path)
    passed = missed = 0
    for _ in range(150):
        layout: Any = draw.choice(["colocated", "disaggregated"])
        cluster = ClusterConfig(
            samplers=draw.randint(1, 3), learner_ranks=draw.randint(1, 2), layout=layout, reward_workers=3,
            sampler_cpus=draw.choice([0.5, 1, 2]), learner_cpus=draw.choice([0.5, 1, 3]),
            reward_nodes=draw.choice([0, 2]),
        )  # fmt: skip
        config = dataclasses.replace(base, cluster=cluster)
        nodes = [node(9, 0, free_cpus=draw.choice([1, 2, 3, 4])) for _ in range(draw.randint(1, 3))]
        asked = [bundle.cpus for bundle in bundles(config)]
        possible = any(
            all(
                sum(cpus for cpus, at in zip(asked, where, strict=True) if at == i) <= n.free_cpus
                for i, n in enumerate(nodes)
            )
            for where in itertools.product(range(len(nodes)), repeat=len(asked))
        )
        try:
            check_fit(config, nodes, "c")
        except UserError:
            missed += possible
        else:
            passed += 1
            assert possible, (asked, nodes)
    assert passed > 20
    assert missed <= 3
