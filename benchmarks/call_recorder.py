"""Record the calls of `grpo` in this process.

`benchmarks.hops` copies this file as `sitecustomize.py`, so that every Python process of a run loads it first. It
imports nothing of this repository. HOPS_FOLDER in the environment is the folder of the records, HOPS_ROOT the
repository. A byte in HOPS_FOLDER/stage is the stage of the run for all processes, which the driver advances:

    SET_UP     until the loop begins
    WAITING    until the followed step begins
    ROWS       until the learner's step has returned
    REST       until the followed step ends: sync, metrics, samples file
    DONE

Each process appends a line of JSON for everything that is new to it, so that a killed process loses nothing:

    {"stage", "caller", "callee"}      a call from a function of grpo to another; caller null: other code called it
    {"stage", "caller", "remote"}      a call of an actor's method of this name
    {"stage", "function", "record"}    an argument or a returned value of the function is or contains this record

A function is "<file>:<qualified name>" with the file's path in the repository.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

SET_UP, WAITING, ROWS, REST, DONE = range(5)
FOLLOWED = 2
"""The step that is followed. Imports and set-up are done in the first step."""
SOURCES = frozenset({"Row", "Prompt"})
"""Classes of rows: as they were read, and tokenized."""
RECORDS = SOURCES | {
    "SampleRequest", "SampledBlock", "Completion", "RewardItem", "Job", "Part", "Scored", "Failed", "Rollout", "Group",
    "TrainingRow", "Batch", "RankStep", "Prepared", "TrainedTokens", "Rows",
}  # fmt: skip
"""Classes of rows, completions, rewards, groups and batches."""
DEPTH = 4
"""Levels of containers and dataclasses that are searched for a record, two elements of each container."""
NOT_FUNCTIONS = ("<module>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
REMOTE = "remote"
LOOKS = 30
"""Number of arguments and returned values of a function that are searched, until one contains a record."""


def record_in(value: Any, wanted: frozenset[str], depth: int = DEPTH, *, numbers: bool = True) -> str | None:
    """Return the kind of the first record in `value`, or None.

    Records are the `wanted` classes of grpo. With RECORDS also what is made of them: tensors (not parameters), arrays,
    sequences of at least two numbers outside of dataclasses and mappings, and the calls and answers of a reward worker,
    which have no class.
    """
    kind = type(value)
    if kind.__module__.partition(".")[0] == "grpo" and kind.__name__ in wanted:
        return kind.__name__
    if wanted is RECORDS:
        if (kind.__module__, kind.__name__) in (("torch", "Tensor"), ("numpy", "ndarray")):
            return kind.__name__
        if kind in (list, tuple) and numbers and len(value) > 1 and all(type(v) in (int, float) for v in value[:2]):
            return "numbers"
        if kind is tuple and [type(v) for v in value] == [str, dict, list]:
            return "reward call"
        if kind is dict and any(keys <= value.keys() for keys in ({"results"}, {"value", "parts"})):
            return "reward answer"
    parts: Iterable[Any] = ()
    if kind in (list, tuple, deque, dict):
        parts = islice(value.values() if kind is dict else value, 2)
    elif dataclasses.is_dataclass(kind):
        parts = (getattr(value, field.name, None) for field in dataclasses.fields(kind))
    inside = numbers and kind in (list, tuple, deque)
    found = (record_in(part, wanted, depth - 1, numbers=inside) for part in parts) if depth else ()
    return next((each for each in found if each), None)


def arguments(frame: FrameType) -> list[Any]:
    """Return the arguments of a call, except an object whose method is called if that is no record itself."""
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return [values[n] for n in names if n in values and (n != "self" or type(values[n]).__name__ in RECORDS)]


class Recorder:
    """A profile function (`sys.setprofile`) that records the calls of the functions below `root`/grpo."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder, self._prefix = folder, f"{root}{os.sep}"
        with (folder / "stage").open("r+b") as file:
            self._stage = mmap.mmap(file.fileno(), 1)
        self._names: dict[CodeType, str] = {}
        self._known: set[tuple[object, ...]] = set()
        self._looks: dict[tuple[str, int], int] = {}

    def name_of(self, code: CodeType) -> str:
        """Return the name of a function of grpo, `REMOTE` for Ray's call of a method, else ""."""
        if code not in self._names:
            path = code.co_filename.removeprefix(self._prefix)
            own = path.startswith("grpo/") and code.co_name not in NOT_FUNCTIONS
            remote = path.endswith("ray/actor.py") and code.co_name == "_remote"
            self._names[code] = f"{path}:{code.co_qualname}" if own else REMOTE if remote else ""
        return self._names[code]

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "return"):
            return
        name = self.name_of(frame.f_code)
        if not name:
            return
        if event == "call":
            self._advance(name, frame, ends=False)
        stage = self._stage[0]
        if stage in (ROWS, REST) and event == "call":
            self._record_call(name, frame, stage)
        if name != REMOTE and (stage == ROWS or (stage == SET_UP and event == "return")):
            self._look(name, stage, [arg] if event == "return" else arguments(frame))
        if event == "return":
            self._advance(name, frame, ends=True)

    def _advance(self, name: str, frame: FrameType, *, ends: bool) -> None:
        """Advance the stage, at calls and returns of the driver."""
        stage = self._stage[0]
        if not ends and name == "grpo/driver.py:train":
            self._stage[0] = WAITING
        elif not ends and name == "grpo/driver.py:turn" and frame.f_locals.get("step") == FOLLOWED:
            self._stage[0] = ROWS
        elif ends and stage == ROWS and name == "grpo/cluster/engines.py:Engines.step":
            self._stage[0] = REST
        elif ends and stage in (ROWS, REST) and name == "grpo/driver.py:turn":
            self._stage[0] = DONE

    def _record_call(self, name: str, frame: FrameType, stage: int) -> None:
        """Record a call, and the calls above it that began before the step."""
        stack, outer = [name], frame.f_back
        while outer is not None:
            above = self.name_of(outer.f_code)
            if above and above != REMOTE:
                stack.append(above)
                if len(stack) == 2 and (stage, above, name) in self._known:
                    return
            outer = outer.f_back
        for i, callee in enumerate(stack):
            caller = stack[i + 1] if i + 1 < len(stack) else None
            at = stage if i == 0 else None
            if callee == REMOTE:
                method = getattr(frame.f_locals.get("self"), "_method_name", None)
                self._write((at, caller, method, REMOTE), stage=at, caller=caller, remote=method)
            else:
                self._write((at, caller, callee), stage=at, caller=caller, callee=callee)

    def _look(self, name: str, stage: int, values: Sequence[Any]) -> None:
        """Search the arguments, or the returned value, of a function for a record."""
        looks = self._looks.get((name, stage), 0)
        if looks >= LOOKS:
            return
        self._looks[name, stage] = looks + 1
        wanted = RECORDS if stage == ROWS else SOURCES
        try:
            record = next((found for value in values if (found := record_in(value, wanted))), None)
        except Exception:  # noqa: BLE001 - an object that cannot be searched holds no record, and the run must not fail
            return
        if record:
            self._looks[name, stage] = LOOKS
            self._write((stage, name), stage=stage, function=name, record=record)

    def _write(self, key: tuple[object, ...], **line: object) -> None:
        if key not in self._known:
            self._known.add(key)
            with (self._folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "sitecustomize" and "HOPS_FOLDER" in os.environ:
    recorder = Recorder(Path(os.environ["HOPS_FOLDER"]), Path(os.environ["HOPS_ROOT"]))
    threading.setprofile(recorder)
    sys.setprofile(recorder)
