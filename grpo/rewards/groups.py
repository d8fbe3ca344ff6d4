"""A group of completions on its way through a reward pool: its calls, its jobs, its answers and its outcomes."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from grpo.config import RewardConfig
from grpo.rewards.child.calls import Info, Item
from grpo.rewards.process import Part
from grpo.types import NOTHING_LOGGED, Failed, Logged, Moment, Scored, Unchecked

CALLS_PER_JOB = 8
"""Small enough to spread a group of slow calls over the workers, large enough to keep message overhead low."""

ABSTAINED = Part(value=None)
"""Result of a reward for a row that it does not apply to."""

Call = tuple[int, Sequence[int]]
"""(index of the reward, items)."""


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
