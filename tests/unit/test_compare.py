"""`grpo compare` on small folders, written by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from grpo.run.compare import COLUMNS, compare, read_metrics, read_samples
from grpo.run.samples import write_groups
from grpo.types import Completion, Failed, Group, Prompt, Rollout, Scored, UserError

REWARDS = ("right", "format")


def group(number: int, values: list[float | None], dataset: str = "d") -> Group:
    prompt = Prompt(
        prompt_id=f"{dataset}:{number}:x", dataset=dataset, token_ids=(1,), text="p", row={}, messages=None, where=""
    )
    completion = Completion(
        token_ids=np.zeros(3, dtype=np.int32),
        sampler_logprobs=np.zeros(3, dtype=np.float32),
        sampled_mask=np.ones(3, dtype=bool),
        policy_versions=np.zeros(3, dtype=np.int32),
        finish_reason="stop",
        seed=None,
    )
    outcomes = [
        Failed(kind="timeout", detail="slow") if v is None else Scored(value=v, parts={"right": v, "format": 0.0})
        for v in values
    ]
    return Group(
        prompt=prompt,
        rollouts=tuple(
            Rollout(prompt=prompt, completion=completion, text="7", outcome=outcome) for outcome in outcomes
        ),
    )


def make_run(
    folder: Path, evaluations: dict[int, list[Group]], metrics: list[dict[str, object]], lr: float = 1.0
) -> Path:
    (folder / "samples").mkdir(parents=True)
    config = {"run": {"name": folder.name, "steps": 2}, "optimizer": {"lr": lr}, "rewards": [{"file": "f.py"}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for step, groups in evaluations.items():
        write_groups(folder / "samples" / f"eval-{step:06d}.parquet", step, groups, rewards=REWARDS)
    return folder


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    line = {"time": "x", "completion/tokens_mean": 3.0}
    a = make_run(
        tmp_path / "a",
        {0: [group(9, [0.0])], 2: [group(i, [1.0, 0.0]) for i in range(20)]},
        [{"step": 1, "reward/mean": 0.25, **line}, {"step": 2, "reward/mean": 0.75, **line}],
    )
    b = make_run(
        tmp_path / "b",
        {2: [*(group(i, [1.0, 1.0 if i < 10 else 0.0]) for i in range(20)), group(77, [0.0, 0.0])]},
        [{"step": 1, "reward/mean": 0.5, **line}, {"step": 2, "reward/mean": 0.5, **line}, {"step": 3, **line}],
        lr=2.0,
    )
    lines = compare(a, b)
    rows = [line.split() for line in lines]
    assert ["optimizer.lr", "1.0", "2.0"] in rows
    assert not any("run.name" in line for line in lines)
    [average] = [row for row in rows if row[:3] == ["d", "20", "avg"]]
    assert (average[3], average[7]) == ("0.500", "0.750")
    assert average[11] == "+0.250"  # half of the prompts gain a half
    assert float(average[-1]) < 0.01
    assert any(row[:3] == ["d", "20", "pass@2"] for row in rows)
    assert "note: 1 prompts of d are in only one of the two, and are left out" in lines
    assert ["reward/mean", "0.5", "0.5"] in rows
    assert any(line.startswith("mean of steps 1 to 2") for line in lines)
    assert "options: the same" in compare(a, a)


def test_a_statistic_that_repeats_avg_is_left_out(tmp_path: Path) -> None:
    """pass@1 of rewards that are 0 or 1, and maj of one completion per prompt."""

    def statistics(name: str, old: list[float], new: list[float]) -> list[str]:
        a, b = (
            make_run(tmp_path / f"{name}-{which}", {2: [group(i, rewards) for i in range(3)]}, [])
            for which, rewards in (("a", old), ("b", new))
        )
        return [line.split()[2] for line in compare(a, b) if line.startswith("d ")]

    assert statistics("one", [1.0], [0.0]) == ["avg"]
    assert statistics("three", [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]) == ["avg", "maj", "pass@2", "pass@3"]
    assert statistics("half", [1.0], [0.5]) == ["avg", "maj", "pass@1"]


def record(folder: Path, file: str = "summary.json", version: str = "0.9.0", **fingerprints: str) -> None:
    """What a run or an evaluation says of its graders; `file`: where. The names are rewards_0 for rewards[0].file."""
    found = {f"rewards[{name.removeprefix('rewards_')}].file": value for name, value in fingerprints.items()}
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps({"fingerprints": found, "versions": {"math-verify": version}}))


def configured(folder: Path, **sections: Any) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder


def test_what_differs_inside_lists_is_named(tmp_path: Path) -> None:
    same = {"file": "f.py", "name": "f", "env": ["A", "B"]}
    a = configured(
        tmp_path / "a", rewards=[{**same, "weight": 1.0}, {"file": "g.py", "weight": 0.5}],
        data={"eval": {"sets": []}, "train": [{"path": "x", "columns": {"a.b": "1"}}]}, sampling={"stop": []},
        optimizer={"betas": [0.9, 0.999]},
    )  # fmt: skip
    b = configured(
        tmp_path / "b", rewards=[{**same, "weight": 2.0, "env": ["A", "C"]}],
        data={"eval": {"sets": [{"path": "t", "name": None}]}, "train": [{"path": "x"}]},
        sampling={"stop": ["</answer>"]}, optimizer={"betas": [0.9, 0.95]},
    )  # fmt: skip
    lines = compare(a, b)
    start = next(i for i, line in enumerate(lines) if line.split() == ["option", "A", "B"])
    rows = [line.split() for line in lines[start + 1 : lines.index("", start)] if not line.startswith("warning")]
    assert rows == [
        ["data.eval.sets[0].path", "-", "t"],
        ["data.train[0].columns.a.b", "1", "-"],
        ["optimizer.betas[1]", "0.999", "0.95"],
        ["rewards[0].env[1]", "B", "C"],
        ["rewards[0].weight", "1.0", "2.0"],
        ["rewards[1].file", "g.py", "-"],
        ["rewards[1].weight", "0.5", "-"],
        ["sampling.stop[0]", "-", "</answer>"],
    ]
    assert "warning: the graders differ: A by f, g and B by f; the first of them determines accuracy" in lines


def test_long_values_are_shown_where_they_differ(tmp_path: Path) -> None:
    head, tail = "What is the answer to this question? " * 3, " Think step by step, then answer.\n" * 3
    a = configured(tmp_path / "a", data={"template": f"{head}A {tail}"})
    b = configured(tmp_path / "b", data={"template": f"{head}B {tail}"})
    [line] = [line for line in compare(a, b) if line.startswith("data.template")]
    assert line == ("data.template  ...stion? A  Think step by step, then...  ...stion? B  Think step by step, then...")


@pytest.mark.parametrize("file", ["summary.json", "key.json", "checkpoints/step-000004/manifest.json"])
def test_graders_with_other_contents_are_warned_of(file: str, tmp_path: Path) -> None:
    """Also where the options are the same; and of a run under way, whose last checkpoint knows it."""
    rewards = [{"file": "f.py"}, {"file": "g.py", "name": "part"}]
    a, b = (configured(tmp_path / name, rewards=rewards) for name in "ab")
    for folder in (a, b):
        record(folder, "checkpoints/step-000002/manifest.json", rewards_0="old", rewards_1="old")
    record(a, file, rewards_0="1", rewards_1="2")
    record(b, file, rewards_0="1", rewards_1="3")
    if file == "key.json":  # of an evaluation that has ended
        for folder in (a, b):
            (folder / "evaluation.json").write_text('{"sets": {}}')
    lines = compare(a, b)
    assert "options: the same" in lines
    assert [line for line in lines if line.startswith(("warning", "note"))] == [
        "warning: the grader part has different contents in A and B, so they are graded differently"
    ]
    assert not any(line.startswith("warning") for line in compare(a, a))


def test_another_library_of_the_grader_is_warned_of(tmp_path: Path) -> None:
    a, b = (configured(tmp_path / name, rewards=[{"file": "math_answer.py"}]) for name in "ab")
    record(a, rewards_0="1")
    record(b, rewards_0="1", version="0.8.0")
    assert "warning: math-verify, which math_answer uses, is 0.9.0 in A and 0.8.0 in B" in compare(a, b)


def test_a_grader_that_was_not_recorded_is_said(tmp_path: Path) -> None:
    a, b = (configured(tmp_path / name, rewards=[{"file": "f.py"}]) for name in "ab")
    record(a, rewards_0="1")
    assert "note: B has no record of the content of the grader f" in compare(a, b)
    assert not any(line.startswith("note: B has") for line in compare(b, b))
    (b / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"b/summary.json is damaged"):
        compare(a, b)
    (b / "summary.json").unlink()
    (b / "config.yaml").write_text("rewards: [3]")
    with pytest.raises(UserError, match=r"b/config.yaml is damaged: its rewards are none"):
        compare(a, b)


def test_a_given_step_is_compared(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {0: [group(i, [0.0]) for i in range(3)], 5: [group(i, [1.0]) for i in range(3)]}, [])
    lines = compare(a, a, step=0)
    assert any(line.split()[:4] == ["d", "3", "avg", "0.000"] for line in lines)
    with pytest.raises(UserError, match=r"no evaluation after step 4; it has 0, 5"):
        compare(a, a, step=4)


def test_a_gain_of_nothing_has_an_interval(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {0: [group(i, [1.0]) for i in range(30)]}, [])
    assert any("+0.000 (-0.116 to +0.116)" in line for line in compare(a, a))


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {1: [group(1, [1.0])]}, [])
    b = make_run(tmp_path / "b", {1: [group(1, [1.0], "other")]}, [])
    with pytest.raises(UserError, match=r"share no prompt: A has d and B has other"):
        compare(a, b)
    with pytest.raises(UserError, match=r"neither a run folder nor an evaluation: "):
        compare(a, tmp_path)
    none = make_run(tmp_path / "none", {}, [])
    assert any("B has no evaluation" in line for line in compare(a, none))
    (a / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is damaged"):
        compare(a, b)
    for line in ('{"step": Infinity}', '{"step": 1, "a": 1' + "0" * 400 + "}", '{"step": ' + "[" * 100_000):
        (a / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"metrics.jsonl:1 is damaged"):
            compare(a, b)
    (a / "metrics.jsonl").unlink()
    for damage in ("[", "text", "\x00", "[" * 100_000):
        (none / "config.yaml").write_text(damage)
        with pytest.raises(UserError, match=r"none/config.yaml is damaged"):
            compare(none, a)
    (b / "samples" / "eval-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"eval-000001.parquet cannot be read"):
        compare(b, b)


@pytest.mark.parametrize("values", [[math.nan], ["x"], [[1.0]], [math.inf]])
def test_rewards_that_are_no_numbers_are_damage(values: list[Any], tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {1: [group(1, [1.0])]}, [])
    file = a / "samples" / "eval-000001.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("reward_part/right")
    pq.write_table(table.set_column(place, "reward_part/right", pa.array(values)), file)
    with pytest.raises(UserError, match=r"eval-000001.parquet (is damaged: reward_part/right|cannot be read)"):
        compare(a, a)


def test_a_data_set_without_a_scored_completion_is_said_beside_the_others(tmp_path: Path) -> None:
    rows = [group(i, [None]) for i in range(3)]
    a = make_run(tmp_path / "a", {1: rows}, [])
    note = "note: no completion of d was scored in A and B"
    assert compare(a, a)[-2:] == ["nothing to compare on held-out data", note]
    b = make_run(tmp_path / "b", {1: [*rows, *(group(i, [1.0], "other") for i in range(3))]}, [])
    assert compare(b, b)[-1] == note
    assert any(line.startswith("other ") for line in compare(b, b))
    c = make_run(tmp_path / "c", {1: [group(i, [1.0]) for i in range(3)]}, [])
    assert compare(c, a)[-1] == "note: no completion of d was scored in B"


def test_evaluations_by_themselves_have_no_steps(tmp_path: Path) -> None:
    a = make_evaluation(tmp_path / "a", [group(1, [1.0])], 1, 1)
    run = make_run(tmp_path / "run", {3: [group(1, [1.0])]}, [])
    assert compare(run, a, step=3)
    with pytest.raises(UserError, match=r"^--step 3 is for runs; .*/a and .*/a are evaluations by grpo eval"):
        compare(a, a, step=3)


def test_samples_are_read_as_they_were_judged(tmp_path: Path) -> None:
    write_groups(tmp_path / "s.parquet", 0, [group(1, [0.5, None])], rewards=REWARDS)
    found = read_samples([tmp_path / "s.parquet"])["d"]["d:1:x"]
    assert [sample.value for sample in found] == [0.5, None]
    assert [(sample.answer, sample.tokens, sample.truncated) for sample in found] == [("7", 3, False)] * 2


def make_evaluation(folder: Path, groups: list[Group], prompts: int, k: int) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {steps: 2}")
    (folder / "key.json").write_text("{}")
    result = {"sets": {"d": {"prompts": prompts, "samples_per_prompt": k}}}
    (folder / "evaluation.json").write_text(json.dumps(result))
    write_groups(folder / "samples" / "000000.parquet", 0, groups, rewards=REWARDS)
    return folder


def test_options_of_training_are_left_out_between_evaluations(tmp_path: Path) -> None:
    a, b = (make_evaluation(tmp_path / name, [group(1, [1.0])], 1, 1) for name in "ab")
    for folder, value in ((a, 1), (b, 2)):
        sections = {"optimizer": {"lr": value}, "run": {"steps": value}, "sampling": {"max_tokens": value}}
        (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    said = "\n".join(compare(a, b))
    assert "sampling.max_tokens" in said
    assert "optimizer.lr" not in said
    assert "run.steps" not in said


def test_an_evaluation_that_is_not_finished_is_said(tmp_path: Path) -> None:
    a = make_evaluation(tmp_path / "a", [group(1, [1.0])], 1, 1)
    b = make_evaluation(tmp_path / "b", [group(1, [1.0])], 1, 1)
    (b / "evaluation.json").unlink()
    words = "b is an evaluation that is not finished; the same grpo eval command continues it"
    with pytest.raises(UserError, match=words):
        compare(a, b)


def test_files_beside_the_evaluations_of_a_run_are_none(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {5: [group(i, [1.0]) for i in range(3)]}, [])
    for name in ("eval-foo", "eval-000009 copy", "step-000007", "eval-"):
        shutil.copy(a / "samples" / "eval-000005.parquet", a / "samples" / f"{name}.parquet")
    assert compare(a, a)[0].endswith("(evaluation after step 5)")
    with pytest.raises(UserError, match=r"no evaluation after step 9; it has 5$"):
        compare(a, a, step=9)


def test_samples_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    groups = [group(i, [1.0, 0.0, 1.0]) for i in range(4)]
    whole = make_evaluation(tmp_path / "whole", groups, 4, 3)
    assert any(line.split()[:4] == ["d", "4", "avg", "0.667"] for line in compare(whole, whole))
    file = whole / "samples" / "000000.parquet"
    table = pq.read_table(file)
    shutil.copy(file, whole / "samples" / "000000 copy.parquet")
    with pytest.raises(UserError, match=r"samples is damaged: d:0:x has the completions \[0, 0, 1, 1, 2, 2\]"):
        compare(whole, whole)
    (whole / "samples" / "000000 copy.parquet").unlink()
    pq.write_table(table.slice(0, 10), file)
    with pytest.raises(UserError, match=r"d:3:x has the completions \[0\], where each prompt of d has 0 to 2 once"):
        compare(whole, whole)
    pq.write_table(table.slice(0, 9), file)
    with pytest.raises(
        UserError, match=r"3 prompts of d with 3 completions each, and its evaluation.json is of 4 with 3"
    ):
        compare(whole, whole)
    (whole / "evaluation.json").write_text('{"sets": [')
    with pytest.raises(UserError, match=r"evaluation.json is damaged"):
        compare(whole, whole)


def test_a_flipped_bit_anywhere_in_the_samples_is_seen(tmp_path: Path) -> None:
    """Of every byte of the pages that are read: other rewards, or an error?"""
    file = tmp_path / "s.parquet"
    write_groups(file, 0, [group(i, [i / 8, 0.5]) for i in range(8)], rewards=REWARDS)
    whole, bytes_ = read_samples([file]), file.read_bytes()
    assert pq.ParquetFile(file).metadata.num_row_groups == 1
    columns = [pq.ParquetFile(file).metadata.row_group(0).column(i) for i in range(18)]
    pages = [c for c in columns if c.path_in_schema.partition(".")[0] in COLUMNS]
    assert len(pages) == len(COLUMNS)
    unseen = []
    for c in pages:
        start = min(offset for offset in (c.dictionary_page_offset, c.data_page_offset) if offset)
        for place in range(start, start + c.total_compressed_size):
            file.write_bytes(bytes_[:place] + bytes([bytes_[place] ^ 1]) + bytes_[place + 1 :])
            try:
                if read_samples([file]) != whole:
                    unseen.append((c.path_in_schema, place - start))
            except UserError:
                continue
    assert unseen == []


def test_an_evaluation_with_a_line_of_its_own_belongs_to_its_step(tmp_path: Path) -> None:
    lines = '{"step": 3, "reward/mean": 0.5}\n{"step": 3, "time": "12:00", "eval/accuracy": 0.25}\n'
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 4, "rew')  # the last line is being written
    assert read_metrics(tmp_path / "metrics.jsonl") == {3: {"reward/mean": 0.5, "eval/accuracy": 0.25}}


def test_the_first_part_judges(tmp_path: Path) -> None:
    one = group(1, [1.0])
    swapped = dataclasses.replace(one.rollouts[0], outcome=Scored(value=1.0, parts={"format": 0.0, "right": 1.0}))
    write_groups(tmp_path / "s.parquet", 0, [dataclasses.replace(one, rollouts=(swapped,))], rewards=REWARDS[::-1])
    assert read_samples([tmp_path / "s.parquet"])["d"]["d:1:x"][0].value == 0.0
