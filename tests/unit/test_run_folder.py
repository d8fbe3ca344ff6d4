"""The run's folder: whose it is, and what a failed write does."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grpo import config as module
from grpo.config import Config
from grpo.run.folder import choose, create, weights_sha256
from grpo.types import UserError


def make_config(tmp_path: Path, *overrides: str) -> Config:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {path: x, dtype: float32}\ndata: {train: x}\nalgorithm: {prompts_per_step: 4, group_size: 8}\n"
        f"rewards: [{{file: twos.py}}]\nrun: {{steps: 1, tensorboard: false, dir: {tmp_path / 'runs'}}}\n"
    )
    return module.load(recipe, overrides)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create(config, "recipes/sums.yaml"), range(8)))
    assert sorted(folder.path.name for folder in folders) == ["sums", *(f"sums-{n}" for n in range(2, 9))]
    for folder in folders:
        folder.close()


def test_a_named_folder_is_taken_once(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.name=mine")
    assert choose(config, "r.yaml").is_absolute()
    create(config, "r.yaml").close()
    with pytest.raises(UserError, match=r"run\.name=mine: .*mine exists already"):
        create(config, "r.yaml")


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"run\.dir=.* cannot be made"):
        create(make_config(tmp_path), "r.yaml")


def test_a_folder_that_cannot_be_made_is_refused_before_it_is_needed(tmp_path: Path) -> None:
    """By `choose`, which `grpo check` calls: nothing is made."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=rf"^run\.dir=.*/runs cannot be made: Not a directory: {tmp_path}/runs$"):
        choose(make_config(tmp_path), "r.yaml")
    (tmp_path / "runs").unlink()
    with pytest.raises(UserError, match=r"is longer than the 255 bytes that a folder's name may have$"):
        choose(make_config(tmp_path, f"run.name={'ü' * 128}"), "r.yaml")
    choose(make_config(tmp_path, f"run.name={'ü' * 127}"), "r.yaml")
    assert list(tmp_path.glob("runs")) == []


def test_a_disk_that_is_read_only_is_refused(tmp_path: Path, make_disk: Callable[[str], Path]) -> None:
    disk = make_disk("64k")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=rf"^run\.dir={disk}/a/b: .* cannot be made: {disk} cannot be written to$"):
        choose(make_config(tmp_path, f"run.dir={disk}/a/b"), "r.yaml")


def test_a_write_that_fails_is_raised_at_the_end(tmp_path: Path) -> None:
    folder = create(make_config(tmp_path), "r.yaml")
    (folder.path / "samples").rmdir()
    folder.write_samples("step-000001", 1, [])
    with pytest.raises((OSError, ValueError)):
        folder.close()


def test_weights_have_a_hash_and_nothing_has_none(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "a.safetensors").write_bytes(b"first")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()
    with pytest.raises(RuntimeError, match="holds no weights"):
        weights_sha256(tmp_path / "absent")
