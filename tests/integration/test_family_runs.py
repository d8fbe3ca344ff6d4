"""Families that docs/families.md calls trained, with the real engines; two of the others beside them with --full.

`python -m benchmarks.families` tries them all.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.families import attempt
from benchmarks.tiny_families import SHARED
from grpo import families as table

SAMPLE = random.Random(20).sample(sorted(table.TRAINED - {"llama", "qwen2"}), 2)
"""Other tests of the default suite train Llama and Qwen2."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in sorted(table.TRAINED)],
)
def test_a_family_trains_two_steps(family: str, tmp_path: Path) -> None:
    result = attempt(family, tmp_path)
    assert result.outcome == "trained", result.why


def test_every_family_that_vllm_and_transformers_share_is_tried() -> None:
    script = (
        "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        "served = set(ModelRegistry.get_supported_archs())\n"
        "print(sorted(family for family, name in names.items() if name in served))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == str(sorted(SHARED))
