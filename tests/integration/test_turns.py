"""Every way of holding the learner that `validate` lets through, through DeepSpeed itself: built, offloaded, reloaded.

On CPU as on GPUs an offload to pinned memory gives the parameters new storage, so that whoever holds on to the old one
is seen here.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learner import recorded_rows

from grpo.config import load
from grpo.types import UserError

SCRIPT = Path(__file__).with_name("turns_process.py")
DTYPES = ("float32", "bfloat16")
STAGES = (0, 1, 2, 3)
OFFLOADS = ("none", "optimizer", "parameters")


def options(dtype: str, stage: int, offload: str, sleep: bool) -> list[str]:
    return [
        f"model.dtype={dtype}", f"learner.zero_stage={stage}", f"learner.offload={offload}",
        f"cluster.sleep={str(sleep).lower()}",
    ]  # fmt: skip


def refusal(recipe: Path, overrides: list[str]) -> str:
    """What `validate` says against these options; "" where it lets them through."""
    try:
        load(recipe, overrides)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def recipe(make_model: Callable[..., Path], make_recipe: Callable[..., Path]) -> Path:
    return make_recipe(make_model("qwen2"), algorithm={"kl_coef": 0.01}, optimizer={"lr": 0.01})


def test_what_is_refused_names_what_is_allowed(recipe: Path) -> None:
    """The product of dtype, stage, offload and sleep: wherever the refusal says "nearest", that choice passes."""
    refused = 0
    for choice in itertools.product(DTYPES, STAGES, OFFLOADS, (False, True)):
        overrides = options(*choice)
        for _ in range(3):  # one thing may be wrong after the other
            said = refusal(recipe, overrides)
            if not said:
                break
            refused += 1
            nearest = re.search(r"nearest: ([a-z_.]+)=(\w+)|needs (learner\.zero_stage)=(\w+)", said)
            assert nearest, said
            name, value = [part for part in nearest.groups() if part]
            overrides = [each for each in overrides if not each.startswith(f"{name}=")] + [f"{name}={value}"]
        assert not refusal(recipe, overrides), choice
    assert refused > 10


def pairs_of(case: list[str]) -> set[tuple[str, str]]:
    return set(itertools.combinations(case, 2))


def covering(cases: list[list[str]]) -> list[list[str]]:
    """Some of the cases, in which every pair of two options' values occurs that occurs in any."""
    chosen: list[list[str]] = []
    missing = set[tuple[str, str]]().union(*map(pairs_of, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_ways_of_holding_the_learner_that_are_allowed(recipe: Path, tmp_path: Path, every: bool) -> None:
    """Published from host memory to a new sampler, with a full check, the weights are the same on both sides, and
    nothing holds their former storage when the sampler takes the memory. Offloaded while it is perturbed, the learner
    gets its weights back bit for bit; its steps, its checkpoint and what is resumed from that are those of a learner
    that never left."""
    cases = [options(*choice) for choice in itertools.product(DTYPES, STAGES, OFFLOADS, (False, True))]
    cases = [case for case in cases if not refusal(recipe, case)]
    asleep = [case for case in cases if case[-1] == "cluster.sleep=true"]
    assert len(cases) > 15
    assert len(asleep) >= 6
    results = run(recipe, tmp_path, cases if every else covering(cases))
    for result in results:
        name = " ".join(result["overrides"])
        in_host_memory = "learner.offload=none" not in result["overrides"]
        assert result["optimizer"] == ("DeepSpeedCPUAdam" if in_host_memory else "AdamW"), name
        assert result["published"], name
        assert result["perturbed"], name
        assert result["restored"], name
        assert result["resumed"], name
        assert result["continued"], name
        if "cluster.sleep=true" in result["overrides"]:
            assert result["elsewhere"], f"{name}: the parameters were not given new storage, so this test shows nothing"
            assert result["kept"], name
            assert result["released"], f"{name}: something refers to the weights' former storage"
            assert result["like_its_twin"], name


def run(recipe: Path, tmp_path: Path, cases: list[list[str]]) -> list[dict[str, Any]]:
    torch.save(recorded_rows(7), tmp_path / "rows.pt")
    job = {
        "recipe": str(recipe), "rows": str(tmp_path / "rows.pt"), "store": str(tmp_path / "store"),
        "out": str(tmp_path / "out"), "cases": cases,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "job.json")], capture_output=True, text=True, timeout=600
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))
