"""A group of completions on its way through a reward pool: its calls, its jobs, its answers and its outcomes.

Answers come from untrusted code, so they are either parsed into numbers and short texts, or refused.
"""

from __future__ import annotations

import json
import pickle
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TypeGuard, cast, get_args

import numpy as np
from numpy.typing import NDArray

from grpo.config import RewardConfig
from grpo.rewards.child.calls import MAX_NAME, MAX_PARTS, Info, Item, Loggable
from grpo.types import NOTHING_LOGGED, Failed, FailureKind, Json, Logged, Moment, Scored, Unchecked

CALLS_PER_JOB = 8
"""Small enough to spread a group of slow calls over the workers, large enough to keep message overhead low."""

MAX_DETAIL = 300

Call = tuple[int, Sequence[int]]
"""(index of the reward, items)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Result of one reward function for one completion."""

    value: float | Failed | None
    """None: the reward abstains."""
    entries: Mapping[str, float] = field(default_factory=dict)
    """Entries of the mapping that the function returned."""
    logged: Logged = NOTHING_LOGGED


ABSTAINED = Part(value=None)
"""Result of a reward for a row that it does not apply to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardItem:
    """One completion to be scored."""

    completion: str
    row: Mapping[str, Unchecked]
    messages: Sequence[Mapping[str, str]] | None
    """Chat turns of the prompt, or None."""
    info: Info
    dataset: str
    """Name of the row's data set. Rewards for other data sets abstain."""
    completion_ids: Sequence[int] | NDArray[np.int32] = ()
    """Sampled token ids."""
    moment: Moment = field(default_factory=Moment)
    """The same for every item of a group."""


