"""Damaged input files: what cannot be read is a sentence that names the file, never another error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from grpo import config
from grpo.data.rows import read_rows
from grpo.types import UserError

ROWS: list[dict[str, Any]] = [
    {"question": f"what is {i} + {i}?", "answer": str(2 * i), "weight": i / 8, "tags": ["a", "ü"], "more": {"n": i}}
    for i in range(12)
]
RECIPE: dict[str, Any] = {
    "model": {"path": "x", "dtype": "float32"},
    "data": {"train": "x.jsonl", "template": "{question}=", "max_prompt_tokens": 6},
    "sampling": {"max_tokens": 5, "temperature": 0.7},
    "algorithm": {"prompts_per_step": 8, "group_size": 4, "kl_coef": 0.001},
    "rewards": [{"file": "reward_fns/arithmetic.py", "gold": True}],
    "run": {"steps": 2, "name": "run"},
}


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_recipe(path: Path) -> None:
    path.write_text(yaml.safe_dump(RECIPE))


def rows_of(path: Path) -> Any:
    return [dict(row.values) for row in read_rows(str(path), split="train", option="data.train")]


def recipe_of(path: Path) -> Any:
    return config.load(path, [])


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], int]] = {
    "rows.jsonl": (write_jsonl, rows_of, 600),
    "rows.parquet": (write_parquet, rows_of, 600),
    "recipe.yaml": (write_recipe, recipe_of, 200),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    """Cut short, a bit flipped, a byte replaced, a piece taken out or doubled."""
    write, read, cases = KINDS[name]
    path = tmp_path / name
    write(path)
    read(path)
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(cases):
        data = bytearray(whole)
        a, b = sorted(generator.sample(range(len(data)), 2))
        match generator.choice(("cut", "flip", "replace", "remove", "double")):
            case "cut":
                del data[a:]
            case "flip":
                data[a] ^= 1 << generator.randrange(8)
            case "replace":
                data[a] = generator.randrange(256)
            case "remove":
                del data[a : min(b, a + 16)]
            case "double":
                data[a:a] = data[a : min(b, a + 16)]
        path.write_bytes(bytes(data))
        try:
            read(path)
        except UserError as error:
            refused += 1
            said = str(error)
            assert name in said or any(f"{section}." in said or f"{section}[" in said for section in RECIPE), said
            assert "\n" not in said
            assert "Traceback" not in said
    assert refused > cases / 4
