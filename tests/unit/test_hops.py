"""The pure parts of `benchmarks.hops`: what is a record, what is recorded, how the figures are counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import hops
from benchmarks.call_recorder import DONE, RECORDS, REST, ROWS, SET_UP, SOURCES, Recorder, record_in
from grpo.types import Group, Prompt, SamplingSettings, Scored

PROMPT = Prompt(prompt_id="a:0:x", token_ids=(1, 2), text="1+1=", row={}, messages=None, dataset="a", where="a.jsonl:1")
SETTINGS = SamplingSettings(temperature=1.0, max_tokens=5, end_token_ids=(0, 1), stop=())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (PROMPT, "Prompt"),
        ([[PROMPT]], "Prompt"),
        ({"a": (3, PROMPT)}, "Prompt"),
        (Group(prompt=PROMPT, rollouts=()), "Group"),
        (Scored(value=1.0, parts={}), "Scored"),
        (torch.zeros(2), "Tensor"),
        ([np.zeros(2)], "ndarray"),
        ([[0.5, 1.0]], "numbers"),
        ((1, 2), "numbers"),
        (("2", {"prompt": "1+1="}, []), "reward call"),
        ({"results": [{"value": 1.0, "parts": {}}]}, "reward answer"),
        (torch.nn.Parameter(torch.zeros(2)), None),
        (SETTINGS, None),  # numbers of an option
        ({"loss": [1.0, 2.0]}, None),
        ({"losses": [[1.0, 2.0]]}, None),
        ([3], None),
        (3, None),
        ("1+1=", None),
        (None, None),
    ],
)
def test_records(value: object, kind: str | None) -> None:
    assert record_in(value, RECORDS) == kind


def test_sources_are_rows_and_prompts_only() -> None:
    assert record_in([PROMPT], SOURCES) == "Prompt"
    assert record_in(Group(prompt=PROMPT, rollouts=()), SOURCES) == "Prompt"
    assert record_in([torch.zeros(2), 3, (1, 2)], SOURCES) is None


def test_records_are_searched_to_a_depth() -> None:
    deep: Any = PROMPT
    for _ in range(4):
        deep = [deep]
    assert record_in(deep, RECORDS) == "Prompt"
    assert record_in([deep], RECORDS) is None


DRIVER = """
def train(run):
    run()

def turn(step, engines):
    prepare([1.0, 2.0])
    engines.step(step)
    report(step)

def prepare(rewards):
    return sum([reward for reward in rewards])

def report(step):
    return None
"""
ENGINES = """
class Engines:
    def step(self, step):
        return helper()

def helper():
    return None
