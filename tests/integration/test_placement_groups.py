"""Placement groups on a real Ray of several nodes with made-up GPUs: no engine is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = '''
import json, sys
import ray
from ray.cluster_utils import Cluster
from grpo.config import load
from grpo.cluster.placement import ENGINES, Reservation, check_fit, nodes_of_cluster
from grpo.types import UserError

head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
for _ in range(2):
    cluster.add_node(num_cpus=8, num_gpus=4)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

@ray.remote
class Where:
    def where(self):
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids().get("GPU", [])

def nodes():
    return sorted((n.cpus, n.gpus, n.free_cpus, n.free_gpus) for n in nodes_of_cluster())

def settled(wanted):
    """What is free, once Ray has said so to all."""
    import time
    for _ in range(100):
        if nodes() == wanted:
            break
        time.sleep(0.1)
    return nodes()

config = load(sys.argv[1], sys.argv[2:])
out = {"before": nodes()}
check_fit(config, nodes_of_cluster(), "here")
reserved = Reservation(config, 30, ENGINES)
sampler_gpus = config.sampler_workers if config.on_gpu and config.cluster.layout == "disaggregated" else 0
asked = {("sampler", i): sampler_gpus for i in range(config.cluster.samplers)}
asked |= {("learner", i): int(config.on_gpu) for i in range(config.cluster.learner_ranks)}
actors = {
    key: Where.options(num_cpus=0.5, num_gpus=gpus, scheduling_strategy=reserved.of(*key)).remote()
    for key, gpus in asked.items()
}
out["where"] = {f"{kind} {i}": ray.get(actor.where.remote()) for (kind, i), actor in actors.items()}
try:
    check_fit(config, nodes_of_cluster(), "here")
except UserError as error:
    out["again"] = str(error)
try:
    Reservation(config, 2, ENGINES).release()  # where there is room for it
except TimeoutError as error:
    out["late"] = str(error)
for actor in actors.values():
    ray.kill(actor)
reserved.release()
out["after"] = settled(out["before"])
print("RESULT", json.dumps(out))
ray.shutdown()
cluster.shutdown()
'''


@pytest.fixture
def placed(make_recipe: Any, make_model: Any) -> Any:
    """Runs the script with overrides; gives what it found."""
    recipe = make_recipe(make_model("qwen2"))

    def run(*overrides: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="ray-") as scratch:  # a short path: sockets live below it
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, str(recipe), "cluster.device=gpu", *overrides],
                capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2],
                env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": scratch},
            )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        return found

    return run


WHOLE = [[2.0, 0.0, 2.0, 0.0], [8.0, 4.0, 8.0, 4.0], [8.0, 4.0, 8.0, 4.0]]


def test_samplers_and_learner_on_gpus_of_their_own(placed: Any) -> None:
    """A sampler of four GPUs is on one node; nobody shares a GPU; a second job is refused with the arithmetic."""
    found = placed("cluster.layout=disaggregated", "cluster.tensor_parallel=4", "cluster.learner_ranks=3")
    node, gpus = found["where"]["sampler 0"]
    assert sorted(gpus) == ["0", "1", "2", "3"]
    ranks = [found["where"][f"learner {i}"] for i in range(3)]
    assert {where for where, _ in ranks} != {node}
    assert len({(where, *ids) for where, ids in ranks}) == 3
    assert found["again"].startswith(
        "sampler 0 finds no node with 1 CPUs and 4 GPUs free on here: 1 samplers and 3 learner ranks, disaggregated, "
        "ask for 4 CPUs and 7 GPUs; there is "
    )
    assert "0 of 4 GPUs" in found["again"]
    assert "1 of 4 GPUs" in found["again"]
    assert found["late"] == "Ray has not placed the samplers within 2 s, although they fit"
    assert found["before"] == found["after"] == WHOLE


def test_a_sampler_sits_on_the_gpus_of_its_ranks(placed: Any) -> None:
    """The ranks hold them; the sampler asks Ray for none and is told."""
    found = placed("cluster.samplers=2", "cluster.tensor_parallel=2", "cluster.learner_ranks=4")
    for i in range(2):
        node, gpus = found["where"][f"sampler {i}"]
        assert gpus == []
        ranks = [found["where"][f"learner {rank}"] for rank in (2 * i, 2 * i + 1)]
        assert [where for where, _ in ranks] == [node, node]
        assert len({ids[0] for _, ids in ranks}) == 2
    assert found["after"] == WHOLE


@pytest.mark.slow
def test_the_largest_are_placed_first(placed: Any) -> None:
    """Two ranks that take a node each, and a sampler that is small enough for the head: Ray, asked for the sampler
    first, would put it on the node that has the most."""
    found = placed(
        "cluster.device=cpu", "cluster.layout=disaggregated", "cluster.learner_ranks=2", "cluster.learner_cpus=8",
        "cluster.sampler_cpus=2",
    )  # fmt: skip
    assert len({node for node, _ in found["where"].values()}) == 3
    assert found["after"] == WHOLE
