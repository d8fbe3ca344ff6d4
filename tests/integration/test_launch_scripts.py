"""launch/local.sh and launch/ray_cluster.sh for real, with runs that end in their check."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason="Ray's job server needs ray[default], which locks/dev.txt has: bash launch/setup.sh dev",
    ),
]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        **more,
    }


def with_words(*words: str) -> list[str]:
    """Processes that have all of the words on their command line."""
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if all(word in line for word in words)]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as connecting:
        return connecting.connect_ex(("127.0.0.1", port)) == 0


def until(happened: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.5)


@pytest.fixture(autouse=True)
def another_ray() -> Iterator[None]:
    """Holds the port that the agent of a Ray node takes by itself, as any other Ray of this machine does."""
    with socket.socket() as listening:
        with contextlib.suppress(OSError):  # there is one
            listening.bind(("0.0.0.0", 52365))
            listening.listen()
        yield


def test_local(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The run's code, and nothing is left."""
    recipe = make_recipe(Path("/nowhere/model"))
    ended = subprocess.run(
        ["bash", str(ROOT / "launch" / "local.sh"), recipe.name, "cluster.sampler_cpus=0.5",
         "cluster.learner_cpus=0.5"],
        cwd=recipe.parent, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "grpo: model.path=/nowhere/model is not a folder" in ended.stdout
    until(lambda: not with_words("/tmp/grpo-local-"), "Ray's last processes to end", 15)
    assert not list(Path("/tmp").glob("grpo-local-*"))


def test_a_cluster_by_hand(make_recipe: Callable[..., Path]) -> None:
    """A head and a worker, by a token file: the job on the head says what the cluster has."""
    folder = Path(tempfile.mkdtemp(prefix="grpo-hand-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    ports = {"RAY_PORT": str(free_port()), "DASHBOARD_PORT": str(free_port())}
    variables = environment(RAY_AUTH_TOKEN_PATH=str(token), **ports)
    variables.pop("RAY_AUTH_TOKEN", None)
    recipe, name = make_recipe(Path("/nowhere/model")), socket.gethostname()
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> None:
        with (folder / f"{arguments[0]}.log").open("w") as log:
            line = ["bash", str(ROOT / "launch" / "ray_cluster.sh"), *arguments, f"--temp-dir={folder}/{arguments[0]}"]
            started.append(subprocess.Popen(line, env=variables, stdout=log, stderr=log, text=True))
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (folder / f"{arguments[0]}.log").read_text():
            assert time.monotonic() < deadline, (folder / f"{arguments[0]}.log").read_text()
            time.sleep(0.5)

    def submitted() -> str:
        line = [sys.executable, "-m", "grpo", "submit", str(recipe), "cluster.sampler_cpus=5", "--address"]
        ended = subprocess.run(
            [*line, f"http://127.0.0.1:{ports['DASHBOARD_PORT']}"], env=variables, capture_output=True, text=True,
            timeout=PATIENCE_S,
        )  # fmt: skip
        assert ended.returncode == 2, ended.stdout + ended.stderr
        return ended.stdout

    try:
        start("head", "--num-cpus=1", "--node-ip-address=127.0.0.1")
        until(lambda: listens(int(ports["DASHBOARD_PORT"])), "the job server to answer")
        assert f"there is {name} with 1 of 1 CPUs and 0 of 0 GPUs; lower" in submitted()
        start("worker", f"127.0.0.1:{ports['RAY_PORT']}", "--num-cpus=2")
        both = submitted()
        assert all(f"{name} with {cpus} of {cpus} CPUs and 0 of 0 GPUs" in both for cpus in (1, 2))
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
    until(lambda: not with_words(str(folder)), "Ray's last processes to end", 15)
    shutil.rmtree(folder)
