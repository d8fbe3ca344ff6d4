"""The Python face without engines: configs, results, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import grpo
from grpo.config import override_texts
from grpo.lifecycle import api
from grpo.lifecycle import evaluate as evaluation
from grpo.lifecycle import train as training
from grpo.types import EngineFailure, ExitCode, Interrupted, UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "arithmetic_cpu.yaml"


def test_the_names_are_there_and_importing_the_package_is_light() -> None:
    heavy = {"torch", "ray", "transformers", "pyarrow", "numpy", "omegaconf", "cloudpickle", "grpo.types"}
    code = (
        f"import sys, grpo; print(*{heavy} & {{*sys.modules}}); print(*dir(grpo)); print(grpo.train, grpo.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, names, used = done.stdout.splitlines()
    assert loaded == ""
    assert {"Run", "UserError", "evaluate", "load_config", "train"} <= {*names.split()}
    assert used.startswith("<function train at ")
    assert grpo.UserError is UserError
    with pytest.raises(AttributeError, match="module 'grpo' has no attribute 'trian'"):
        grpo.trian  # noqa: B018


# --- configs ---------------------------------------------------------------------------------------------------------


def test_a_recipe_is_a_path_a_mapping_or_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides: dict[str, Any] = {
        "run.steps": 10, "optimizer.lr": 1e-7, "rewards[0].weight": 0.5, "rewards[0].sets": ("train", "eval"),
        "data.template": "{question}: ", "run.name": None, "data.train": Path("other.jsonl"), "run.tensorboard": False,
        "data.eval.sets": [{"path": "a.jsonl"}, "b.jsonl"],
    }  # fmt: skip
    config = grpo.load_config(RECIPE, overrides)
    assert (config.run.steps, config.optimizer.lr, config.run.name, config.run.tensorboard) == (10, 1e-7, None, False)
    assert (config.rewards[0].weight, config.rewards[0].sets) == (0.5, ("train", "eval"))
    assert config.data.template == "{question}: "
    assert [one.path for one in config.data.train] == ["other.jsonl"]
    assert [one.path for one in config.data.eval.sets] == ["a.jsonl", "b.jsonl"]
    assert grpo.load_config(yaml.safe_load(RECIPE.read_text()), overrides) == config
    assert grpo.load_config(str(RECIPE), overrides) == config
    assert grpo.load_config(config) == config
    assert grpo.load_config(config, {"run.steps": 11}).run.steps == 11


def test_a_wrong_value_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^run.steps: <object object at .*> is a object, which is no value of an option"
    ):
        grpo.load_config(RECIPE, {"run.steps": object()})
    with pytest.raises(UserError, match=r"^recipe.run.steps: .* is a set, which is no value of an option"):
        grpo.load_config({"run": {"steps": {1}}})
    with pytest.raises(UserError, match=r"^recipe: unknown option run.step; did you mean run.steps\?"):
        grpo.load_config({"run": {"step": 1}})
    with pytest.raises(UserError, match=r"unknown option run.stepps; did you mean run.steps\?"):
        grpo.load_config(RECIPE, {"run.stepps": 1})
    assert override_texts({"a": "b=c", "d": [1, {"e": "\u00e9"}]}) == ["a=b=c", 'd=[1, {"e": "\u00e9"}]']


class Layout(enum.StrEnum):
    KEY = "layout"
    COLOCATED = "colocated"


class Steps(enum.IntEnum):
    FEW = 3


class Plain(enum.Enum):
    ONE = 1


def test_values_of_subclasses_become_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tree = yaml.safe_load(RECIPE.read_text())
    tree["optimizer"]["lr"] = np.float64(1e-3)
    tree["run"]["steps"] = Steps.FEW
    tree["run"]["name"] = np.str_("mine")
    tree["cluster"] = {Layout.KEY: Layout.COLOCATED}
    config = grpo.load_config(tree)
    read = (config.optimizer.lr, config.run.steps, config.run.name, config.cluster.layout)
    assert read == (0.001, 3, "mine", "colocated")
    assert [type(value) for value in read] == [float, int, str, str]
    assert override_texts({"a": np.float64(0.5), "b": Steps.FEW, "c": Layout.COLOCATED, "d": [True, Steps.FEW]}) == [
        "a=0.5", "b=3", "c=colocated", "d=[true, 3]",
    ]  # fmt: skip
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=np.float64(0.25)))
    assert grpo.load_config(changed).optimizer.lr == 0.25
    for value, kind in ((np.int64(3), "int64"), (np.bool_(True), "bool_?"), (Plain.ONE, "Plain")):
        tree["run"]["steps"] = value
        with pytest.raises(UserError, match=rf"^recipe.run.steps: .* is a {kind}, which is no value of an option$"):
            grpo.load_config(tree)


# --- what is refused before anything starts --------------------------------------------------------------------------


def length(completion: str, row: dict[str, Any]) -> float:
    return float(len(completion))


def test_rewards_are_functions_or_paths_and_take_the_place_of_the_recipes(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(Path("/nowhere/model"))
    seen: list[Any] = []

    def check_run(config: Any, *rest: Any) -> Any:
        seen.append((config, rest))
        raise UserError("seen")

    monkeypatch.setattr(training, "check_run", check_run)
    with pytest.raises(UserError, match="seen"):
        grpo.train(recipe, {"rewards[1].weight": 2}, rewards=[str(ROOT / "reward_fns/arithmetic.py"), length])
    config, (path, *_, written) = seen[0]
    assert [(r.file, r.function, r.weight) for r in config.rewards] == [
        (str(ROOT / "reward_fns/arithmetic.py"), "arithmetic", 1.0), ("python_rewards/length.py", "length", 2.0),
    ]  # fmt: skip
    assert path == recipe
    assert not written.exists()  # removed with the call
    with pytest.raises(UserError, match="seen"):
        grpo.train(yaml.safe_load(recipe.read_text()))
    assert seen[1][1][0] == Path("python")
    with pytest.raises(UserError, match=r"^rewards\[0\] is a int; give a function or the path of a reward file"):
        grpo.train(recipe, rewards=[3])
    with pytest.raises(UserError, match="rewards is empty"):
        grpo.train(recipe, rewards=[])
    with pytest.raises(UserError, match=r"^allow is only for a resumed run: add resume='auto' or resume=PATH"):
        grpo.train(recipe, allow=["run.steps"])
    with pytest.raises(UserError, match=r"allow=run.stepps: unknown option run.stepps; did you mean run.steps\?"):
        grpo.train(recipe, allow=["run.stepps"], resume="auto")


def test_a_value_instead_of_a_list_is_refused(make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe(Path("/nowhere/model"))
    calls: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (grpo.train, {"rewards": "math_answer"}, "rewards is a list: give rewards=['math_answer']"),
        (grpo.train, {"rewards": Path("a.py")}, "rewards is a list: give rewards=['a.py']"),
        (grpo.train, {"rewards": length}, "rewards is a list: give rewards=[function]"),
        (grpo.train, {"allow": "rewards", "resume": "auto"}, "allow is a list: give allow=['rewards']"),
        (grpo.evaluate, {"data": "test.jsonl"}, "data is a list: give data=['test.jsonl']"),
        (grpo.evaluate, {"rewards": "math_answer"}, "rewards is a list: give rewards=['math_answer']"),
    ]
    for call, given, text in calls:
        with pytest.raises(UserError) as caught:
            call(*([recipe] if call is grpo.train else ["/nowhere/model", recipe]), **given)
        assert str(caught.value) == text


def test_a_built_in_recipe_gives_its_own_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on the command line: the suffix of deepscaler_1.5b_8k would be .5b_8k."""
    seen: list[Path | None] = []

    def checked(config: Any, recipe: Path | None, *rest: Any) -> Any:
        seen.append(recipe)
        raise UserError("seen")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "check_run", checked)
    monkeypatch.setattr(evaluation, "check_evaluation", checked)
    for call in (grpo.train, lambda recipe: grpo.evaluate("hub/model", recipe, data=["a.jsonl"])):
        with pytest.raises(UserError, match="seen"):
            call("deepscaler_1.5b_8k")
    assert seen == [ROOT / "recipes" / "deepscaler_1.5b_8k.yaml"] * 2


