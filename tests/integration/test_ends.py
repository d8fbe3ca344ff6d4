"""How runs end when they are not allowed to finish: named, with the right exit code, and with nothing left behind.

The other ends of the default suite are in tests/faults.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from grpo.run.checkpoints import list_checkpoints, read

ROOT = Path(__file__).resolve().parents[2]


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[str]:
    names = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                names.append(" ".join(process.cmdline())[:80])
        except psutil.NoSuchProcess:
            continue
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strike", "code", "words"),
    [
        ("kill sampler", None, "sampler-0 died"),  # while it samples, the learner's state can be saved
        ("SIGTERM to the group", 75, "grpo: interrupted by SIGTERM; resume it with resume="),
        ("Ctrl-C thrice", None, "grpo: interrupted by SIGINT; "),
        ("SIGKILL", -signal.SIGKILL, ""),
    ],
)
def test_an_end_in_mid_run(
    strike: str, code: int | None, words: str, make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="grpo-ends-"))  # short: Ray's sockets lie below it
    recipe = make_recipe(make_model("qwen2"), run={"steps": 100000}, cluster={"max_replacements": 0, "max_restarts": 0})
    run = recipe.parent / "runs" / "run"
    with (recipe.parent / "console.txt").open("w") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo", "train", str(recipe)], stdout=console, stderr=console, text=True, cwd=ROOT,
            env=os.environ | {"TMPDIR": str(temporary)}, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
                assert process.poll() is None, (recipe.parent / "console.txt").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
            family = children_of(process)
            if strike == "kill sampler":
                [sampler] = [p for p in family if "SamplerActor" in " ".join(p.cmdline())]
                sampler.kill()
            elif strike == "SIGTERM to the group":  # as `timeout` sends it
                os.killpg(process.pid, signal.SIGTERM)
            elif strike == "Ctrl-C thrice":
                for _ in range(3):
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.1)
            else:
                process.send_signal(getattr(signal, strike))
            ended = process.wait(timeout=60)
            if code is None:  # depends on whether the step under way was already saved
                code = 75 if list_checkpoints(run) else 1
                if strike == "Ctrl-C thrice":
                    words += "resume it with resume=" if code == 75 else "there is no checkpoint to resume from"
            assert ended == code
        finally:
            if process.poll() is None:
                process.kill()
    said = (recipe.parent / "console.txt").read_text()
    assert words in said
    assert "Error" not in said or strike == "kill sampler"
    deadline = time.monotonic() + 15
    while (alive(family) or list(temporary.glob("grpo-ray-*"))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert alive(family) == []
    assert list(temporary.glob("grpo-ray-*")) == []
    if code == 75:  # the step was finished and saved
        [checkpoint] = list_checkpoints(run)
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert read(checkpoint).step == steps[-1] == json.loads((run / "summary.json").read_text())["steps"]
    if strike != "SIGKILL":
        summary = json.loads((run / "summary.json").read_text())
        assert summary["exit_reason"] != "done"


JUDGE = """
def judge(completion, row, info):
    if info["step"] >= 3:
        raise RuntimeError("judge server went away")
    return float(len(completion) % 3)
"""


def test_an_outage_of_a_reward_saves_the_last_good_step(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    """The first try can be repeated; the second one fails in the same step and cannot."""
    recipe = make_recipe(make_model("qwen2"), run={"steps": 6})
    (recipe.parent / "judge.py").write_text(JUDGE)
    run = recipe.parent / "runs" / "run"
    command = [sys.executable, "-m", "grpo", "train", str(recipe), f"rewards.0.file={recipe.parent / 'judge.py'}",
               "rewards.0.name=judge", "rewards.0.gold=false", "resume=auto"]  # fmt: skip
    for code in (75, 2):
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
        assert ended.returncode == code, ended.stdout[-2000:] + ended.stderr[-2000:]
        assert "judge server went away" in ended.stdout
        assert f"the state after step 2 is saved; resume it with resume={run}" in ended.stdout
        assert [read(folder).step for folder in list_checkpoints(run)] == [2]
        summary = json.loads((run / "summary.json").read_text())
        assert summary["steps"] == 2
        assert "accuracy_after" not in summary
