"""Which node is asked to score, with actors by hand."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from grpo.cluster.reward_workers import SpreadPool
from grpo.types import RewardOutage


class Node:
    """The pool of a node: keeps what it was asked, until it is answered."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Future[Any]]] = []
        self.score = SimpleNamespace(remote=self._score)

    def _score(self, items: Any) -> Any:
        future: Future[Any] = Future()
        self.asked.append((items, future))
        return SimpleNamespace(future=lambda: future)

    def answer(self) -> None:
        items, future = self.asked.pop(0)
        future.set_result([f"scored {item}" for item in items])

    def die(self) -> None:
        for _, future in self.asked:
            future.set_exception(ray.exceptions.RayActorError())


@pytest.fixture
def pool() -> Any:
    made = object.__new__(SpreadPool)
    made._actors = {0: Node(), 1: Node()}
    made._owed = {0: 0, 1: 0}
    made._lock = threading.Lock()
    return made


def test_a_group_goes_to_the_node_that_owes_the_fewest(pool: Any) -> None:
    first, second = pool._actors.values()
    for item in "abcd":
        pool.submit([item])
    assert [items for items, _ in first.asked] == [["a"], ["c"]]
    second.answer()
    second.answer()
    later = [pool.submit([item]) for item in "ef"]
    assert [items for items, _ in second.asked] == [["e"], ["f"]]
    second.answer()
    assert later[0].result(timeout=0) == ["scored e"]


def test_what_a_lost_node_owed_is_asked_of_the_others(pool: Any) -> None:
    first, second = pool._actors.values()
    asked = [pool.submit([item]) for item in "ab"]
    first.die()
    assert [items for items, _ in second.asked] == [["b"], ["a"]]
    second.answer()
    second.answer()
    assert [future.result(timeout=0) for future in asked] == [["scored a"], ["scored b"]]
    last = pool.submit(["c"])
    second.die()
    with pytest.raises(RewardOutage, match=r"no node with reward workers is left"):
        last.result(timeout=0)
