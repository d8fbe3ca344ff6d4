"""A run that is killed and resumed is the run that was never killed: metrics, completions and weights, bit for bit.

The default suite kills and resumes runs in tests/faults.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import write_spread
from equal_runs import assert_equal_runs, untimed

from grpo.run.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8

LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank, ZeRO 2, moving reference": {
        "learner": {"zero_stage": 2},
        "algorithm": {"kl_coef": 0.01, "reference_refresh_every": 3, "minibatches_per_step": 2},
        "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    },
    "2 ranks, ZeRO 3, critic": {
        "cluster": {"learner_ranks": 2},
        "learner": {"zero_stage": 3},
        "algorithm": {"advantage": "gae", "retire_reward": 0.9},
    },
    "2 ranks, ZeRO 2": {"cluster": {"learner_ranks": 2}, "learner": {"zero_stage": 2}, "algorithm": {"max_refills": 1}},
    "1 rank, ZeRO 3": {"learner": {"zero_stage": 3}, "algorithm": {"kl_coef": 0.01}},
}


def recipe_of(make_recipe: Callable[..., Path], model: Path, layout: str) -> Path:
    sections = {name: dict(section) for name, section in LAYOUTS[layout].items()}
    folder = make_recipe(model).parent
    data = {"eval": {"sets": str(folder / "eval.jsonl"), "every": 3}}
    sections["run"] = {"steps": STEPS, "save_every": 2, "verify_every": 5}
    sections["cluster"] = {"cpus": 4} | sections.get("cluster", {})
    sections["algorithm"] |= {"prompts_per_step": 8, "group_size": 4}
    return make_recipe(model, **sections, data=data, rewards=[write_spread(folder)])


def start(recipe: Path, name: str, *overrides: str) -> subprocess.Popen[bytes]:
    with (recipe.parent / f"{name}.txt").open("ab") as console:
        return subprocess.Popen(
            [sys.executable, "-m", "grpo", "train", str(recipe), f"run.name={name}", *overrides],
            stdout=console, stderr=console, cwd=ROOT, env=os.environ,
        )  # fmt: skip


def finish(recipe: Path, name: str, *overrides: str) -> Path:
    code = start(recipe, name, *overrides).wait(timeout=400)
    assert code == 0, (recipe.parent / f"{name}.txt").read_text()[-3000:]
    return recipe.parent / "runs" / name


def wait_until(reached: Callable[[Path], Any], recipe: Path, name: str, process: subprocess.Popen[bytes]) -> None:
    """Until `reached` is true of the run's folder."""
    deadline = time.monotonic() + 200
    while not reached(recipe.parent / "runs" / name):
        assert process.poll() is None, (recipe.parent / f"{name}.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def first_step(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and '"step": 1,' in metrics.read_text()


def kill_at(
    recipe: Path, name: str, instant: float, *overrides: str, after: Callable[[Path], Any] = first_step
) -> None:
    """kill -9 `instant` seconds after `after` is true of the run's folder."""
    process = start(recipe, name, *overrides)
    wait_until(after, recipe, name, process)
    time.sleep(instant)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)


WORDS = {"SamplerActor": "; replaced sampler-0 in ", "LearnerActor": "restarting the engines"}


