"""What `resume=` means: which folder, which checkpoint, and what is never touched."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_checkpoints import make
from test_driver import make_config

from grpo.config import Config, TrainSetConfig
from grpo.data import Cursor, MixedCursor
from grpo.run import checkpoints, resume
from grpo.run.checkpoints import plain
from grpo.run.folder import create, reopen, truncate_after
from grpo.types import Prompt, UserError


def config_in(tmp_path: Path, **run: Any) -> Config:
    config = make_config(tmp_path)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "runs"), **run))


def finished(folder: Path, steps: int) -> None:
    (folder / "summary.json").write_text(json.dumps({"exit_reason": "done", "steps": steps}))
    (folder / "model").mkdir()


def test_a_finished_run_is_done_and_nothing_of_it_is_touched(tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=8)
    folder = create(config, "exp.yaml")
    folder.close()
    finished(folder.path, steps=8)
    make(folder.path, 4)
    for asked in ("auto", str(folder.path)):
        origin = resume.find(asked, config, "exp.yaml")
        assert origin.done
        assert origin.run == folder.path
        assert not resume.find(asked, config_in(tmp_path, steps=9), "exp.yaml").done  # it is asked for more
    assert (folder.path / "model").is_dir()
    (folder.path / "summary.json").write_text(json.dumps({"exit_reason": "failed: x", "steps": 8}))
    assert not resume.find("auto", config, "exp.yaml").done


def test_auto_takes_the_newest_folder_of_this_recipe_only(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    for recipe in ("exp.yaml", "exp-2.yaml", "exp.yaml"):  # exp, exp-2 (of another recipe), exp-3
        create(config, f"recipes/{recipe}").close()
    assert resume.newest(config, "elsewhere/exp.yaml") == tmp_path / "runs" / "exp-3"
    assert resume.newest(config, "exp-2.yaml") == tmp_path / "runs" / "exp-2"
    (tmp_path / "runs" / "exp-4" / "model").mkdir(parents=True)  # somebody's
    assert resume.newest(config, "exp.yaml") == tmp_path / "runs" / "exp-3"
    assert resume.newest(config, "ex.yaml") is None


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    config = config_in(tmp_path, name="project")
    (tmp_path / "runs" / "project" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"project is not a run folder \(it has no config.yaml\)"):
        resume.find("auto", config, "exp.yaml")
    assert resume.find("auto", config_in(tmp_path, name="new"), "exp.yaml") == resume.Origin()


def test_a_half_written_checkpoint_cannot_be_asked_for(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    folder = create(config, "exp.yaml")
    folder.close()
    whole = make(folder.path, 2)
    partial = whole.with_name("step-000004.partial")
    partial.mkdir()
    assert resume.find(str(whole), config, "exp.yaml").checkpoint == whole
    with pytest.raises(UserError, match="is neither a run folder nor a checkpoint"):
        resume.find(str(partial), config, "exp.yaml")


def test_what_another_process_did_meanwhile_is_not_cut(tmp_path: Path) -> None:
    """A start that has chosen checkpoint 10 must not undo what the run went on to, nor its end."""
    config = config_in(tmp_path, steps=40)
    folder = create(config, "exp.yaml")
    folder.log_metrics(10, {})
    make(folder.path, 10)
    origin = resume.find("auto", config, "exp.yaml")
    make(folder.path, 20)
    folder.log_metrics(20, {})
    folder.close()

    def go_on() -> None:
        reopen(folder.path, config, 10, lambda: resume.state_of(folder.path) == origin.state).close()

    with pytest.raises(UserError, match=r"another process has worked in .* since this one looked at it; start again"):
        go_on()
    assert (folder.path / "checkpoints" / "step-000020").is_dir()
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 2
    origin = resume.find("auto", config, "exp.yaml")
    go_on()
    assert not (folder.path / "checkpoints" / "step-000020").exists()
    origin = resume.find("auto", config, "exp.yaml")
    finished(folder.path, steps=40)
    with pytest.raises(UserError, match="start again"):
        go_on()
    assert (folder.path / "summary.json").exists()


def test_a_run_of_that_name_with_other_options_is_neither_done_nor_begun_again(tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=8, name="one")
    folder = create(config, "exp.yaml")
    folder.log_metrics(3, {})
    folder.close()
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=7))
    with pytest.raises(UserError, match=r"one is another run: data.seed=7 was 0 .*choose another run.name"):
        resume.refuse_other_run(folder.path, other, ())
    resume.refuse_other_run(folder.path, other, ("data.seed",))
    resume.refuse_other_run(folder.path, config, ())

    def prepare(changed: Config) -> Any:
        origin = resume.find("auto", changed, "exp.yaml")
        plan: Any = SimpleNamespace(config=changed, prompts=[], fingerprints={})
        return resume.prepare(origin, plan, [])

    with pytest.raises(UserError, match=r"is another run: data.seed"):
        prepare(other)
    finished(folder.path, steps=8)
    with pytest.raises(UserError, match=r"one is done and has no checkpoint to resume from .*another run.name"):
        prepare(config_in(tmp_path, steps=9, name="one"))
    (folder.path / "config.yaml").write_text("[")
    with pytest.raises(UserError, match=r"config.yaml is damaged"):
        resume.refuse_other_run(folder.path, config, ())


def test_without_a_checkpoint_a_run_starts_over_with_the_files_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are compared; contents are not even read."""
    config = config_in(tmp_path, steps=8, name="one")
    folder = create(config, "exp.yaml")
    folder.log_metrics(1, {})
    (folder.path / "samples" / "step-000001.parquet").touch()
    folder.close()
    monkeypatch.setattr(resume, "fingerprints", None)
    prompts = [SimpleNamespace(dataset="d")]
    plan: Any = SimpleNamespace(config=config, prompts=prompts, fingerprints={"rewards[0].file": "changed"})
    prepared = resume.prepare(resume.find("auto", config, "exp.yaml"), plan, [])
    assert (prepared.step, prepared.lines) == (0, ("resumed    one from its beginning: it has no checkpoint",))
    reopen(folder.path, config, prepared.step).close()
    assert (folder.path / "metrics.jsonl").read_text() == ""
    assert list((folder.path / "samples").iterdir()) == []


