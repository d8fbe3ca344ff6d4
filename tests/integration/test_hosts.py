"""A run over several hosts: a head and three nodes in network namespaces of their own, joined with a token. A run takes
two of the nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hosts import AUTH, METRICS, PORT, Host, missing, ray_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

RUN = {"steps": 30, "save_every": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Host]]:
    with ray_cluster([0, 1, 1, 1]) as every:
        yield every


def train(head: Host, recipe: Path, *overrides: str, **environment: str) -> tuple[int, Path, str]:
    """From the head. Exit code, run folder, output."""
    name = next((word.removeprefix("run.name=") for word in overrides if word.startswith("run.name=")), "run")
    done = head.run(
        [sys.executable, "-m", "grpo", "train", str(recipe), *overrides], timeout=400, cwd=recipe.parent,
        env=os.environ | AUTH | {"RAY_ADDRESS": f"{head.address}:{PORT}", "PYTHONPATH": str(Path(__file__).parents[2])}
        | environment,
    )  # fmt: skip
    return done.returncode, recipe.parent / "runs" / name, done.stdout + done.stderr


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def recipe(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import write_recipe, write_spread

    folder = tmp_path_factory.mktemp("hosts")
    return write_recipe(
        folder, make_model("qwen2"), run=RUN, learner={"zero_stage": 2, "threads": 1}, sampler={"threads": 1},
        rewards=[write_spread(folder)],
        cluster={"samplers": 2, "learner_ranks": 2, "sampler_cpus": 0.5, "learner_cpus": 0.5, "reward_workers": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_one_node(recipe: Path) -> str:
    """weights_sha256 of the same recipe under a private Ray."""
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "train", str(recipe), "run.name=one"], cwd=recipe.parent, capture_output=True,
        text=True, timeout=400, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    digest: str = summary(recipe.parent / "runs" / "one")["weights_sha256"]
    return digest


@pytest.mark.parametrize("layout", ["colocated", "disaggregated"])
def test_two_nodes_give_the_weights_of_one(cluster: list[Host], recipe: Path, on_one_node: str, layout: str) -> None:
    """Learner ranks and samplers on two nodes each; weights by memory files of either node, and over the network."""
    code, run, said = train(cluster[0], recipe, f"run.name={layout}", f"cluster.layout={layout}")
    assert code == 0, said
    found = summary(run)
    assert found["weights_sha256"] == on_one_node
    assert len(set(found["nodes"].values())) == 2


def test_a_wrong_token_is_refused(cluster: list[Host], recipe: Path) -> None:
    code, run, said = train(cluster[0], recipe, "run.name=token", RAY_AUTH_TOKEN="8" * 64)
    assert code == 2, said
    assert "token" in said.lower()
    assert not run.exists()


def test_two_jobs_at_once(cluster: list[Host], recipe: Path) -> None:
    """One takes a node, so does the other; a third that wants two is refused with what the others hold."""
    one = ["cluster.samplers=1", "cluster.learner_ranks=1"]
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(train, cluster[0], recipe, f"run.name=job{i}", "run.steps=300", "run.prometheus=true", *one)
            for i in range(2)
        ]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not all(
            (recipe.parent / "runs" / f"job{i}" / "metrics.jsonl").exists() for i in range(2)
        ):
            time.sleep(0.5)
        exported = ""
        while time.monotonic() < deadline and not all(f'run="job{i}"' in exported for i in range(2)):
            exported = cluster[0].run(["curl", "-s", f"http://{cluster[0].address}:{METRICS}/metrics"]).stdout
            time.sleep(0.5)
        assert re.search(r'ray_grpo_reward_mean\{[^}]*run="job0"[^}]*\} [0-9.]+', exported)
        code, run, said = train(cluster[0], recipe, "run.name=third")
        assert code == 2, said
        assert "2 samplers and 2 learner ranks, colocated, ask for 2 CPUs and 0 GPUs; there is" in said
        assert said.count("0 of 1 CPUs") == 2
        assert not run.exists()
        for job in jobs:
            code, run, said = job.result()
            assert code == 0, said
            assert summary(run)["steps"] == 300


def test_a_lost_node_is_left_behind(cluster: list[Host], recipe: Path, on_one_node: str) -> None:
    """Another takes its place, from the last checkpoint, and the weights are the same. Without another, the run ends
    resumable and names the node that was lost. Last: it takes the cluster apart."""
    with ThreadPoolExecutor(1) as pool:
        for attempt in range(2):
            name = f"lost{attempt}"
            job = pool.submit(train, cluster[0], recipe, f"run.name={name}", f"run.steps={30 if attempt == 0 else 400}")
            run = recipe.parent / "runs" / name
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not list((run / "checkpoints").glob("step-*/manifest.json")):
                time.sleep(0.02)
            [placed] = re.findall(r"placed .*", (run / "log.txt").read_text())
            struck = next(host for host in cluster[1:] if host.address in placed)
            struck.stop_ray()
            at = time.monotonic()
            code, run, said = job.result()
            if attempt == 0:
                assert code == 0, said
                assert summary(run)["weights_sha256"] == on_one_node
            else:
                assert code == 75, said  # a node that comes back lets the same command continue
                assert time.monotonic() - at < 90
                assert struck.address in summary(run)["exit_reason"]
                assert "the engines cannot be restarted" in said
