"""What is said while completions are sampled and scored."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from grpo.rollout.collect import collect, requests_of
from grpo.run import heartbeat
from grpo.run.heartbeat import Watch, waiting
from grpo.run.timeline import Timeline
from grpo.types import Moment, Prompt, SampledBlock, Scored

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


class Sampler:
    """Owes what a test says."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}

    def sample(self, requests: Sequence[Any], settings: Any) -> Iterator[SampledBlock]:
        raise NotImplementedError

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
    watch = Watch("step 8", 64, sampler=Sampler(), scorer=scorer, timeline=Timeline(None), say=print)
    assert watch.line() == "step 8: sampling, 0 of 64 completions; 0 s"
    watch.sampled(30)
    watch.sampled(11)
    now[0] += 65
    assert watch.line() == "step 8: sampling, 41 of 64 completions; 65 s"
    watch.submitted(16)
    scorer.counted = Counted(scored=112, failed=10, slow=5, slowest="judge", slowest_s=21.4)
    assert watch.line() == (
        "step 8: sampling, 41 of 64 completions; scoring, 12 of 16; reward judge slowest, 21 s; 2 calls over 10 s; "
        "3 failed; 65 s"
    )
    watch.sampled(23)
    watch.submitted(48)
    scorer.counted = Counted(scored=163, failed=7, slow=3)
    assert watch.line() == "step 8: scoring, 63 of 64; 65 s"


def block(*places: tuple[int, int]) -> SampledBlock:
    """Completions of one token each, by request and sample index."""
    ones = np.ones(len(places), dtype=np.int32)
    index, sample_index = np.asarray(places, dtype=np.int32).T
    return SampledBlock(
        index=index, sample_index=sample_index, lengths=ones, truncated=ones == 0, aborted=ones == 0, token_ids=ones,
        sampler_logprobs=ones.astype(np.float32), policy_versions=ones,
    )  # fmt: skip


def test_a_collection_reports_what_arrives_is_submitted_and_is_scored() -> None:
    """Two groups of two. The first is complete after three completions, the second after the fourth."""
    log: list[Any] = []

    class Blocks(Sampler):
        def sample(self, requests: Sequence[Any], settings: Any) -> Iterator[SampledBlock]:
            yield from (block((0, 1), (1, 0), (0, 0)), block((1, 1)))

    class AtOnce(Scorer):
        def submit(self, items: Sequence[Any]) -> Future[Any]:
            future: Future[Any] = Future()
            log.append([item.completion for item in items])
            future.set_result([Scored(value=1.0, parts={}) for _ in items])
            return future

    class Log:
        def sampled(self, completions: int) -> None:
            log.append(completions)

        def submitted(self, completions: int) -> Callable[[], None]:
            log.append(f"{completions} submitted")
            return lambda: log.append(f"{completions} scored")

    prompts = [
        Prompt(prompt_id=f"a:{i}", token_ids=(1,), text="", row={}, messages=None, dataset="a", where="a[0]")
        for i in range(2)
    ]
    collected = collect(
        prompts, requests_of(prompts, 2, lambda prompt, index: index), sampler=Blocks(), scorer=AtOnce(),
        settings=None, decode=lambda ids: [f"text {k}" for k in range(len(ids))], moment=Moment(),  # type: ignore[arg-type]
        reward_timeout_s=1.0, observer=Log(),
    )  # fmt: skip
    texts = ["text 0", "text 1"]
    assert log == [3, "2 submitted", texts, "2 scored", 1, "2 submitted", texts, "2 scored"]
    assert [[rollout.completion.seed for rollout in group.rollouts] for group in collected.groups] == [[0, 1], [0, 1]]


def test_the_slowest_of_several_samplers_is_named(now: list[float]) -> None:
    sampler = Sampler()
    watch = Watch("step 8", 64, sampler=sampler, scorer=Scorer(), timeline=Timeline(None), say=print)
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

    with Watch("step 1", 4, sampler=Sampler(), scorer=Scorer(), timeline=Timeline(None), say=say):
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
    with Watch("step 1", 4, sampler=Sampler(), scorer=Scorer(), timeline=Timeline(None), say=said.append):
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