def test_what_is_cut_is_cut_whole_whenever_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
        for name in (f"samples/step-{step:06d}.parquet", f"nonfinite/step-{step:06d}-1/rank-0.safetensors"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
    lines = "".join(f'{{"step": {step}}}\n' for step in (10, 20, 30))
    (tmp_path / "metrics.jsonl").write_text(lines)
    with monkeypatch.context() as killed:
        killed.setattr(
            "grpo.run.folder.shutil.rmtree", lambda path, **options: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            truncate_after(tmp_path, 10)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "step-000010",
        "step-000020",
    ]  # none of them in parts
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    truncate_after(tmp_path, 10)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-000010"]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000010.parquet"]
    assert [path.name for path in (tmp_path / "nonfinite").iterdir()] == ["step-000010-1"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10}\n'
    assert not list(tmp_path.glob("*/*.partial"))


def test_a_model_that_was_saved_stays_when_a_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    truncate_after(tmp_path, 3)
    assert (tmp_path / "model.before" / "weights").read_text() == "1"
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", [b'{"step": 1', b"\xff\xfe", b'{"time": 2}', b"[1]", b"3"])
def test_damaged_metrics_are_named_but_for_a_last_line_cut_short(damage: bytes, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + damage)
    truncate_after(tmp_path, 2)
    assert metrics.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    metrics.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is damaged"):
        truncate_after(tmp_path, 2)


def test_a_permission_does_not_need_a_checkpoint(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    prompt = Prompt(prompt_id="d:0:h", token_ids=(1,), text="", row={}, messages=None, dataset="d", where="d[0]")
    plan: Any = SimpleNamespace(config=config, prompts=[prompt], fingerprints={})
    assert resume.prepare(resume.find("auto", config, "exp.yaml"), plan, ["data.train"]).step == 0
    create(config, "exp.yaml").close()
    assert resume.prepare(resume.find("auto", config, "exp.yaml"), plan, ["data.train"]).step == 0
    plan.config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=0.5))
    assert resume.prepare(resume.find("auto", config, "exp.yaml"), plan, ["optimizer.lr"]).step == 0