"""


@pytest.fixture
def profiled(tmp_path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Run the two modules above for two steps with the recorder; what it has written."""
    modules = {}
    for name, text in (("grpo/driver.py", DRIVER), ("grpo/cluster/engines.py", ENGINES)):
        module = modules[name] = ModuleType(name)
        exec(compile(text, str(tmp_path / name), "exec"), vars(module))
    driver, engines = modules["grpo/driver.py"], modules["grpo/cluster/engines.py"]
    (tmp_path / "stage").write_bytes(bytes([SET_UP]))
    recorder = Recorder(tmp_path, tmp_path)

    def run() -> list[dict[str, Any]]:
        before = sys.getprofile()
        sys.setprofile(recorder)
        try:
            driver.train(lambda: [driver.turn(step, engines.Engines()) for step in (1, 2)])
        finally:
            sys.setprofile(before)
        [file] = tmp_path.glob("*.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]

    yield run
    assert (tmp_path / "stage").read_bytes() == bytes([DONE])


def test_the_second_step_is_recorded_in_its_stages(profiled: Callable[[], list[dict[str, Any]]]) -> None:
    d, e = "grpo/driver.py:", "grpo/cluster/engines.py:"
    recorded = profiled()
    calls = [(line["stage"], line["caller"], line["callee"]) for line in recorded if "callee" in line]
    assert calls == [
        (ROWS, f"{d}train", f"{d}turn"),
        (None, None, f"{d}train"),  # began before the step
        (ROWS, f"{d}turn", f"{d}prepare"),
        (None, f"{d}train", f"{d}turn"),
        (ROWS, f"{d}turn", f"{e}Engines.step"),
        (ROWS, f"{e}Engines.step", f"{e}helper"),
        (None, f"{d}turn", f"{e}Engines.step"),
        (REST, f"{d}turn", f"{d}report"),
    ]
    assert [line for line in recorded if "function" in line] == [
        {"stage": ROWS, "function": f"{d}prepare", "record": "numbers"}
    ]


def lines(*each: dict[str, Any]) -> list[str]:
    return [json.dumps(line) for line in each]


CLI, STEP, ACTOR, POLICY = hops.START, "grpo/driver.py:turn", "grpo/cluster/actors.py:LearnerActor.step", hops.LOSS
DRIVEN = lines(
    {"stage": SET_UP, "function": "grpo/data/rows.py:read", "record": "Row"},
    {"stage": SET_UP, "function": "grpo/rewards/golds.py:evenly_spread", "record": "Prompt"},
    {"stage": None, "caller": None, "callee": CLI},
    {"stage": ROWS, "caller": CLI, "callee": STEP},
    {"stage": ROWS, "caller": STEP, "remote": "step"},
    {"stage": ROWS, "caller": STEP, "remote": "save"},
    {"stage": ROWS, "caller": STEP, "callee": "grpo/objective/losses.py:aggregation_weights"},  # nearer, but no loss
    {"stage": ROWS, "function": "grpo/run/samples.py:write_groups", "record": "Group"},
    {"stage": ROWS, "function": "grpo/rollout/collect.py:collect", "record": "Prompt"},
    {"stage": REST, "caller": STEP, "callee": "grpo/run/folder.py:write"},
)
LEARNED = lines(
    {"stage": ROWS, "caller": None, "callee": ACTOR},
    {"stage": ROWS, "caller": ACTOR, "callee": "grpo/learner/step.py:run_step"},
    {"stage": ROWS, "caller": "grpo/learner/step.py:run_step", "callee": POLICY},
    {"stage": ROWS, "function": "grpo/learner/step.py:run_step", "record": "RankStep"},
    {"stage": ROWS, "function": "grpo/metrics/measures.py:mismatch_counts", "record": "Tensor"},
)


def test_a_remote_call_leads_to_the_method_of_the_actor() -> None:
    calls = hops.read_calls([DRIVEN, LEARNED])
    assert hops.chain(calls.edges, CLI, POLICY) == [
        CLI, STEP, ACTOR, "grpo/learner/step.py:run_step", POLICY,
    ]  # fmt: skip
    assert hops.chain(calls.edges, CLI, "grpo/view/") == []
    assert calls.roles == {"driver": 1, "sampler": 0, "learner": 1, "reward worker": 0}


def test_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    hops.report("a.yaml", hops.read_calls([DRIVEN, LEARNED]))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "hops"
    assert found["row_files"] == ["grpo/data/rows.py", "grpo/learner/step.py", "grpo/rollout/collect.py"]
    assert (found["row_to_optimizer_step"], found["row_to_prompt"], found["prompt_to_optimizer_step"]) == (3, 1, 2)
    assert found["left_out_files"] == ["grpo/metrics/measures.py", "grpo/rewards/golds.py", "grpo/run/samples.py"]
    assert found["cli_to_loss"] == 5
    # driver, actors, step, losses and folder; the command had begun before
    assert found["called_in_step"] == 5


def test_of_two_chains_the_shorter_counts() -> None:
    edges = {"a:f": {"b:g", "c:h"}, "b:g": {"d:i"}, "d:i": {"e:loss"}, "c:h": {"e:loss"}, "e:loss": {"a:f"}}
    assert hops.chain(edges, "a:f", "e:") == ["a:f", "c:h", "e:loss"]
    assert hops.files_of(["a:f", "b:g", "a:h"]) == ["a", "b"]
