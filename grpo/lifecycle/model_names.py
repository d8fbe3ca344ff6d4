"""Resolve the model that an evaluation names. Needs neither torch nor transformers, so that mistakes are reported at
once."""

from __future__ import annotations

from pathlib import Path

from grpo import data
from grpo.types import UserError


def model_of(name: str) -> tuple[str, Path | None]:
    """Return the model path or hub id that a name stands for, and its recipe if the name is a run folder. A run folder
    stands for its final model.

    Raises UserError for a run without a final model, and for a missing path inside a folder of runs.
    """
    if not name.strip():
        raise UserError("the model is empty: a folder, a hub id or a run's folder")
    path = Path(name).expanduser()
    recipe = path / "config.yaml"
    if "/" in name and not path.exists() and any(path.parent.glob("*/config.yaml")):
        raise UserError(f"{name} does not exist{data.nearest_path(path)}")
    if not recipe.is_file():
        return name, None
    if not (path / "model").is_dir():
        raise UserError(
            f"{path} is a run without a final model; give a checkpoint's model (run.save_model writes them)"
        )
    return str(path / "model"), recipe