@dataclass(slots=True, kw_only=True)
class Group:
    """A submitted group, and the answers received so far."""

    rewards: Sequence[RewardConfig]
    names: Sequence[str]
    """Name of each reward in results."""
    future: Future[list[Scored | Failed]]
    context: bytes
    """Pickle of (row, messages, state), shared by all calls. It is made in the caller's thread, so that its errors are
    raised there."""
    inputs: list[Item]
    """The token ids are empty unless a reward receives them."""
    answers: list[dict[int, Part]]
    """For each reward: item -> part."""
    outcomes: dict[int, Scored | Failed]
    """item -> outcome, for the items that every reward has answered."""
    missing: int
    """Calls without an answer."""

    def outcome(self, item: int) -> Scored | Failed:
        """Return the outcome of an item that every reward has answered."""
        return combine([answers[item] for answers in self.answers], self.rewards, self.names)

    def add(self, call: Call, parts: Sequence[Part]) -> tuple[int, int]:
        """Record the answer to a call. Return how many items it gave an outcome, and how many it made fail."""
        reward, items = call
        scored = failed = 0
        for item, part in zip(items, parts, strict=True):
            before = [answers[item].value for answers in self.answers if item in answers]
            self.answers[reward][item] = part
            outcome: Scored | Failed | float | None = part.value
            if all(item in answers for answers in self.answers):
                scored += 1
                outcome = self.outcomes[item] = self.outcome(item)
            failed += isinstance(outcome, Failed) and not any(isinstance(value, Failed) for value in before)
        self.missing -= 1
        return scored, failed

    def finish(self) -> None:
        """Give the future its result, unless it has been cancelled. Every call must have been answered."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result([self.outcomes[i] for i in range(len(self.inputs))])


@dataclass(slots=True, kw_only=True)
class Job:
    """Calls of one group that one worker makes, one after another."""

    group: Group
    calls: deque[Call]
    """The unanswered calls. The first one is running."""

    @property
    def running(self) -> Call:
        return self.calls[0]

    @property
    def name(self) -> str:
        """Return the name of the reward that is running."""
        return self.group.names[self.running[0]]

    @property
    def timeout_s(self) -> float:
        """Return the seconds that the running call may take."""
        return self.group.rewards[self.running[0]].timeout_s

    def message(self) -> bytes:
        """Return the message that gives a worker this job."""
        calls = [(reward, [self.group.inputs[i] for i in items]) for reward, items in self.calls]
        return pickle.dumps({"context": self.group.context, "calls": calls})


def make_group(
    items: Sequence[RewardItem], rewards: Sequence[RewardConfig], names: Sequence[str]
) -> tuple[Group, list[Job]]:
    """Return the group of `items`, of which there is at least one, and its calls in jobs. Rewards for other data sets
    abstain at once.

    Raises ValueError when the items have different rows.
    """
    row, messages = items[0].row, items[0].messages
    if any(item.row is not row and item.row != row for item in items):
        raise ValueError("the items of one group must have one row")
    calls: list[Call] = []
    everyone = range(len(items))
    answers: list[dict[int, Part]] = []
    for reward, config in enumerate(rewards):
        asked = config.applies_to(items[0].dataset)
        answers.append({} if asked else dict.fromkeys(everyone, ABSTAINED))
        if not asked:
            continue
        calls += [(reward, everyone)] if config.style == "trl" else [(reward, (i,)) for i in everyone]
    gives_ids = any(reward.style == "trl" for reward in rewards)
    turns = None if messages is None else [dict(turn) for turn in messages]
    group = Group(
        rewards=rewards,
        names=names,
        future=Future(),
        context=pickle.dumps((dict(row), turns, items[0].moment.trainer_state())),
        inputs=[
            (item.completion, item.info, np.asarray(item.completion_ids).tolist() if gives_ids else [])
            for item in items
        ],
        answers=answers,
        outcomes={},
        missing=len(calls),
    )
    starts = range(0, len(calls), CALLS_PER_JOB)
    return group, [Job(group=group, calls=deque(calls[start : start + CALLS_PER_JOB])) for start in starts]


def combine(parts: Sequence[Part], rewards: Sequence[RewardConfig], names: Sequence[str]) -> Scored | Failed:
    """Return the weighted sum of the parts of one item that did not abstain. Any failed part fails the rollout."""
    total = 0.0
    shown: dict[str, float] = {}
    logs = [part.logged for part in parts if part.logged is not NOTHING_LOGGED]
    logged = logs[0] if len(logs) == 1 else NOTHING_LOGGED
    if len(logs) > 1:
        logged = Logged(
            columns={name: value for log in logs for name, value in log.columns.items()},
            metrics={name: pair for log in logs for name, pair in log.metrics.items()},
        )
    for name, reward, part in zip(names, rewards, parts, strict=True):
        if isinstance(part.value, Failed):
            return replace(part.value, logged=logged)
        if part.value is not None:
            total += reward.weight * part.value
            shown |= {name: part.value, **part.entries}
    if not shown:
        return Failed(kind="abstained", detail=f"{', '.join(names)}: returned None", logged=logged)
    if not isfinite(total):
        detail = f"the weighted sum of {', '.join(names)} is {total}"
        return Failed(kind="not_finite", detail=detail, logged=logged)
    return Scored(value=total, parts=shown, logged=logged)


def parse_answer(line: bytes, name: str, count: int) -> tuple[list[Part], str | None]:
    """Parse the answer to one call of the reward `name` on `count` completions.

    Return the parts, and what the call has changed in the worker's surroundings, or None. A changed worker must not be
    reused.

    Raises ValueError when the line is anything else.
    """
    message = json.loads(line)
    results = message.get("results") if isinstance(message, dict) else None
    if not isinstance(results, list) or len(results) != count:
        raise ValueError("no results of this call")
    columns = _parse_columns(message.get("columns", {}), name, count)
    metrics = _parse_metrics(message.get("metrics", {}), name)
    parts = [_parse_result(result, name) for result in results]
    if columns or metrics:
        parts = [
            replace(
                part,
                logged=Logged(
                    columns={column: values[i] for column, values in columns.items()}, metrics={} if i else metrics
                ),
            )
            for i, part in enumerate(parts)
        ]
    changed = message.get("changed")
    return parts, None if changed is None else str(changed)[:100]


def _parse_columns(columns: Json, name: str, count: int) -> dict[str, list[Loggable]]:
    """Return `<reward>/<column>` -> one value per completion. Texts are made encodable as UTF-8."""
    out: dict[str, list[Loggable]] = {}
    for column, values in _named(columns).items():
        if not isinstance(values, list) or len(values) != count:
            raise ValueError("a column has one value per completion")
        valid = out[f"{name}/{column}"] = [
            writable(value) if isinstance(value, str) else value
            for value in values
            if value is None or isinstance(value, str | int | float)
        ]
        if len(valid) != count:
            raise ValueError("values of columns are texts, numbers or None")
    return out


def _parse_metrics(metrics: Json, name: str) -> dict[str, tuple[float, int]]:
    """Return `<reward>/metric/<name>` -> (sum, count)."""
    out = {}
    for metric, pair in _named(metrics).items():
        if not isinstance(pair, list) or len(pair) != 2 or not _is_number(pair[0]) or type(pair[1]) is not int:
            raise ValueError("a metric is a sum and a count")
        if pair[1] < 1:
            raise ValueError("a metric has values")
        out[f"{name}/metric/{metric}"] = (pair[0], pair[1])
    return out


def _named(logged: Json) -> dict[str, Json]:
    """Return `logged`. Raises ValueError unless it is a mapping with short names."""
    if not isinstance(logged, dict) or len(logged) > MAX_PARTS:
        raise ValueError("what is logged is a mapping of some names")
    if not all(len(name) <= MAX_NAME and name.isprintable() for name in logged):
        raise ValueError("names of what is logged are short and printable")
    return logged


def _parse_result(result: Json, name: str) -> Part:
    if not isinstance(result, dict):
        raise ValueError("a result is a mapping")
    if "failed" in result:
        if result["failed"] not in get_args(FailureKind):
            raise ValueError("no kind of failure")
        return Part(value=failed(name, cast(FailureKind, result["failed"]), str(result.get("detail"))))
    value, parts = result.get("value"), result.get("parts")
    if not _are_numbers(parts):
        raise ValueError("parts are numbers")
    if value is not None and not _is_number(value):
        raise ValueError("a value is a finite number")
    return Part(value=value, entries={f"{name}/{writable(key)}": part for key, part in parts.items()})


def failed(name: str, kind: FailureKind, detail: str) -> Failed:
    """Return a failure of the reward `name`, with its detail on one line."""
    return Failed(kind=kind, detail=" ".join(writable(f"{name}: {detail}").split())[:MAX_DETAIL])


def writable(text: str) -> str:
    """Return `text` with each lone surrogate replaced by a question mark: UTF-8 cannot encode them."""
    return text.encode(errors="replace").decode()


def _is_number(value: Json) -> TypeGuard[float]:
    return type(value) is float and isfinite(value)


def _are_numbers(values: Json) -> TypeGuard[dict[str, float]]:
    return isinstance(values, dict) and all(_is_number(value) for value in values.values())
