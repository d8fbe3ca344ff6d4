"""Reference numbers that this project did not make, read from ../shared/golden where a checkout has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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


def a_case() -> dict[str, Any]:
    """Two rows of two tokens with ratio 1: by hand, -mean of the advantages."""
    logprobs = [[-1.0, -2.0], [-0.5, -0.25]]
    return {
        "inputs": {
            "lens": [2, 1], "mask": [[1, 1], [1, 0]], "rollout": logprobs, "old": logprobs, "new": logprobs,
            "ref": [[-1.0, -2.0], [-0.5, -0.25]], "rewards": [1.0, 0.0], "adv": [1.0, -1.0], "group": [0, 0],
        },
        "advantages": [{"name": "group_norm", "params": {"divide_by_std": False}, "values": [0.5, -0.5]}],
        "losses": [
            {
                "objective": "ppo_clip", "aggregation": "token-mean", "clip_eps_low": 0.2, "clip_eps_high": 0.2,
                "new_logprobs": "inputs.new", "loss": -1 / 3, "grad_new_logprobs": [[-1 / 3, -1 / 3], [1 / 3, 0.0]],
            }
        ],
        "kl": {"k3": {"per_token": [[0.0, 0.0], [0.0, 0.0]], "token_mean": 0.0, "grad": [[0.0, 0.0], [0.0, 0.0]]}},
    }  # fmt: skip


def verdict(cases: Any, tmp_path: Path) -> int:
    file = tmp_path / "cases.json"
    file.write_text(cases if isinstance(cases, str) else json.dumps(cases))
    return check.main([str(file)])


def test_a_case_made_by_hand_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict([a_case()], tmp_path) == 0
    assert capsys.readouterr().out.startswith("6 comparisons, 0 above")


def change(case: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    at: Any = case
    for name in parents:
        at = at[int(name)] if name.isdigit() else at[name]
    if value is ...:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("lossess", [], "did you mean losses?"),
        ("extra", [], "the case has extra"),
        ("losses/0/kl_coef", 0.1, "loss ppo_clip has kl_coef"),
        ("losses/0/clip_eps_hihg", 0.2, "did you mean clip_eps_high?"),
        ("losses/0/clip_eps_high", ..., "lacks clip_eps_high"),
        ("losses/0/new_logprobs", ..., "lacks new_logprobs"),
        ("losses/0/scale", 2.0, "loss ppo_clip has scale"),
        ("losses/0/importance_correction", {"level": "token", "mode": "truncate", "cpa": 2}, "did you mean cap?"),
        ("advantages/0/params/std_epz", 1.0, "did you mean std_eps?"),
        ("advantages/0/name", "rebel", "advantage rebel"),
        ("advantages/0", {"name": "reinforce_pp", "params": {"gamma": 1, "whiten": "none"}, "values": []}, "'none'"),
        ("kl/k3/token_mean", ..., "kl k3 lacks token_mean"),
        ("kl/k4", {"per_token": [], "token_mean": 0, "grad": []}, "kl k4"),
        ("inputs/mask", "1101", "cannot be evaluated"),
        ("inputs/new", None, "cannot be evaluated"),
        ("inputs/group", [0, 1], "cannot be evaluated"),
        ("advantages/0/values", [0.5], "has shape [1], expected [2]"),
    ],
)
def test_nothing_is_passed_over(
    path: str, value: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = a_case()
    change(case, path, value)
    assert verdict([a_case(), case], tmp_path) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "case 1" in said


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kl/k3/per_token/1/1", 1e-8),
        ("losses/0/grad_new_logprobs/1/1", 1e-8),
        ("losses/0/loss", float("nan")),
        ("advantages/0/values/1", -0.5 + 1e-8),
    ],
)
def test_numbers_off_the_mask_count_too(path: str, value: Any, tmp_path: Path) -> None:
    case = a_case()
    change(case, path, value)
    assert verdict([case], tmp_path) == 1


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", "3", "[null]", '[{"inputs": {}}]', "[[]]"])
def test_files_that_are_no_cases(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(text, tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_case_without_numbers_is_no_success(tmp_path: Path) -> None:
    case = a_case()
    for section in ("advantages", "losses", "kl"):
        case[section] = []
    case["kl"] = {}
    assert verdict([a_case(), case], tmp_path) == 2
