"""The source files that a reward file imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.rewards import imports
from grpo.rewards.imports import imported, reward_sources
from grpo.types import UserError


def write(folder: Path, *files: str) -> Path:
    """Write empty files, and f.py, which imports the names of all of them and json and pytest."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    names = sorted({file.partition("/")[0].removesuffix(".py") for file in files})
    (folder / "f.py").write_text(f"import json, pytest, {', '.join(names)}\n")
    return folder / "f.py"


def names(file: Path) -> list[str]:
    return [str(path) for path in sorted(imported(file, Path()))]


def test_a_package_precedes_a_module_and_a_module_a_plain_folder(tmp_path: Path) -> None:
    file = write(
        tmp_path, "both/__init__.py", "both/inner.py", "both.py", "rules.py", "rules/data.py", "plain/part.py",
        "both/.cache/copy.py", "both/__pycache__/old.py",
    )  # fmt: skip
    assert names(file) == ["both/__init__.py", "both/inner.py", "plain/part.py", "rules.py"]


def test_an_installed_package_precedes_a_plain_folder(tmp_path: Path) -> None:
    """`numpy/` without __init__.py is no package that Python would import here."""
    assert names(write(tmp_path, "numpy/array.py", "torch/__init__.py")) == ["torch/__init__.py"]


def test_a_huge_folder_is_refused_and_not_walked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "MAX_ENTRIES", 5)
    file = write(tmp_path, *(f"small/{i}.py" for i in range(5)))
    assert len(reward_sources(file)) == 6
    file = write(tmp_path, *(f"huge/{i}/{name}.txt" for i in range(3) for name in "ab"))
    with pytest.raises(UserError, match=rf"imports huge, and the folder {tmp_path}/huge has more than 5 files"):
        imported(file, Path())
