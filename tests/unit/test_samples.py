"""The files of completions, and the tables of some of them."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_compare import REWARDS, group

from grpo.config import Config
from grpo.run.folder import RunFolder
from grpo.run.samples import SAMPLE_SCHEMA, Trained, part_columns, read_columns, write_groups
from grpo.run.trackers import COLUMNS, TABLE_CHARACTERS, TABLE_EVERY, make_trackers, markdown, table_is_due, table_rows
from grpo.types import Failed, Group, Logged


def with_row(group: Group, **row: Any) -> Group:
    prompt = dataclasses.replace(group.prompt, row=row)
    return Group(prompt=prompt, rollouts=tuple(dataclasses.replace(r, prompt=prompt) for r in group.rollouts))


def with_texts(group: Group, *texts: str) -> Group:
    rollouts = zip(group.rollouts, texts, strict=True)
    return dataclasses.replace(group, rollouts=tuple(dataclasses.replace(r, text=text) for r, text in rollouts))


def test_what_is_known_of_a_completion_is_in_its_row(tmp_path: Path) -> None:
    groups = [
        with_row(group(1, [1.0, 0.0]), question="two", answer="7", day=datetime.date(2026, 1, 2)),
        with_row(group(2, [None]), answer={"x": [1]}),
        with_row(group(3, [0.5]), question="nothing"),
    ]
    trained = Trained(logprob_sums={0: -1.5, 3: -2.5}, advantages={0: 0.75, 1: -0.75})
    write_groups(tmp_path / "s.parquet", 4, groups, rewards=REWARDS, trained=trained)
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["gold"] for row in rows] == ["7", "7", '{"x": [1]}', None]
    assert json.loads(rows[0]["row"]) == {"question": "two", "answer": "7", "day": "2026-01-02"}
    assert [row["extracted"] for row in rows] == ["7", "7", "7", "7"]
    assert [row["advantage"] for row in rows] == [0.75, -0.75, None, None]
    assert [row["learner_logprob_sum"] for row in rows] == [-1.5, None, None, -2.5]
    assert [row["reward_part/right"] for row in rows] == [1.0, 0.0, None, 0.5]
    assert [row["reward_part/format"] for row in rows] == [0.0, 0.0, None, 0.0]
    write_groups(tmp_path / "s.parquet", 4, groups, rewards=REWARDS, answer_column="question")
    assert [row["gold"] for row in pq.read_table(tmp_path / "s.parquet").to_pylist()] == ["two", "two", None, "nothing"]


def test_logged_columns_stand_behind_the_others_typed_by_their_values(tmp_path: Path) -> None:
    logs: list[Mapping[str, Any]] = [
        {"f/text": "a", "f/number": 1, "f/flag": True, "f/mixed": 0.5, "f/none": None},
        {"f/text": None, "f/number": 0.25, "f/flag": False, "f/mixed": "x", "f/none": None},
        {"g/whole": -(2**63)},
    ]
    one = group(0, [1.0, 0.0, None])
    rollouts = tuple(
        dataclasses.replace(member, outcome=dataclasses.replace(member.outcome, logged=Logged(columns=columns)))
        for member, columns in zip(one.rollouts, logs, strict=True)
    )
    assert isinstance(rollouts[2].outcome, Failed)
    file = tmp_path / "s.parquet"
    write_groups(file, 1, [dataclasses.replace(one, rollouts=rollouts)], rewards=REWARDS)
    table = pq.read_table(file)
    assert table.schema.names[: len(SAMPLE_SCHEMA)] == SAMPLE_SCHEMA.names
    behind = table.schema.names[len(SAMPLE_SCHEMA) :]
    assert behind[:2] == ["reward_part/right", "reward_part/format"]
    assert {name: table[name].to_pylist() for name in behind[2:]} == {
        "f/flag": [True, False, None], "f/mixed": ["0.5", "x", None], "f/none": [None] * 3,
        "f/number": [1.0, 0.25, None], "f/text": ["a", None, None], "g/whole": [None, None, -(2**63)],
    }  # fmt: skip
    assert read_columns(file, ["reward"]).schema.names == ["reward", "reward_part/right", "reward_part/format"]


def test_columns_keep_the_recipe_s_order_of_rewards() -> None:
    """By it a file that is read back is judged; what order a function's own mapping has does not matter."""
    parts = [{"r2": 0.0}, {"r1": 0.0, "r1/x": 1.0, "r1/y": 2.0, "r2": 0.0}, {"r1": 1.0, "r1/y": 2.0, "r1/x": 1.0}]
    assert part_columns(parts, ["r0", "r1", "r2"]) == ["r1", "r1/x", "r1/y", "r2"]
    assert part_columns(parts, ["r2", "r1"]) == ["r2", "r1", "r1/x", "r1/y"]
    assert part_columns([{}], ["r1"]) == []


