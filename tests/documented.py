"""The recipes and the YAML blocks of the documentation, for the tests that load them and those that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OWN = ("arithmetic_cpu", "reasoning_cpu", "smollm2_word_problems", "smollm2_wider")
"""Not of the field: no source and no published result."""
RECIPES = {p.stem: p for p in sorted((ROOT / "recipes").glob("*.yaml")) if p.stem not in OWN}

SMALL = """
model: {path: some/folder}
data: {train: train.jsonl}
algorithm: {prompts_per_step: 8, group_size: 4}
rewards: [{file: reward_fns/arithmetic.py}]
run: {steps: 3}
"""


def blocks(language: str) -> list[Any]:
    """Every block of the language in README.md and docs/, as a parameter with page and line for its name."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        for block in re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M):
            line = text[: block.start()].count("\n") + 1
            found.append(pytest.param(block[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def completed(block: str, folder: Path) -> Path:
    """The recipe that a block is a part of: laid on SMALL, section by section; lists are replaced."""
    recipe = folder / "block.yaml"
    recipe.write_text(yaml.safe_dump(_laid_on(yaml.safe_load(SMALL), yaml.safe_load(block))))
    return recipe


def _laid_on(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {key: _laid_on(base.get(key), over[key]) if key in over else base[key] for key in {**base, **over}}
