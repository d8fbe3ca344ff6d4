"""Reward workers on two Ray nodes, one of which is lost: every completion is scored once, and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SCRIPT = """
import json, sys, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from grpo.config import load
from grpo.cluster.placement import check_fit, nodes_of_cluster
from grpo.rewards.groups import RewardItem
from grpo.cluster.reward_workers import SpreadPool

recipe, reward, logs = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
options = ["cluster.reward_nodes=2", "cluster.reward_workers=2", "cluster.sampler_cpus=1", "cluster.learner_cpus=1"]
config = load(recipe, options)
check_fit(config, nodes_of_cluster(), "here")  # the engines on the head, a worker on each of the nodes

def items(n):
    return [
        RewardItem(completion=str(i), row={"n": n}, messages=None, info={"prompt": "p"}, dataset="train")
        for i in range(2)
    ]

out = {}
with SpreadPool(config, [Path(reward)], Path(logs)) as pool:
    out["hosts"] = pool.hosts(60)
    futures = [pool.submit(items(n)) for n in range(40)]
    futures[5].result(timeout=60)
    first = {name: Path(logs, name).exists() for name in ("rewards-0", "rewards-1")}
    cluster.remove_node(nodes[1], allow_graceful=False)
    out["scores"] = [[o.value for o in future.result(timeout=120)] for future in futures]
    out["first"] = first
    bad = pool.submit([RewardItem(completion="x", row={"n": 0}, messages=None, info={"prompt": ""}, dataset="train")])
    out["bad"] = bad.result(timeout=60)[0].kind
    out["failed"] = pool.counts().failed
print("RESULT", json.dumps(out))
ray.shutdown()
cluster.shutdown()
"""


def test_nothing_is_lost_with_a_node(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    reward = tmp_path / "slow.py"
    reward.write_text(
        """
import time

def slow(completion, row):
    time.sleep(0.1)
    return 10 * row["n"] + int(completion)
"""
    )
    recipe = make_recipe(make_model("qwen2"), rewards=[{"file": str(reward)}])
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:  # a short path: sockets live below it
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(recipe), str(reward), str(tmp_path / "logs")],
            capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2],
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": scratch},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(line.removeprefix("RESULT "))
    assert found["scores"] == [[10 * n, 10 * n + 1] for n in range(40)]
    assert found["first"] == {"rewards-0": True, "rewards-1": True}
    assert found["hosts"].keys() == {"rewards-0", "rewards-1"}
    assert found["bad"] == "exception"
    assert found["failed"] == 1