def test_one_training_at_a_time(make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(Path("/nowhere/model"))
    errors: list[str] = []

    def check_run(*_: Any) -> Any:
        def second() -> None:
            with pytest.raises(UserError) as caught:
                grpo.train(recipe)
            errors.append(str(caught.value))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        raise UserError("first")

    monkeypatch.setattr(training, "check_run", check_run)
    for _ in range(2):
        with pytest.raises(UserError, match="first"):
            grpo.train(recipe)
    busy = "another training or evaluation is running in this process; wait for it, or use another process"
    assert errors == [busy, busy]


@pytest.mark.parametrize("checked", [True, False])
def test_a_ray_of_the_caller_is_left_alone(checked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`checked`: it is found by the checks, before there is a run folder."""
    from grpo.cluster import session

    def never() -> None:
        raise AssertionError("the caller's Ray is stopped")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(session.ray, "shutdown", never)
    with (
        pytest.raises(UserError, match=r"^Ray is already running in this process: call ray.shutdown\(\) first"),
        session.session(grpo.load_config(RECIPE), None if checked else tmp_path),
    ):
        raise AssertionError("not refused")


# --- outcomes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error", "resumable", "kind", "text", "notes"),
    [
        (ExitCode.RESUMABLE, None, True, Interrupted, "the reason; resume it with grpo.train(..., resume='{run}')", []),
        (ExitCode.INTERNAL, None, False, Interrupted, "the reason; {run} has no checkpoint to resume from", []),
        (ExitCode.USAGE, UserError("mine"), False, UserError, "mine", ["{run} has no checkpoint to resume from"]),
        (ExitCode.RESUMABLE, EngineFailure("lost"), True, EngineFailure, "lost",
         ["resume it with grpo.train(..., resume='{run}')"]),
        (ExitCode.RESUMABLE, OSError(28, "full"), True, OSError, "[Errno 28] full",
         ["resume it with grpo.train(..., resume='{run}')"]),
    ],
)  # fmt: skip
def test_an_outcome_is_raised(
    code: ExitCode, error: Exception | None, resumable: bool, kind: type[BaseException], text: str, notes: list[str],
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "runs" / "a"
    outcome = training.Outcome(run=run, code=code, reason="the reason", error=error, resumable=resumable)
    monkeypatch.setattr(training, "check_run", lambda *_: (None, None))
    monkeypatch.setattr(training, "train", lambda *_: outcome)
    with pytest.raises(kind) as caught:
        grpo.train(make_recipe(Path("/nowhere/model")))
    assert str(caught.value) == text.format(run=run)
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert getattr(caught.value, "__notes__", []) == [f"The run has ended; {note.format(run=run)}" for note in notes]


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_opened(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    (run / "samples").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is not a run folder: it has no config.yaml$"):
        grpo.Run(run)
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"frst is not a run folder: it has no config.yaml; did you mean .*first"):
        grpo.Run(tmp_path / "runs" / "frst")
    opened = grpo.Run(str(run))
    assert repr(opened) == f"Run({str(run)!r})"
    assert opened.path == run
    assert (opened.accuracy, opened.metrics.num_rows, opened.samples.num_rows) == (None, 0, 0)
    with pytest.raises(UserError, match=r"has no trained model: the run has not reached its last step"):
        opened.model_path  # noqa: B018
    with pytest.raises(UserError, match=r"has no summary.json: the run has not ended, or it was killed"):
        opened.summary  # noqa: B018
    lines = [
        {"step": 0, "eval/accuracy": 0.25}, {"step": 1, "loss": 2}, {"step": 2, "eval/accuracy": 0.5, "loss": 1.5},
        {"step": 3, "loss": 1},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert opened.metrics.to_pydict() == {
        "step": [0, 1, 2, 3], "eval/accuracy": [0.25, None, 0.5, None], "loss": [None, 2.0, 1.5, 1.0],
    }  # fmt: skip
    assert opened.accuracy == 0.5
    (run / "metrics.jsonl").write_text("{\n" + json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:1 is damaged"):
        opened.metrics  # noqa: B018
    for name, part in (("eval-000000", "a"), ("step-000002", "b"), ("step-000001", "a")):
        table = pa.table({"step": [int(name[-1])], "completion": [name], f"reward_part/{part}": [1.0]})
        pq.write_table(table, run / "samples" / f"{name}.parquet", write_page_checksum=True)
    assert opened.samples.to_pydict() == {
        "kind": ["step", "step", "eval"], "step": [1, 2, 0],
        "completion": ["step-000001", "step-000002", "eval-000000"],
        "reward_part/a": [1.0, None, 1.0], "reward_part/b": [None, 1.0, None],
    }  # fmt: skip
    (run / "samples" / "step-000003.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"step-000003.parquet cannot be read"):
        opened.samples  # noqa: B018
    (run / "model").mkdir()
    (run / "summary.json").write_text('{"steps": 3}')
    assert (opened.model_path, opened.summary) == (run / "model", {"steps": 3})


def test_the_environment_of_a_block_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.cluster import session

    monkeypatch.setenv("GRPO_TEST_A", "mine")
    monkeypatch.delenv("GRPO_TEST_B", raising=False)
    with session._environment({"GRPO_TEST_A": "theirs", "GRPO_TEST_B": "theirs"}):
        assert (os.environ["GRPO_TEST_A"], os.environ["GRPO_TEST_B"]) == ("theirs", "theirs")
    assert os.environ["GRPO_TEST_A"] == "mine"
    assert "GRPO_TEST_B" not in os.environ


def test_the_results_of_an_evaluation_have_its_samples(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    pq.write_table(pa.table({"reward": [1.0]}), tmp_path / "samples" / "000000.parquet", write_page_checksum=True)
    assert api.EvaluationResult(path=tmp_path, sets={}).samples["reward"].to_pylist() == [1.0]
