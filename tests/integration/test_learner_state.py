"""What a learner captures and another restores, through DeepSpeed itself: the run goes on bit for bit.

AdamW with weight decay, clipping and a schedule: each has state that a resumed run must have, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors import safe_open
from test_learner import recorded_rows

from grpo.learner.zero.state import PARAMETER, Reader

WORKER = Path(__file__).with_name("state_process.py")

MOVING = {"kl_coef": 0.1, "reference_average": 0.25}
CASES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2 bfloat16": {"stage": 2, "dtype": "bfloat16"},
    "1 bfloat16": {"stage": 1, "dtype": "bfloat16"},
    "3 bfloat16": {"stage": 3, "dtype": "bfloat16"},
    "2 offloaded": {"stage": 2, "offload": "optimizer"},
    "3 offloaded": {"stage": 3, "offload": "parameters"},
    "2 moving reference": {"stage": 2, "algorithm": MOVING},
    "3 moving reference": {"stage": 3, "algorithm": MOVING},
    "2 critic": {"stage": 2, "algorithm": {"advantage": "gae"}},
    "3 critic": {"stage": 3, "algorithm": {"advantage": "gae"}},
}
STAGES = ["0", "1", "2", "3"]
BY_DEFAULT = {1: ["0", "3"], 2: [*STAGES, "3 bfloat16", "3 offloaded", "2 moving reference", "3 critic"]}
"""Ranks -> cases of the default suite."""
IN_FULL = {ranks: [name for name in CASES if name not in cases] for ranks, cases in BY_DEFAULT.items()}
"""Ranks -> further cases of `--full`."""


def run(folder: Path, recipe: Path, ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    folder.mkdir()
    torch.save(recorded_rows(8), folder / "rows.pt")
    job = {
        "recipe": str(recipe), "rows": str(folder / "rows.pt"), "store": str(folder / "store"),
        "out": str(folder / "out"), "cases": cases,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    logs = [(folder / f"rank-{rank}.log").open("w") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(ranks), str(folder / "job.json")],
            stdout=logs[rank], stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    codes = [process.wait(timeout=600) for process in processes]
    for log in logs:
        log.close()
    assert codes == [0] * ranks, "\n".join((folder / f"rank-{r}.log").read_text()[-3000:] for r in range(ranks))
    return [torch.load(folder / "out" / str(i) / "out.pt") for i in range(len(cases))]


def whole(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    """Every parameter and moment in the files of all ranks."""
    sizes: dict[str, int] = {}
    files = sorted(folder.glob(pattern))
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name = key.rpartition("@")[0]
                sizes[name] = sizes.get(name, 0) + opened.get_tensor(key).numel()
    with Reader(files) as reader:
        return {key: reader.whole(*key.split("/", 2), numel) for key, numel in sizes.items()}


Captured: TypeAlias = tuple[Path, Path, dict[str, dict[str, Any]]]
"""(recipe, folder of the outputs, case -> its result)"""


def capture(root: Path, model: Path, ranks: int, cases: list[str]) -> Captured:
    from conftest import write_recipe

    recipe = write_recipe(
        root,
        model,
        optimizer={"lr": 1e-2, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5},
        algorithm={"minibatches_per_step": 2},
        run={"steps": 4},
    )
    results = run(root / "job", recipe, ranks, [CASES[name] for name in cases])
    return recipe, root / "job" / "out", dict(zip(cases, results, strict=True))


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[int, Captured]:
    """ranks -> what they captured in the cases of the default suite."""
    return {
        ranks: capture(tmp_path_factory.mktemp(f"ranks-{ranks}"), make_model("llama"), ranks, cases)
        for ranks, cases in BY_DEFAULT.items()
    }


@pytest.fixture(scope="module")
def captured_in_full(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[int, Captured]:
    """ranks -> what they captured in the other cases."""
    return {
        ranks: capture(tmp_path_factory.mktemp(f"full-{ranks}"), make_model("llama"), ranks, cases)
        for ranks, cases in IN_FULL.items()
    }


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        *((ranks, case) for ranks, cases in BY_DEFAULT.items() for case in cases),
        *(pytest.param(ranks, case, marks=pytest.mark.slow) for ranks, cases in IN_FULL.items() for case in cases),
    ],
)
def test_it_goes_on_bit_for_bit(request: pytest.FixtureRequest, ranks: int, case: str) -> None:
    fixture = "captured" if case in BY_DEFAULT[ranks] else "captured_in_full"
    _, folder, results = request.getfixturevalue(fixture)[ranks]
    result = results[case]
    assert result["resumed"] == result["straight"]
    for name, tensor in result["straight_state"].items():
        assert torch.equal(tensor, result["resumed_state"][name]), name
    index = list(results).index(case)
    files = sorted((folder / str(index)).glob("rank-*.safetensors"))
    assert len(files) == ranks
    for rank, file in enumerate(files):
        again = folder / str(index) / f"again-{rank}.bin"
        with safe_open(file, "pt") as one, safe_open(again, "pt") as two:
            assert set(one.keys()) == set(two.keys())
            for key in one.keys():  # noqa: SIM118
                assert torch.equal(one.get_tensor(key), two.get_tensor(key)), key


def test_every_stage_and_number_of_ranks_captures_the_same_names_and_sizes(captured: Any) -> None:
    shapes = set()
    for ranks in (1, 2):
        for index, name in enumerate(captured[ranks][2]):
            if name not in STAGES:
                continue
            tensors = whole(captured[ranks][1] / str(index), "rank-*.safetensors")
            shapes.add(tuple(sorted((key, t.numel()) for key, t in tensors.items())))
            said = captured[ranks][2][name]["state_bytes"]
            assert said == sum(4 * t.numel() for t in tensors.values())  # known before the first is written
            assert any(key.startswith("policy/exp_avg_sq/") for key in tensors)
            assert any(key.startswith(f"policy/{PARAMETER}/") for key in tensors)
    assert len(shapes) == 1


def test_another_learning_rate_counts_from_the_first_step_on(captured: Any, tmp_path: Path) -> None:
    recipe, folder, results = captured[1]
    [result] = run(tmp_path / "job", recipe, 1, [{"stage": 0, "restore": str(folder / "0"), "lr": 5e-2}])
    before = [step["optim/lr"] for step in next(iter(results.values()))["straight"]]
    after = [step["optim/lr"] for step in result["resumed"]]
    assert [a[0] / a[1] for a in after] == pytest.approx([5 * b[0] / b[1] for b in before])  # from 1e-2, same schedule


@pytest.mark.parametrize(
    ("source_ranks", "source", "ranks"),
    [(2, 2, 1), pytest.param(2, 3, 1, marks=pytest.mark.slow), pytest.param(1, 0, 2, marks=pytest.mark.slow)],
)
def test_other_ranks_and_stages_go_on_from_it(
    source_ranks: int, source: int, ranks: int, captured: Any, tmp_path: Path
) -> None:
    """From 2 ranks at ZeRO 2 to 1 rank at each stage and back: what is restored is equal bit for bit, and what follows
    is equal up to the order of additions."""
    _, folder, results = captured[source_ranks]
    cases = [{"stage": stage, "restore": str(folder / str(source))} for stage in range(4)]
    target = tmp_path / "job"
    (recipe_of_target, _, _) = captured[ranks]
    made = run(target, recipe_of_target, ranks, cases)
    wanted = whole(folder / str(source), "rank-*.safetensors")
    expected = list(results.values())[source]["straight_state"]
    for stage, result in enumerate(made):
        got = whole(target / "out" / str(stage), "again-*.bin")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), (source, stage)
        for name, tensor in result["resumed_state"].items():
            assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=2e-5), (source, stage, name)