def test_what_is_allowed_is_done(tmp_path: Path) -> None:
    """Another seed of the data starts them anew; another coefficient replaces the adapted one."""
    config = config_in(tmp_path)
    prompts = [
        Prompt(prompt_id=f"d:{i}:h", token_ids=(1,), text="", row={}, messages=None, dataset="d", where=f"d[{i}]")
        for i in range(6)
    ]
    cursor = Cursor(6, seed=config.data.seed)
    cursor.take(4)
    measured = {"sets": {"d": {"per_prompt": {"p": 0.5}, "pass_at_k": 1.0, "maj_at_k": 1.0, "tokens_mean": 1.0,
                               "truncated_fraction": 0.0, "failed": 0}}, "parts": {}}  # fmt: skip
    driver = {"step": 2, "cursor": cursor.state(), "kl_coef": 0.7, "retired": ["d:1:h"], "tokens": 0, "rollouts": 0,
              "skipped": 0, "before": measured, "after": measured, "evaluated": 2}  # fmt: skip
    folder = create(config, "exp.yaml")
    folder.close()
    saved = make(folder.path, 2, driver=driver, config=plain(config))
    origin = resume.Origin(run=folder.path, checkpoint=saved)

    def resumed(changed: Config, allowed: list[str]) -> Any:
        plan: Any = SimpleNamespace(config=changed, prompts=prompts, fingerprints={})
        prepared = resume.prepare(origin, plan, allowed).progress
        restarted = resume.restore_last(plan, folder.path).progress  # the engines are lost before the next checkpoint
        assert restarted.cursor.state() == prepared.cursor.state()
        assert restarted.kl_coef == prepared.kl_coef
        return prepared

    plan_fingerprints = pytest.MonkeyPatch()
    plan_fingerprints.setattr(resume, "fingerprints", lambda plan: {})
    try:
        same = resumed(config, [])
        assert (same.cursor.position, same.kl_coef, same.retired) == (4, 0.7, {1})
        assert same.accuracies() == {"accuracy_before": 0.5, "accuracy_after": 0.5, "accuracy_after_step": 2}
        measuring = dataclasses.replace(config.data, eval=dataclasses.replace(config.data.eval, temperature=0.5))
        anew = resumed(dataclasses.replace(config, data=measuring), ["data.eval.temperature"])
        assert anew.accuracies() == {}  # measured otherwise, they are nothing to compare with
        data = dataclasses.replace(config.data, seed=7)
        other = resumed(dataclasses.replace(config, data=data), ["data.seed"])
        assert other.cursor.position == 0
        assert other.cursor.take(6) == Cursor(6, seed=7).take(6)
        weighted = [dataclasses.replace(config.data.train[0], weight=1.0)]
        alone = resumed(dataclasses.replace(config, data=dataclasses.replace(config.data, train=weighted)), ["data"])
        assert alone.cursor.state() == MixedCursor({"d": 6}, [1], seed=config.data.seed).state()
        both = [TrainSetConfig(path="d", weight=1.0), TrainSetConfig(path="e", weight=3.0)]
        prompts[4:] = [dataclasses.replace(prompt, dataset="e") for prompt in prompts[4:]]
        mixed = resumed(dataclasses.replace(config, data=dataclasses.replace(config.data, train=both)), ["data.train"])
        assert mixed.cursor.state() == MixedCursor({"d": 4, "e": 2}, [1, 3], seed=config.data.seed).state()
        algorithm = dataclasses.replace(config.algorithm, kl_coef=0.01)
        assert resumed(dataclasses.replace(config, algorithm=algorithm), ["algorithm.kl_coef"]).kl_coef == 0.01
    finally:
        plan_fingerprints.undo()
