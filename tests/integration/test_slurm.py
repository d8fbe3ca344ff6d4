"""launch/slurm.sbatch under a real slurmctld and two slurmd: to the time limit, and into the queue again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
KillWait=5
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES
"""
SLOW = """
import pathlib, time
def slow(completion, row):
    pathlib.Path("{began}").touch()
    time.sleep(600)
    return 1.0
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("slurmctld") or not shutil.which("slurmd"),
        reason="needs root, and apt-get install --no-install-recommends slurmctld slurmd slurm-client",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason="Ray's job server needs ray[default], which locks/dev.txt has: bash launch/setup.sh dev",
    ),
]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """The environment of Slurm's commands, with a controller and two nodes up."""
    folder, host = Path(tempfile.mkdtemp(prefix="grpo-slurm-")), socket.gethostname()
    for name in ("state", "spool-one", "spool-two"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONFIG.format(folder=folder, host=host, ports=[free_port() for _ in range(3)]))
    environment = os.environ | {
        "SLURM_CONF": str(conf),
        "HEAD_IP": "127.0.0.1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    daemons = []
    for command in (["slurmctld"], ["slurmd", "-N", "one"], ["slurmd", "-N", "two"]):
        with (folder / f"{'-'.join(command)}.log").open("w") as log:
            daemons.append(subprocess.Popen([*command, "-D", "-f", str(conf)], env=environment, stdout=log, stderr=log))
    try:
        until(lambda: said(["sinfo", "-h", "-o", "%D %t"], environment) == "2 idle", "the nodes to be idle", 60)
        yield environment
    finally:
        said(["scancel", "--full", "--state=RUNNING", "--user=root"], environment)
        until(lambda: said(["squeue", "-h", "-t", "R,CG"], environment) == "", "the jobs to end", 60)
        for daemon in daemons:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=60)
        shutil.rmtree(folder)


def said(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()


def until(happened: Callable[[], object], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.5)


def of_job(job: str, environment: dict[str, str]) -> dict[str, str]:
    """What scontrol says of a job."""
    shown = said(["scontrol", "--oneliner", "show", "job", job], environment)
    return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)


def test_at_the_time_limit_the_run_is_saved_and_the_job_requeued(
    slurm: dict[str, str], make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    """The first time the run is in its check, with a checkpoint from before, when SIGUSR1 comes; the second time it is
    done."""
    recipe = make_recipe(
        make_model("qwen2"),
        rewards=[{"file": "slow.py", "gold": True, "timeout_s": 600}],
        cluster={"sampler_cpus": 0.5, "learner_cpus": 0.5},
    )
    began, out, run = recipe.parent / "began", recipe.parent / "out.txt", recipe.parent / "runs" / "run"
    (recipe.parent / "slow.py").write_text(SLOW.format(began=began))
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    submitted = said(
        ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--time=3", "--signal=B:USR1@90",
         f"--chdir={recipe.parent}", f"--output={out}", str(ROOT / "launch" / "slurm.sbatch"), str(recipe)],
        slurm,
    )  # fmt: skip
    until(began.exists, "the run to begin", 100)
    from grpo import config

    (run / "config.yaml").write_text(config.dump(config.load(recipe)))
    (run / "summary.json").write_text('{"exit_reason": "done", "steps": 2}')
    until(lambda: of_job(submitted, slurm)["Restarts"] == "1", "the job to be requeued", 120)
    first = out.read_text()
    assert "grpo: exit code 75" in first
    assert f"resume it with resume={run}" in first
    until(lambda: of_job(submitted, slurm)["JobState"] == "PENDING", "the nodes to be free", 100)
    said(["scontrol", "update", f"jobid={submitted}", "starttime=now"], slurm)  # else two minutes pass
    until(lambda: of_job(submitted, slurm)["JobState"] == "COMPLETED", "the job to end", 200)
    assert of_job(submitted, slurm)["ExitCode"] == "0:0"
    second = out.read_text().removeprefix(first)
    assert f"{run} is done" in second
    assert "grpo: exit code 0" in second
    assert not said(["pgrep", "-f", f"grpo-ray-{submitted}-"], slurm)
    until(lambda: not list(Path("/tmp").glob(f"grpo-ray-{submitted}-*")), "Ray's folders to be gone", 30)
