"""Reference numbers that this project did not make, read from ../shared/golden where a checkout has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))

import check

FILE = Path(__file__).resolve().parents[3] / "shared" / "golden" / "objectives.json"
needs_file = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE.name} is kept outside the project and is not here")


@needs_file
def test_every_number_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(FILE)]) == 0
    said = capsys.readouterr().out
    assert " 0 above" in said
    assert int(said.split()[0]) > 80


@needs_file
@pytest.mark.parametrize("part", ["advantages", "losses", "gradient", "kl"])
def test_a_changed_number_is_noticed(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = json.loads(FILE.read_text())
    if part == "advantages":
        cases[0]["advantages"][0]["values"][0] += 1e-8
    elif part == "losses":
        cases[1]["losses"][3]["loss"] += 1e-8
    elif part == "gradient":
        cases[1]["losses"][5]["grad_new_logprobs"][0][0] += 1e-8
    else:
        cases[0]["kl"]["k3"]["token_mean"] += 1e-8
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(cases))
    assert check.main([str(changed)]) == 1
    assert "1 above" in capsys.readouterr().out


@needs_file
def test_an_entry_without_a_function_is_an_error(tmp_path: Path) -> None:
    cases = json.loads(FILE.read_text())
    cases[0]["losses"][0]["objective"] = "unheard_of"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(cases))
    assert check.main([str(changed)]) == 2
    assert check.main([str(tmp_path / "absent.json")]) == 2
    (tmp_path / "empty.json").write_text("[]")
    assert check.main([str(tmp_path / "empty.json")]) == 1
