"""What is said while completions are sampled and scored."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.config import RewardConfig
from grpo.rewards import counts
from grpo.rewards.counts import Counted, total
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.run import heartbeat
from grpo.run.heartbeat import Watch, waiting
from grpo.types import SampledBlock

GATED = """
import pathlib, time
def gated(completion, row):
    if completion == "wrong":
        raise ValueError("planted")
    while completion != "quick" and not pathlib.Path(row["gate"]).exists():
        time.sleep(0.01)
    return 1.0

def quiet(completion, row):
    return None
"""
"""A reward that answers `quick` and `wrong` at once, the others when the gate is open; and one that abstains."""


def block(completions: int) -> SampledBlock:
    """Completions of one token each."""
    ones = np.ones(completions, dtype=np.int32)
    return SampledBlock(
        index=ones, sample_index=ones, lengths=ones, truncated=ones == 1, aborted=ones == 0, token_ids=ones,
        sampler_logprobs=ones.astype(np.float32), policy_versions=ones,
    )  # fmt: skip


class Sampler:
    """Gives blocks of so many completions."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.left: dict[str, int] = {}

    def sample(self, requests: Sequence[Any], settings: Any) -> Iterator[SampledBlock]:
        yield from (block(size) for size in self.sizes)

    def outstanding(self) -> dict[str, int]:
        return self.left


class Scorer:
    """Has counted what a test says."""

    def __init__(self) -> None:
        self.counted = Counted(scored=100, failed=7, slow=3)

    def submit(self, items: Sequence[Any]) -> Future[Any]:
        return Future()

    def counts(self) -> Counted:
        return self.counted


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a watch sees."""
    at = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: at[0])
    return at


def test_a_line_says_who_is_awaited(now: list[float]) -> None:
    scorer = Scorer()
    watch = Watch("step 8", 64, sampler=Sampler(30, 11, 23), scorer=scorer, say=print)
    blocks = watch.sample([], None)
    assert watch.line() == "step 8: sampling, 0 of 64 completions; 0 s"
    next(blocks)
    next(blocks)
    now[0] += 65
    assert watch.line() == "step 8: sampling, 41 of 64 completions; 65 s"
    watch.submit([None] * 16)  # type: ignore[list-item]
    scorer.counted = Counted(scored=112, failed=10, slow=5, slowest="judge", slowest_s=21.4)
    assert watch.line() == (
        "step 8: sampling, 41 of 64 completions; scoring, 12 of 16; reward judge slowest, 21 s; 2 calls over 10 s; "
        "3 failed; 65 s"
    )
    next(blocks)
    watch.submit([None] * 48)  # type: ignore[list-item]
    scorer.counted = Counted(scored=163, failed=7, slow=3)
    assert watch.line() == "step 8: scoring, 63 of 64; 65 s"


def test_the_slowest_of_several_samplers_is_named(now: list[float]) -> None:
    sampler = Sampler()
    watch = Watch("step 8", 64, sampler=sampler, scorer=Scorer(), say=print)
    sampler.left = {"sampler-0": 24}
    assert watch.line() == "step 8: sampling, 0 of 64 completions; 0 s"  # there is no other
    sampler.left = {"sampler-0": 3, "sampler-1": 24, "sampler-2": 0}
    assert watch.line() == "step 8: sampling, 0 of 64 completions; sampler-1 has 24 left; 0 s"


def test_it_is_said_every_interval_and_only_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.05)
    said: list[str] = []
    second = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            second.set()

    with Watch("step 1", 4, sampler=Sampler(), scorer=Scorer(), say=say):
        assert second.wait(timeout=60)
    count = len(said)
    assert all(text.startswith("step 1: sampling, 0 of 4 completions; ") for text in said)
    time.sleep(0.2)
    assert len(said) == count
    assert "heartbeat" not in [thread.name for thread in threading.enumerate()]


def test_a_wait_for_an_engine_is_said_with_its_seconds(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.01)
    said: list[str] = []
    heard = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        heard.set()

    awaited = waiting("step 8", "the learner's update", say)
    now[0] += 42
    with awaited:
        assert heard.wait(timeout=60)
    assert set(said) == {"step 8: waiting for the learner's update; 42 s"}


def test_a_quick_collection_says_nothing() -> None:
    said: list[str] = []
    with Watch("step 1", 4, sampler=Sampler(), scorer=Scorer(), say=said.append):
        pass
    assert said == []


def test_a_pool_counts_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of four with two rewards: two completions are through, one of them failed, and one call hangs."""
    monkeypatch.setattr(counts, "SLOW_S", 0.3)
    file, gate = tmp_path / "gated.py", tmp_path / "gate"
    file.write_text(GATED)
    rewards = [RewardConfig(file=str(file)), RewardConfig(file=str(file), name="quiet")]

    def item(text: str) -> RewardItem:
        return RewardItem(completion=text, row={"gate": str(gate)}, messages=None, info={}, dataset="d")

    with RewardPool(rewards, files=[file, file], workers=1, log_dir=tmp_path / "logs") as pool:
        assert pool.counts() == Counted()
        first = pool.submit([item("wrong"), item("quick")])
        assert len(first.result(timeout=60)) == 2
        assert pool.counts() == Counted(scored=2, failed=1)
        second = pool.submit([item("wrong"), item("slow")])
        deadline = time.monotonic() + 60
        while (counted := pool.counts()).slow == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (counted.scored, counted.failed, counted.slowest) == (2, 2, "gated")  # the other reward is still to come
        assert counted.slowest_s > 0.3
        gate.touch()
        second.result(timeout=60)
        assert pool.counts() == Counted(scored=4, failed=2, slow=1)


def test_a_completion_that_nobody_scores_has_failed(tmp_path: Path) -> None:
    file = tmp_path / "gated.py"
    file.write_text(GATED)
    rewards = [RewardConfig(file=str(file), name="quiet"), RewardConfig(file=str(file), sets=("other",))]
    item = RewardItem(completion="x", row={}, messages=None, info={}, dataset="d")
    elsewhere = [RewardConfig(file=str(file), sets=("other",))]
    for some in (rewards, elsewhere):
        with RewardPool(some, files=[file] * len(some), workers=1, log_dir=tmp_path / "logs") as pool:
            pool.submit([item]).result(timeout=60)
            assert pool.counts() == Counted(scored=1, failed=1)


def test_the_counts_of_several_pools_are_added() -> None:
    one = Counted(scored=3, failed=1, slow=2, slowest="a", slowest_s=4.0)
    other = Counted(scored=5, failed=0, slow=1, slowest="b", slowest_s=9.0)
    assert total([one, other]) == Counted(scored=8, failed=1, slow=3, slowest="b", slowest_s=9.0)
    assert total([]) == Counted()
    assert other.since(one) == Counted(scored=2, failed=0, slow=0, slowest="b", slowest_s=9.0)
