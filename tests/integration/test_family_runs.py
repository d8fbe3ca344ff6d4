"""Model families with the real engines: those that docs/families.md calls trained are trained; the others agree between
sampler and learner, or are refused by `grpo check`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.families import attempt
from benchmarks.tiny_families import SHARED
from grpo.checks import families as table

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = random.Random(20).sample(sorted(table.TRAINED - {"llama", "qwen2"}), 1)
"""Other tests of the default suite train Llama and Qwen2."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in sorted(table.TRAINED)],
)
def test_a_family_trains_two_steps(family: str, tmp_path: Path) -> None:
    result = attempt(family, tmp_path)
    assert result.outcome == "trained", result.why


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_family_agrees_or_is_refused_from_files(tmp_path: Path) -> None:
    outcomes = outcomes_of(tmp_path)
    assert outcomes.keys() == set(SHARED)
    assert {family: why for family, why in outcomes.items() if why.startswith("stopped")} == {}
    assert sum(why == "agrees" for why in outcomes.values()) >= 53
    assert sum(why == "unmade" for why in outcomes.values()) <= 9


def test_some_families_agree_or_are_refused_from_files(tmp_path: Path) -> None:
    """A seeded sample of the others: of those that agree, and of those that are refused."""
    families = random.Random(20).sample(sorted(set(SHARED) - table.TRAINED - table.REFUSED_ON_CPU.keys()), 4)
    outcomes = outcomes_of(tmp_path, *families)
    assert outcomes.keys() == set(families)
    assert {family: why for family, why in outcomes.items() if why.startswith("stopped")} == {}
    assert "agrees" in outcomes.values()


def outcomes_of(results: Path, *families: str) -> dict[str, str]:
    """family -> what became of it, by `python -m benchmarks.families`; of those that stopped, also why."""
    command = [sys.executable, "-m", "benchmarks.families", *families, "--results", str(results)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {
        family: f"stopped: {found['why']}" if found["outcome"] == "stopped" else found["outcome"]
        for family, found in json.loads((results / "families.json").read_text()).items()
    }


def test_every_family_that_vllm_and_transformers_share_is_tried() -> None:
    script = (
        "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        "served = set(ModelRegistry.get_supported_archs())\n"
        "print(sorted(family for family, name in names.items() if name in served))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == str(sorted(SHARED))
