"""Syncs broken on purpose, on models of real width: what the plain and the full check refuse; healthy ones pass.

With SmolLM2 (recipes/smollm2.py), and with a random model of the same width. The default suite breaks syncs of tiny
models (test_sync_into_vllm.py, unit/test_weight_sync.py) and trains a model of this width (test_real_models.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_in

ROOT = Path(__file__).resolve().parents[2]
MIDDLE = "model.layers.6"


@pytest.fixture(scope="module")
def wide() -> Path:
    return stand_in.make_wide()


def check(model: Path, dtype: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """The rows of `python -m benchmarks.weight_check` by fault."""
    command = [sys.executable, "-m", "benchmarks.weight_check", str(model), "--dtype", dtype, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return {row["fault"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}


def faults(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--fault", name)]


FAULTS = {
    f"stale:{MIDDLE}.": False,
    "stale:lm_head": False,
    f"swap:{MIDDLE}.mlp.gate_proj.weight,{MIDDLE}.mlp.up_proj.weight": True,
    "roll:model.embed_tokens.weight": True,
}
"""Fault -> whether the plain check sees it."""


@pytest.mark.slow
def test_a_random_model_of_real_width_in_bfloat16(wide: Path) -> None:
    """A healthy sync passes both checks; a layer and a projection that never follow pass the plain one, since a step at
    1e-6 moves less than rounding, and not the full one; exchanged tensors are seen at once."""
    rows = check(wide, "bfloat16", *faults("none", *FAULTS))
    healthy = rows.pop("none")
    assert not healthy["caught"]
    assert healthy["full_q90"] < 1.5  # well below the limit of 2
    assert all(row["caught"] for row in rows.values())
    assert {fault: row["plain"] for fault, row in rows.items()} == FAULTS


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_smollm2_refuses_every_broken_sync_and_no_healthy_one(dtype: str, smollm2_model: Path) -> None:
    rows = check(smollm2_model, dtype)
    healthy = rows.pop("none")
    assert not healthy["caught"]
    assert len(rows) >= 12
    missed = {fault for fault, row in rows.items() if not row["caught"]}
    assert not missed