def test_a_table_has_the_best_and_the_worst_of_groups_that_differ() -> None:
    same, differing, failed = group(1, [1.0, 1.0]), group(2, [0.25, 1.0, 0.0]), group(3, [None, None])
    groups = [with_row(one, answer="7") for one in (same, failed, differing)]
    rows = table_rows(groups, "answer", Trained(advantages={5: 1.5, 6: -1.25}))
    assert [(row["prompt_id"], row["reward"], row["advantage"]) for row in rows] == [
        ("d:2:x", "1", "1.5"), ("d:2:x", "0", "-1.25"), ("d:1:x", "1", ""), ("d:1:x", "1", ""),
    ]  # fmt: skip
    assert {row["gold"] for row in rows} == {"7"}
    assert [row["reward"] for row in table_rows([failed], "answer")] == ["failed: timeout"]


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    text = "a|b\n<think>*x*</think> `c` [d](e) _f_ ~g~ \\h"
    table = markdown(table_rows([with_texts(group(1, [1.0]), text)], "answer"))
    assert len(table.splitlines()) == 3  # header, rule and one row
    assert table.splitlines()[2].count("|") == len(COLUMNS) + 1
    for mark in ("<think>", "*", "`", "[", "_", "~", "\\"):
        assert mark not in table.splitlines()[2]
    assert "&lt;think&gt;" in table
    long = "x" * TABLE_CHARACTERS + "middle" + "y" * TABLE_CHARACTERS
    [row] = table_rows([with_texts(group(1, [1.0]), long)], "answer")
    assert row["completion"].startswith("x" * (TABLE_CHARACTERS // 2) + " [... ")
    assert row["completion"].endswith("y" * (TABLE_CHARACTERS // 2))
    assert f"{TABLE_CHARACTERS + 6} characters" in row["completion"]


def test_when_a_table_is_due() -> None:
    assert [step for step in range(1, 2 * TABLE_EVERY + 1) if table_is_due("step-0", step)] == [
        1,
        TABLE_EVERY,
        2 * TABLE_EVERY,
    ]
    assert table_is_due("eval-000007", 7)


def test_tensorboard_gets_the_table(tmp_path: Path, config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [tracker] = make_trackers(config, tmp_path, 0)
    tracker.table(3, "step", table_rows([with_texts(group(1, [1.0]), "forty-two")], "answer"))
    tracker.metrics(3, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [event] = events.Tensors("samples/step/text_summary")
    assert event.step == 3
    assert b"forty-two" in event.tensor_proto.string_val[0]
    assert [point.value for point in events.Scalars("reward/mean")] == [0.5]


def test_trackers_are_closed_with_the_run(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the same process must not write to them, and no thread is left."""
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda values: calls.append(("log", values["step"])),
        define_metric=lambda name, step_metric=None: None,
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, Error=OSError))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, wandb=True))
    threads = set(threading.enumerate())
    for number, failed in enumerate((False, True)):
        (tmp_path / str(number)).mkdir()
        folder = RunFolder(tmp_path / str(number), config)
        folder.log_metrics(1, {"loss": 0.5})
        folder.close()
        folder.close()
        assert folder.close_trackers(failed=failed) == []
        assert folder.close_trackers(failed=failed) == []
        assert set(threading.enumerate()) == threads
    assert calls == [("log", 1), ("finish", 0), ("log", 1), ("finish", 1)]
    (tmp_path / "2").mkdir()
    folder = RunFolder(tmp_path / "2", config)
    folder.rewind(config, 0)  # engines were lost: the trackers are opened again
    assert calls[4:] == [("finish", 0)]
    folder.close()

    def finish(exit_code: int) -> None:
        raise ConnectionError("no network")

    run.finish = finish
    assert folder.close_trackers(failed=False) == ["a tracker could not be closed: ConnectionError: no network"]
    assert set(threading.enumerate()) == threads


class Run:
    """Stands for a run of W&B, which drops what has a lower `step` than it has seen."""

    def __init__(self) -> None:
        self.axes: dict[str, str | None] = {}
        self.history: list[dict[str, Any]] = []
        self.last = -1

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        step = self.last + 1 if step is None else step
        if step >= self.last:
            self.history.append(values)
            self.last = step

    def finish(self, exit_code: int) -> None:
        pass


def test_wandb_keeps_what_is_logged_after_a_resume_from_an_earlier_step(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, projects = Run(), []

    def init(*, project: str, **_: Any) -> Run:
        projects.append(project)
        return run

    module = SimpleNamespace(init=init, Error=OSError, Table=lambda columns, data: data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    wandb = dataclasses.replace(config.run, wandb=True, wandb_project="sums", tensorboard=False)
    for steps in ((1, 2, 3), (2, 3, 4)):  # the second session resumes after step 1
        [tracker] = make_trackers(dataclasses.replace(config, run=wandb), tmp_path, steps[0] - 1)
        for step in steps:
            tracker.metrics(step, {"reward/mean": step / 10})
        tracker.table(steps[-1], "eval", [])
    assert [line["step"] for line in run.history] == [1, 2, 3, 3, 2, 3, 4, 4]
    assert [line["reward/mean"] for line in run.history if "reward/mean" in line] == [0.1, 0.2, 0.3, 0.2, 0.3, 0.4]
    assert [line["step"] for line in run.history if "samples/eval" in line] == [3, 4]
    assert run.axes == {"step": None, "*": "step"}
    assert projects == ["sums", "sums"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed: the extra `wandb`")
def test_wandb_itself_keeps_it(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its offline mode, within one session: what it was given is in its file, also for a step that it has seen."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = dataclasses.replace(config.run, wandb=True, tensorboard=False)
    [tracker] = make_trackers(dataclasses.replace(config, run=wandb), tmp_path, 0)
    for step in (5, 3, 6):
        tracker.metrics(step, {f"logged_at_{step}_{i}": 0.5 for i in range(9)})  # a name may be split by a block's end
    tracker.close(failed=False)
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes().decode(errors="replace")
    assert [step for step in (5, 3, 6) if any(f"logged_at_{step}_{i}" in content for i in range(9))] == [5, 3, 6]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    from grpo import config as module

    (tmp_path / "r.yaml").write_text(
        "model: {path: x, dtype: float32}\ndata: {train: x}\nalgorithm: {prompts_per_step: 4, group_size: 8}\n"
        "rewards: [{file: twos.py}]\nrun: {steps: 1}\n"
    )
    return module.load(tmp_path / "r.yaml")
