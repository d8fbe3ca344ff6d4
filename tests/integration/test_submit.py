"""A real Ray head with its job server and a token; most runs end before an engine starts."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from conftest import write_spread

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120
SLOW = """
import pathlib, time
def slow(completion, row):
    pathlib.Path("{began}").touch()
    time.sleep(600)
    return 1.0
"""
"""A reward that is being tried out before the run when the signals come."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None,
    reason="Ray's job server needs ray[default], which locks/dev.txt has: bash launch/setup.sh dev",
)


@dataclasses.dataclass(frozen=True)
class Head:
    port: int
    environment: Mapping[str, str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, command: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
        """`grpo COMMAND ARGUMENTS --address ...` in the folder `cwd`."""
        line = [sys.executable, "-m", "grpo", command, *arguments]
        line += [] if "--address" in arguments else ["--address", self.address]
        return subprocess.Popen(
            line, cwd=cwd, env=self.environment | variables, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def grpo(self, command: str, *arguments: str, cwd: Path, **variables: str) -> tuple[int, str]:
        """Exit code and everything it said."""
        process = self.start(command, *arguments, cwd=cwd, **variables)
        said = process.communicate(timeout=PATIENCE_S)[0]
        return process.returncode, said


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray of its own on the loopback interface; taken down by ending `ray start --block`."""
    folder, port, dashboard = tempfile.mkdtemp(prefix="grpo-head-"), free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    with (Path(folder) / "ray.log").open("w") as log:
        ray = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}/r",
             "--dashboard-agent-listen-port=0"],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: answers(dashboard) or ray.poll() is not None, "the job server to answer")
        yield Head(port=dashboard, environment=environment)
    finally:
        ray.terminate()
        ray.wait(timeout=60)
        until(lambda: not naming(folder), "Ray's processes to end")
        shutil.rmtree(folder)


def answers(port: int) -> bool:
    with socket.socket() as connecting:
        return connecting.connect_ex(("127.0.0.1", port)) == 0


def naming(folder: str) -> list[int]:
    """Processes whose command line names a folder: they may still write to it."""
    lines = psutil.process_iter(["cmdline"])
    return [process.pid for process in lines if any(folder in part for part in process.info["cmdline"] or [])]


def until(happened: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def drivers(recipe: Path) -> list[int]:
    """Processes of the job's driver and of its reward workers: they run in the folder of the job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "grpo" in line and "train" in line and recipe.name in line:
            found += [process.pid, *(child.pid for child in process.children(recursive=True))]
    return found


@pytest.fixture
def slow(make_model: Callable[..., Path], make_recipe: Callable[..., Path]) -> tuple[Path, Path]:
    """(a recipe whose reward, tried out before the run, does not come back; a file that it makes when it is called).

    Its run has a checkpoint, so a signal ends it with 75."""
    recipe = make_recipe(
        make_model("qwen2"), rewards=[{"file": "slow.py", "gold": True, "timeout_s": 600}], run={"grace_s": 7}
    )
    recipe = recipe.rename(recipe.with_name(f"slow-{secrets.token_hex(4)}.yaml"))
    began = recipe.parent / "began"
    (recipe.parent / "slow.py").write_text(SLOW.format(began=began))
    run = recipe.parent / "runs" / "run"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    return recipe, began


def job_of(said: str) -> str:
    return said.partition("submitted  ")[2].partition(":")[0]


class Counter:
    """Passes what comes to its port on to another one, and counts the bytes."""

    def __init__(self, to: int) -> None:
        self.sent = 0
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client = self._listening.accept()[0]
                threading.Thread(target=self._between, args=(client,), daemon=True).start()

    def _between(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._to)) as server, contextlib.suppress(OSError):
            while ready := select.select([client, server], [], [])[0]:
                for source in ready:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    self.sent += len(data) if source is client else 0
                    (server if source is client else client).sendall(data)


def test_little_travels_and_the_jobs_words_and_code_come_back(
    head: Head, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    """The job has the reward, the module that it imports and the variable: else it would fail before it comes to the
    checkpoint, which is none. 10 GB lie beside the recipe."""
    recipe = make_recipe(
        make_model("qwen2"),
        rewards=[{"file": "coloured.py", "gold": True, "env": ["PASSWORD"]}],
        cluster={"sampler_cpus": 0.5},
    )
    here = recipe.parent
    (here / "coloured.py").write_text(
        "import os, colours\ndef coloured(completion, row):\n"
        "    assert os.environ['PASSWORD'] == colours.NAME\n    return float(completion == row['answer'])\n"
    )
    (here / "colours.py").write_text("NAME = 'blue-moon'\n")
    with (here / "big.bin").open("wb") as file:
        file.truncate(10 * 2**30)
    checkpoint = here / "runs" / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (here / "runs" / "run" / "config.yaml").write_text("")
    with contextlib.closing(Counter(head.port)) as counter:
        code, said = head.grpo(
            "submit", recipe.name, "resume=auto", "--env", "PASSWORD=blue-moon", "--address",
            f"http://127.0.0.1:{counter.port}", cwd=here, RAY_ADDRESS="http://127.0.0.1:9",
        )  # fmt: skip
    assert code == 2, said
    assert f"\ngrpo: {checkpoint} is not a checkpoint" in said
    assert "with PASSWORD" in said
    assert "blue-moon" not in said
    assert 100_000 < counter.sent < 10_000_000


def test_what_is_reserved_for_the_driver_is_not_the_engines(
    head: Head, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    recipe = make_recipe(make_model("qwen2"), cluster={"sampler_cpus": 0.5, "learner_cpus": 0.5})
    code, said = head.grpo("submit", str(recipe), "--driver-cpus", "1.5", cwd=recipe.parent)
    assert code == 2, said
    assert "with 0.5 of 2 CPUs and 0 of 0 GPUs" in said
    code, said = head.grpo("submit", str(recipe), "--driver-cpus", "2.5", cwd=recipe.parent)
    assert code == 2, said
    refused = r"grpo: --driver-cpus 2\.5: no node has so many CPUs; there is \S+ with 2; nearest: 2\n"
    assert re.fullmatch(refused, said), said


HOLDING = """
import pathlib, sys, time
import ray
from ray.util.placement_group import placement_group

ray.init(log_to_driver=False)
ray.get(placement_group([{"CPU": 2}]).ready())
print("held", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.1)
"""
"""A job that has all CPUs of the head until a file is there."""

WAITING = """
import pathlib, sys
from grpo import config
from grpo.cluster import session as cluster

with cluster.session(config.load(sys.argv[1], ["cluster.queue=true"]), pathlib.Path(sys.argv[2])):
    print("inside", flush=True)
"""


def test_a_run_that_queues_waits_until_others_leave_and_can_be_stopped(
    head: Head, make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    client = JobSubmissionClient(head.address, headers=headers)
    free = tmp_path / "free"
    for name, program in (("holding", HOLDING), ("waiting", WAITING)):
        (tmp_path / f"{name}.py").write_text(program)
    recipe = make_recipe(make_model("qwen2"), run={"name": "queued"})
    holding = client.submit_job(entrypoint=f"python {tmp_path}/holding.py {free}")
    until(lambda: "held" in client.get_job_logs(holding), "the CPUs to be taken")
    waiting = client.submit_job(entrypoint=f"python {tmp_path}/waiting.py {recipe} {tmp_path}/logs")
    code, said = head.grpo("submit", str(recipe), "--queue", "--no-follow", cwd=tmp_path)
    assert code == 0, said
    queued = job_of(said)
    wanted = "waiting for room: sampler 0 with learner rank 0 finds no node with 2 CPUs and 0 GPUs free on the cluster"
    for job in (queued, waiting):
        until(lambda job=job: wanted in client.get_job_logs(job), "the run to wait")  # type: ignore[misc]
    code, said = head.grpo("jobs", cwd=tmp_path)
    assert code == 0, said
    [line] = [line for line in said.splitlines() if line.startswith(queued)]
    assert line.split()[1:4] == ["RUNNING", "queued", recipe.name]
    assert not any(job in said for job in (holding, waiting))

    code, said = head.grpo("stop", queued, cwd=tmp_path)
    assert code == 0, said
    assert "exit code  1" in said
    assert "interrupted by SIGTERM; there is no checkpoint to resume from" in client.get_job_logs(queued)
    assert not drivers(recipe)
    code, said = head.grpo("jobs", cwd=tmp_path)
    [line] = [line for line in said.splitlines() if line.startswith(queued)]
    assert (line.split()[1], line.split()[-1]) == ("STOPPED", "1")

    free.touch()
    until(lambda: client.get_job_info(waiting).status.is_terminal(), "the run that waits to go on")
    assert re.search(r"there is room, after \d+ s\n(.*\n)*inside\n", client.get_job_logs(waiting))


@pytest.mark.slow
def test_a_job_that_is_done_gives_0(head: Head, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from grpo import config

    recipe = make_recipe(Path("/nowhere/model"))
    run = tmp_path / "runs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    packed = config.load(recipe, [f"rewards[0].file=rewards/0/{Path(config.load(recipe).rewards[0].file).name}"])
    (run / "config.yaml").write_text(config.dump(packed))
    (run / "summary.json").write_text('{"exit_reason": "done", "steps": 2}')
    code, said = head.grpo("submit", str(recipe), "resume=auto", "--no-follow", cwd=tmp_path)
    assert (code, "is done" in said) == (0, False)
    code, said = head.grpo("logs", job_of(said), cwd=tmp_path)
    assert code == 0, said
    assert f"{run} is done: it has 2 steps" in said


def test_a_token_that_is_wrong_or_missing_is_refused(head: Head, tmp_path: Path) -> None:
    code, said = head.grpo("status", "job", cwd=tmp_path, RAY_AUTH_TOKEN="wrong")
    assert (code, said.count("\n")) == (2, 1)
    assert "Authentication failed" in said
    assert "RAY_AUTH_TOKEN_PATH" in said
    code, said = head.grpo("status", "job", cwd=tmp_path, RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")
    assert (code, said.count("\n")) == (2, 1)
    assert "Missing authentication token" in said
    for odd in ("sesame\nopen", "ses€ame"):
        code, said = head.grpo("status", "job", cwd=tmp_path, RAY_AUTH_TOKEN=odd)
        assert (code, said.count("\n")) == (2, 1), said
        assert "the token has characters that an HTTP header must not contain" in said
        assert "ses" not in said


def test_a_job_that_there_is_none_of(head: Head, tmp_path: Path) -> None:
    for command in ("status", "logs", "stop"):
        code, said = head.grpo(command, "nothing", cwd=tmp_path)
        assert (code, said.count("\n")) == (2, 1), command
        assert "Job nothing does not exist" in said


def test_ctrl_c_ends_the_following_and_stop_the_job(head: Head, slow: tuple[Path, Path]) -> None:
    recipe, began = slow
    following = head.start("submit", str(recipe), "resume=auto", cwd=recipe.parent)
    until(began.exists, "the reward to be called")
    following.send_signal(signal.SIGINT)
    said = following.communicate(timeout=PATIENCE_S)[0]
    job = job_of(said)
    assert following.returncode == 130, said
    follow = f"Follow it: grpo logs {job} --address {head.address}; stop it: grpo stop {job}"
    assert f"no longer following the job, which continues. {follow}" in said
    code, said = head.grpo("status", job, cwd=recipe.parent)
    assert code == 0
    assert "status     RUNNING" in said
    assert drivers(recipe)
    code, said = head.grpo("stop", job, cwd=recipe.parent)
    assert code == 0, said
    assert "status     STOPPED" in said
    assert "exit code  75" in said
    assert not drivers(recipe)
    read, write = os.pipe()
    os.close(read)  # as by a `| head` that has seen enough
    with open(write, "w") as nobody:
        logs = subprocess.run(
            [sys.executable, "-m", "grpo", "logs", job, "--address", head.address], env=head.environment,
            stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
    assert (logs.returncode, logs.stderr) == (130, "")
    code, said = head.grpo("logs", job, cwd=recipe.parent)
    assert code == 75
    assert f"resume it with resume={recipe.parent}/runs/run" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_may_be_the_jobs(number: signal.Signals, head: Head, slow: tuple[Path, Path]) -> None:
    recipe, began = slow
    following = head.start("submit", str(recipe), "resume=auto", "--stop-on-signal", cwd=recipe.parent)
    until(began.exists, "the reward to be called")
    following.send_signal(number)
    said = following.communicate(timeout=PATIENCE_S)[0]
    assert following.returncode == 75, said
    assert said.count("Running entrypoint") == 1
    assert not drivers(recipe)


@pytest.mark.slow
def test_ray_waits_as_long_as_the_run_may_take(head: Head, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A job that never ends is killed only then; it has no exit code."""
    from ray.job_submission import JobSubmissionClient

    recipe = make_recipe(Path("/nowhere/model"), run={"grace_s": 7})
    _, said = head.grpo("submit", str(recipe), cwd=tmp_path)
    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    client = JobSubmissionClient(head.address, headers=headers)
    assert client.get_job_info(job_of(said)).runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "67"
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    job = client.submit_job(
        entrypoint=f'python -c "{code}"', runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "4"}}
    )
    until(lambda: "deaf" in client.get_job_logs(job), "the job to begin")
    began = time.monotonic()
    code, said = head.grpo("stop", job, cwd=tmp_path)
    assert time.monotonic() - began > 4
    assert "the job has no exit code: STOPPED" in said
    assert code == 0


@pytest.mark.slow
def test_the_package_that_was_submitted_runs_on_every_node(head: Head, tmp_path: Path) -> None:
    """In the driver, and in what it starts by Ray."""
    from ray.job_submission import JobSubmissionClient

    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "__init__.py").write_text("")
    code = "import ray, grpo; ray.init(log_to_driver=False); f = ray.remote(lambda: __import__('grpo').__file__); "
    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    client = JobSubmissionClient(head.address, headers=headers)
    job = client.submit_job(
        entrypoint=f'python -c "{code} print(grpo.__file__, ray.get(f.remote()))"',
        runtime_env={"working_dir": str(tmp_path)},
    )
    until(lambda: client.get_job_info(job).status.is_terminal(), "the job to end")
    files = client.get_job_logs(job).splitlines()[-1].split()
    assert [file.partition("_ray_pkg_")[2].partition("/")[2] for file in files] == ["grpo/__init__.py"] * 2


@pytest.mark.slow
def test_a_run_is_stopped_with_its_engines_at_work_and_goes_on(
    head: Head, make_model: Callable[..., Path], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The second job finds all of the cluster free again, and ends with the weights of a run that was never stopped."""
    steps = {"steps": 100, "save_every": 2, "name": None}
    recipe = make_recipe(make_model("qwen2"), rewards=[write_spread(tmp_path)], run=steps)
    recipe = recipe.rename(recipe.with_name(f"stopped-{secrets.token_hex(4)}.yaml"))
    straight = subprocess.run(
        [sys.executable, "-m", "grpo", "train", str(recipe), "run.name=straight"], cwd=ROOT, timeout=400
    )
    assert straight.returncode == 0

    code, said = head.grpo("submit", str(recipe), "run.name=run", "--no-follow", cwd=tmp_path)
    assert code == 0, said
    run = tmp_path / "runs" / "run"
    until(lambda: count_of_lines(run / "metrics.jsonl") == 2, "the second step")
    code, said = head.grpo("stop", job_of(said), cwd=tmp_path)
    assert code == 0, said
    assert "exit code  75" in said
    assert not drivers(recipe)
    assert 2 <= count_of_lines(run / "metrics.jsonl") < 100

    code, said = head.grpo("submit", str(recipe), "run.name=run", f"resume={run}", cwd=tmp_path)
    assert code == 0, said
    assert weights_of(run) == weights_of(tmp_path / "runs" / "straight")


def count_of_lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def weights_of(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["weights_sha256"])


@pytest.mark.slow
def test_plain_ray_job_submit(head: Head, make_model: Callable[..., Path], make_recipe: Callable[..., Path]) -> None:
    """docs/cluster.md: everything on shared storage, nothing travels."""
    recipe = make_recipe(make_model("qwen2"), run={"name": None})
    line = ["ray", "job", "submit", "--address", head.address, "--", "python", "-m", "grpo"]
    for command, code, words in (("check", 0, "nothing has been started"), ("chekc", 1, "failed with exit code 2")):
        ended = subprocess.run(
            [*line, command, str(recipe)], env=head.environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert words in ended.stdout + ended.stderr