@pytest.mark.parametrize(
    ("layout", "actors"),
    [
        ("1 rank, ZeRO 3", ["driver", "SamplerActor"]),
        ("2 ranks, ZeRO 3, critic", ["SamplerActor", "LearnerActor"]),
        ("1 rank, ZeRO 2, moving reference", ["SamplerActor", "LearnerActor"]),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    layout: str,
    actors: list[str],
    make_model: Callable[..., Path],
    make_recipe: Callable[..., Path],
    instant: Callable[[float], float],
) -> None:
    recipe = recipe_of(make_recipe, make_model("qwen2"), layout)
    straight = finish(recipe, "straight")
    seconds = sum(
        json.loads(line).get("time/step_s", 0) for line in (straight / "metrics.jsonl").read_text().splitlines()
    )
    for actor in actors:
        if actor == "driver":
            kill_at(recipe, "killed", instant(seconds / 2), after=list_checkpoints)  # that of the second step
            assert_equal_runs(finish(recipe, "killed", "resume=auto"), straight)
            assert "resumed    " in (recipe.parent / "killed.txt").read_text()
            continue
        bereft = start(recipe, actor)
        wait_until(list_checkpoints, recipe, actor, bereft)
        time.sleep(instant(seconds / 2))
        family = psutil.Process(bereft.pid).children(recursive=True)
        [*_, lost] = [p for p in family if actor in " ".join(p.cmdline())]
        lost.kill()
        said = recipe.parent / f"{actor}.txt"
        assert bereft.wait(timeout=300) == 0, said.read_text()[-3000:]
        assert_equal_runs(recipe.parent / "runs" / actor, straight)
        assert WORDS[actor] in said.read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_twice_is_the_same_run(
    layout: str,
    make_model: Callable[..., Path],
    make_recipe: Callable[..., Path],
    instant: Callable[[float], float],
) -> None:
    recipe = recipe_of(make_recipe, make_model("qwen2"), layout)
    straight = finish(recipe, "straight")
    seconds = sum(
        json.loads(line).get("time/step_s", 0) for line in (straight / "metrics.jsonl").read_text().splitlines()
    )
    kill_at(recipe, "killed", instant(seconds))
    kill_at(recipe, "killed", instant(seconds / 2), "resume=auto")
    assert_equal_runs(finish(recipe, "killed", "resume=auto"), straight)


def test_a_mix_of_two_sets_goes_on_where_it_was(
    make_model: Callable[..., Path], make_recipe: Callable[..., Path]
) -> None:
    """Weights, a reward for each set, and an evaluation set that one of them scores."""
    model = make_model("qwen2")
    folder = make_recipe(model).parent
    rows = (folder / "train.jsonl").read_text().splitlines()
    for name, part in (("a", rows[:48]), ("b", rows[48:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    (folder / "length.py").write_text("def length(completion, row): return len(completion) / 4 + len(row['sum']) / 8\n")
    recipe = make_recipe(
        model,
        data={
            "train": [
                {"path": str(folder / "a.jsonl"), "weight": 3, "columns": {"sum": "is {sum}"}},
                {"path": str(folder / "b.jsonl"), "weight": 1, "columns": {"sum": "{sum:d}"}},
            ],
            "eval": {"sets": str(folder / "eval.jsonl"), "every": 3},
        },
        rewards=[
            {**write_spread(folder), "sets": ["a", "eval"]}, {"file": str(folder / "length.py"), "sets": ["b"]},
        ],
        run={"steps": STEPS, "save_every": 2, "verify_every": 5},
    )  # fmt: skip
    straight = finish(recipe, "straight")
    lines = untimed(straight)[1:]
    assert [(line["group/count/a"], line["group/count/b"]) for line in lines] == [(6, 2)] * STEPS
    assert [line["progress/epoch/b"] for line in lines] == [2 * step / 16 for step in range(1, STEPS + 1)]
    table = pq.read_table(straight / "samples" / "step-000001.parquet").to_pandas()
    for of, scored, abstained in (("a", "spread", "length"), ("b", "length", "spread")):
        own = table[table.prompt_id.str.startswith(of)]
        assert own[f"reward_part/{scored}"].notna().all()
        assert own[f"reward_part/{abstained}"].isna().all()
    kill_at(recipe, "killed", 0.5)
    assert_equal_runs(finish(recipe, "killed", "resume=auto"), straight)
    refused = start(recipe, "killed", "resume=auto", "data.train.0.weight=2", "run.steps=9")
    assert refused.wait(timeout=100) == 2
    assert "data.train[0].weight=2.0 was 3.0" in (recipe.parent / "killed.txt").read_text()
