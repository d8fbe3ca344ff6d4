"""Two steps with the real engines, for every causal language model that vLLM and transformers share; or a refusal by
`grpo check`, from files alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from conftest import write_spread

from grpo import families as table

ROOT = Path(__file__).resolve().parents[2]


def grpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo", *arguments], capture_output=True, text=True, timeout=800, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.fixture
def family_recipe(make_recipe: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """family_recipe(family) -> a small recipe on a tiny model of it."""
    import arithmetic

    def make(family: str) -> Path:
        model = families.save(family, tmp_path / family, arithmetic.make_tokenizer())
        return make_recipe(model, rewards=[write_spread(tmp_path)], algorithm={"prompts_per_step": 4, "group_size": 4})

    return make


def trains(recipe: Path) -> None:
    """Two steps, sampler and learner apart by rounding alone, and the saved config is the model's own."""
    done = grpo("train", str(recipe))
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("run folder "))
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in (folder / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs
    metrics: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if line["step"]]
    assert len(steps) == 2
    for line in steps:
        assert 0 < line["mismatch/max"] < families.TOLERANCE
        assert line["optim/grad_norm"] > 0


def refused(recipe: Path) -> str:
    """What `grpo check` refuses it with, "" where it does not."""
    done = grpo("check", str(recipe))
    assert done.returncode in (0, 2), done.stdout + done.stderr
    return done.stderr if done.returncode else ""


SAMPLE = random.Random(20).sample(sorted(table.TRAINED - {"llama", "qwen2"}), 2)
"""Other tests of the default suite train Llama and Qwen2."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in sorted(table.TRAINED)],
)
def test_a_family_trains_two_steps(family: str, family_recipe: Callable[..., Path]) -> None:
    trains(family_recipe(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", families.SHARED)
def test_another_family_trains_two_steps_or_is_refused_from_files(
    family: str, family_recipe: Callable[..., Path]
) -> None:
    if family in table.TRAINED:
        pytest.skip("the test above trains it")
    try:
        recipe = family_recipe(family)
    except families.Unmade as error:
        pytest.skip(f"no tiny model can be made: {error}")
    if not refused(recipe):
        trains(recipe)


def test_every_family_that_vllm_and_transformers_share_is_tried() -> None:
    script = (
        "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        "served = set(ModelRegistry.get_supported_archs())\n"
        "print(sorted(family for family, name in names.items() if name in served))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == str(sorted(families.SHARED))
