"""What a person sees of a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.metrics.measures import HEADLINE
from grpo.run import console as console_module
from grpo.run.console import Console, where_the_gradient_went, wrapped

METRICS = {
    "reward/mean": 0.5, "optim/grad_norm": 1.25, "time/step_s": 2.0, "gradient/sampled": 40.0, "gradient/failed": 0.0,
    "gradient/no_spread": 10.0, "gradient/contributing": 30.0,
}  # fmt: skip


def test_the_account_is_one_sum() -> None:
    assert where_the_gradient_went(METRICS) == "40 token uses = 10 no_spread + 30 contributing"
    assert where_the_gradient_went({"gradient/sampled": 0.0}) == "0 token uses = 0"


def test_a_step_is_one_line_off_a_terminal_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(steps=3, log=tmp_path / "log.txt") as console:
        console.say("[not markup]")
        console.step(1, METRICS)
    line = (
        "step 1/3: reward/mean 0.5 optim/grad_norm 1.25 time/step_s 2; 40 token uses = 10 no_spread + 30 contributing"
    )
    assert len(line) < 120
    assert capsys.readouterr().out.splitlines() == ["[not markup]", line]
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [entry.split(" ", 1)[1] for entry in logged] == ["[not markup]", line]


def test_on_a_terminal_there_is_a_live_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Console(steps=1, log=None) as console:
        console.step(1, METRICS)
    shown = capsys.readouterr().out
    for part in ("1/1", "reward/mean", "0.5", "gradient/no_spread", "25.0%", "75.0%"):
        assert part in shown


def test_a_run_outlives_the_one_who_reads_it_from_a_pipe(tmp_path: Path) -> None:
    """`grpo train ... | head`: the log has everything, and nobody is told of a pipe."""
    program = (
        "import sys; from pathlib import Path; from grpo.run.console import Console\n"
        "with Console(steps=1, log=Path(sys.argv[1])) as console:\n"
        "    console.say('one')\n    console.say('two')\n"
        "print('three')\n"
    )
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody:
        ended = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "log.txt")], stdout=nobody, stderr=subprocess.PIPE,
            text=True, timeout=60, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


@pytest.fixture
def off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing that says how wide a line may be."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(console_module.shutil, "get_terminal_size", lambda fallback: os.terminal_size(fallback))


LONG = "placed     " + ", ".join(f"sampler-{i} on 10.0.0.{i}" for i in range(12))


def test_lines_fit_120_columns_and_the_log_has_them_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], off_a_terminal: None
) -> None:
    metrics = dict.fromkeys(HEADLINE, 0.123456) | METRICS
    with Console(steps=300, log=tmp_path / "log.txt") as console:
        console.step(207, metrics)
        console.say(LONG)
        console.say(f"short\n/a/{'long/' * 40}path is not broken, while words after it are " + "said " * 20)
    shown = capsys.readouterr().out.splitlines()
    step = [line for line in shown if "step" in line.partition(":")[0] or line.startswith(" " * len("step 207/300: "))]
    assert "".join(step).replace(" " * len("step 207/300: "), " ") == (
        "step 207/300: reward/mean 0.5 group/no_spread_fraction 0.1235 completion/tokens_mean 0.1235 "
        "completion/truncated_fraction 0.1235 policy/entropy 0.1235 policy/kl_ref 0.1235 policy/clip_fraction 0.1235 "
        "mismatch/rms 0.1235 optim/grad_norm 1.25 time/step_s 2; 40 token uses = 10 no_spread + 30 contributing"
    )
    placed = shown.index(next(line for line in shown if line.startswith("placed")))
    assert " ".join(line.strip() for line in shown[placed : shown.index("short")]) == LONG
    assert [line for line in shown if len(line) > 120] == [f"/a/{'long/' * 40}path"]
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert len(logged) == 4
    assert logged[1].endswith(LONG)


def test_columns_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert wrapped(LONG) == LONG
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, wrapped(LONG).splitlines())) <= 40
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(console_module.shutil, "get_terminal_size", lambda fallback: os.terminal_size((60, 24)))
    assert max(map(len, wrapped(LONG).splitlines())) <= 60
    monkeypatch.setattr(console_module.shutil, "get_terminal_size", lambda fallback: os.terminal_size((400, 24)))
    assert 60 < max(map(len, wrapped(LONG).splitlines())) <= 120
