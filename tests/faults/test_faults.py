"""Fault x phase, with real processes on the tiny model: the outcome, the time to notice, and what is left behind.

For each cell: the exit code and what was said; whatever survives ends as the run that nothing happened to: metrics,
completions and weights, bit for bit; nothing of the run is alive 15 s after its end; the checkpoint before the fault
loads; what is resumable, resumes to the same end. The default suite runs a few cells; `--full` adds half of the
others, drawn by the seed that it prints, and with GRPO_TEST_ALL=1 all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import drawn
from equal_runs import assert_equal_runs

from grpo.run.checkpoints import list_checkpoints, read

ROOT = Path(__file__).resolve().parents[2]
STRUCK = Path(__file__).with_name("struck.py")
STEPS = 6
DEADLINE_S = 20
"""cluster.step_timeout_s of the cells where something hangs."""
PHASES = ("start", "sampling", "scoring", "learning", "sync", "saving")
DEFAULT = {
    ("disk full", "saving"),
    ("node lost", "learning"),
    ("driver killed", "sync"),
    ("SIGTERM to all", "learning"),
    ("sampler killed", "sampling"),
}
"""Cells of the default suite, where test_ends strikes, too."""


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    notice_s: float
    """From the fault to the end of the run, or to the line that says what is done about it."""
    done: str | None = None
    """Of a run that survives: the line."""


DONE = "done"
NO_CHECKPOINT = "there is no checkpoint to resume from"


def expected(fault: str, phase: str) -> Outcome:
    early = phase == "start"
    match fault:
        case "sampler killed" if early:
            return Outcome(1, "sampler-0 died while waiting for the engines to load", 30)
        case "sampler killed":
            return Outcome(0, "sampler-0 died", 60, "; replaced sampler-0 in ")
        case "learner killed" if early:
            return Outcome(1, "learner-0 died while waiting for the engines to load", 30)
        case "learner killed":
            return Outcome(0, "learner-0 died", 30, "restarting the engines after step 2")
        case "sampler hung" | "learner hung":
            return Outcome(0, f"waited {DEADLINE_S} s for ", DEADLINE_S + 30, "restarting the engines after step 2")
        case "reward worker killed" if phase == "learning":  # it had nothing to do
            return Outcome(0, "step 6/6", 10)
        case "reward worker killed":
            return Outcome(0, "worker_died", 10, None)
        case "reward worker hung":
            return Outcome(0, "timeout", 10, None)
        case "node lost" if early:
            return Outcome(1, "the node of", 30)
        case "node lost":
            return Outcome(0, "the node of", 30, "restarting the engines after step 2")
        case "driver killed":
            return Outcome(-9, "", 5)
        case "SIGTERM" | "SIGUSR1" if early:
            return Outcome(1, f"interrupted by {fault}; {NO_CHECKPOINT}", 30)
        case "SIGTERM" | "SIGUSR1":
            return Outcome(75, f"interrupted by {fault}; resume it with resume=", 30)
        case "SIGTERM to all" | "SIGUSR1 to all":
            return Outcome(75, f"interrupted by {fault.removesuffix(' to all')}; resume it with resume=", 30)
        case "Ctrl-C twice" if early:
            return Outcome(1, f"interrupted by SIGINT; {NO_CHECKPOINT}", 30)
        case "Ctrl-C twice":
            return Outcome(75, "interrupted by SIGINT; resume it with resume=", 30)
        case "disk full":
            return Outcome(75, "stopped by a full disk: ", 60)
    raise AssertionError(fault)


CELLS = [
    *((fault, phase) for fault in ("sampler killed", "learner killed", "driver killed", "SIGTERM", "Ctrl-C twice",
                                   "node lost") for phase in PHASES),
    *(("sampler hung", phase) for phase in ("sampling", "sync")),
    *(("learner hung", phase) for phase in ("learning", "sync", "saving")),
    *(("SIGUSR1", phase) for phase in ("learning", "saving")),
    ("SIGTERM to all", "learning"),
    ("SIGUSR1 to all", "sampling"),
    *(("reward worker killed", phase) for phase in ("scoring", "learning")),
    ("reward worker hung", "scoring"),
    *(("disk full", phase) for phase in ("scoring", "saving")),
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import write_recipe, write_spread

    folder = tmp_path_factory.mktemp("faults")
    return write_recipe(
        folder, make_model("qwen2"),
        algorithm={"prompts_per_step": 8, "group_size": 4, "kl_coef": 0.01},
        learner={"zero_stage": 2},
        run={"steps": STEPS, "save_every": 2},
        cluster={"cpus": 4},
        rewards=[{**write_spread(folder), "timeout_s": 3.0}],
    )  # fmt: skip


def write_slow(folder: Path) -> Path:
    """The same reward, and in step 4 so slow that its worker has work when it is struck."""
    from conftest import SPREAD

    slow = "    if info['step'] == 4:\n        time.sleep(0.05)\n"
    head, body = SPREAD.replace("(completion, row)", "(completion, row, info)").split(":\n")
    (folder / "spread.py").write_text(f"import time\n{head}:\n{slow}{body}")
    return folder / "spread.py"


def train(recipe: Path, name: str, *overrides: str) -> int:
    with (recipe.parent / f"{name}.txt").open("ab") as console:
        command = [sys.executable, "-m", "grpo", "train", str(recipe), f"run.name={name}", *overrides]
        return subprocess.run(command, stdout=console, stderr=console, cwd=ROOT, timeout=300, check=False).returncode


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    """The folder of the run that nothing happens to."""
    assert train(recipe, "straight") == 0
    run = recipe.parent / "runs" / "straight"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    return run


def alive(family: list[tuple[int, float]]) -> list[str]:
    names = []
    for pid, created in family:
        try:
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                names.append(" ".join(process.cmdline())[:100])
        except psutil.NoSuchProcess:
            continue
    return names


def marked(mark: str) -> list[str]:
    """Processes with `mark` in their environment."""
    names = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                names.append(" ".join(process.cmdline())[:100])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return names


OTHERS = [cell for cell in CELLS if cell not in DEFAULT]


@pytest.mark.parametrize(("fault", "phase"), [*sorted(DEFAULT), *drawn(OTHERS, len(OTHERS) // 2)])
def test_a_fault(
    fault: str, phase: str, recipe: Path, straight: Path, tmp_path: Path, make_disk: Callable[[str], Path]
) -> None:
    outcome = expected(fault, phase)
    name = f"{fault} {phase}".replace(" ", "-")
    runs = recipe.parent / "runs"
    if fault == "disk full":
        runs = make_disk("24m")
    notes, console = tmp_path / "notes.json", tmp_path / "console.txt"
    overrides = [f"run.name={name}", f"run.dir={runs}"]
    if fault == "reward worker killed":
        overrides.append(f"rewards.0.file={write_slow(tmp_path)}")
    if "hung" in fault:
        overrides.append(f"cluster.step_timeout_s={DEADLINE_S}")
    mark = f"cell-{os.getpid()}-{name}"
    with console.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(STRUCK), fault, phase, str(notes), "train", str(recipe), *overrides],
            stdout=out, stderr=out, cwd=ROOT, env=os.environ | {"FAULT_CELL": mark, "FULL_DISK": str(runs)},
        )  # fmt: skip
        try:
            noticed = None
            deadline = time.monotonic() + 280
            while process.poll() is None and time.monotonic() < deadline:
                if noticed is None and outcome.done is not None and outcome.done in console.read_text():
                    noticed = time.time()
                time.sleep(0.05)
            ended = time.time()
            code = process.wait(timeout=1)
        finally:
            process.kill()
            process.wait()
    said = console.read_text()
    struck = json.loads(notes.read_text())
    assert code == outcome.code, said[-3000:]
    assert outcome.said in said or outcome.said in json.dumps(failures(runs / name)), said[-3000:]
    if outcome.done is not None:
        assert noticed is not None, said[-3000:]
    took = (noticed or ended) - struck["at"]
    print(f"{fault} | {phase} | exit {code} | {took:.1f} s")
    assert took < outcome.notice_s
    until = time.monotonic() + 15
    while (left := alive(struck["family"]) + marked(mark)) and time.monotonic() < until:
        time.sleep(0.5)
    assert left == []
    if "Traceback" in said:
        raise AssertionError(said[-3000:])
    run = runs / name
    every = list_checkpoints(run)
    if phase != "start":
        assert [read(folder).step for folder in every] != []  # each is read whole
    if outcome.code == 0 and "reward worker" not in fault:
        assert_equal_runs(run, straight)
    if fault == "disk full":
        (run.parent / "filler").unlink()
    if outcome.code in (75, -9) and phase != "start":
        assert train(recipe, name, "resume=auto", f"run.dir={runs}") == 0
        assert_equal_runs(run, straight)


def failures(run: Path) -> list[str]:
    """Kinds of the failed rollouts of a run."""
    import pyarrow.parquet as pq

    files = sorted((run / "samples").glob("step-*.parquet"))
    return [kind for file in files for kind in pq.read_table(file)["failed"].to_pylist() if kind is not None]
