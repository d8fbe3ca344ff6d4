"""Reward workers on several nodes: one pool per node, in a Ray actor, behind the driver's `submit`.

A group goes to the node with the fewest groups in flight. When a node is lost, the other nodes score its groups
instead: a score depends only on the completion.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import ray
from ray.actor import ActorHandle

from grpo.cluster.placement import Reservation
from grpo.config import Config, RewardConfig
from grpo.rewards.counts import Counted, total
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.types import Failed, RewardOutage, Scored

COUNTS_S = 2.0
"""Seconds that a node may take to report its counts."""


class RewardActor:
    """A `RewardPool` behind Ray."""

    def __init__(
        self, rewards: Sequence[RewardConfig], files: Sequence[Path], sources: Sequence[bytes], workers: int, logs: Path
    ) -> None:
        """Start the pool. `sources`: contents of the files, which need not exist on this node."""
        self._pool = RewardPool(rewards, files=files, sources=sources, workers=workers, log_dir=logs)

    def score(self, items: Sequence[RewardItem]) -> list[Scored | Failed]:
        return self._pool.submit(items).result()

    def counts(self) -> Counted:
        return self._pool.counts()

    def host(self) -> str:
        """Return the address of this node."""
        address: str = ray.util.get_node_ip_address()
        return address


class SpreadPool:
    """Pool of `cluster.reward_workers` workers on `cluster.reward_nodes` nodes.

    A context manager that must be used in a Ray session.
    """

    def __init__(self, config: Config, files: Sequence[Path], log_dir: Path) -> None:
        """Place the actors.

        Raises TimeoutError when Ray does not place them, OSError when a file cannot be read.
        """
        self._reserved = Reservation(config, config.cluster.start_timeout_s, roles=("rewards",))
        sources = [file.read_bytes() for file in files]
        actor = ray.remote(RewardActor)
        self._actors: dict[int, ActorHandle] = {
            i: actor.options(
                num_cpus=config.rewards_on(i),
                max_concurrency=1000,
                name=f"rewards-{i}",
                scheduling_strategy=self._reserved.of("rewards", i),
            ).remote(config.rewards, files, sources, config.rewards_on(i), log_dir / f"rewards-{i}")
            for i in range(config.cluster.reward_nodes)
        }
        self._owed = dict.fromkeys(self._actors, 0)
        self._lock = threading.Lock()

    def __enter__(self) -> SpreadPool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            actors, self._actors = self._actors, {}
        for actor in actors.values():
            ray.kill(actor)
        self._reserved.release()

    def hosts(self, timeout_s: float) -> dict[str, str]:
        """Return rewards-<i> -> the address of its node."""
        asked = {f"rewards-{i}": actor.host.remote() for i, actor in self._actors.items()}
        return dict(zip(asked, ray.get(list(asked.values()), timeout=timeout_s), strict=True))

    def counts(self) -> Counted:
        """Return the counts, like `RewardPool.counts`, of the nodes that answer within COUNTS_S."""
        with self._lock:
            asked = [actor.counts.remote() for actor in self._actors.values()]
        found = []
        for reference in ray.wait(asked, num_returns=len(asked), timeout=COUNTS_S)[0] if asked else []:
            with contextlib.suppress(ray.exceptions.RayError):  # its node was lost
                found.append(ray.get(reference))
        return total(found)

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]:
        """Score a group, like `RewardPool.submit`."""
        future: Future[list[Scored | Failed]] = Future()
        self._ask(list(items), future)
        return future

    def _ask(self, items: list[RewardItem], future: Future[list[Scored | Failed]]) -> None:
        with self._lock:
            if not self._actors:
                future.set_exception(RewardOutage("no node with reward workers is left"))
                return
            node = min(self._actors, key=self._owed.__getitem__)
            actor = self._actors[node]
            self._owed[node] += 1

        def done(answered: Future[list[Scored | Failed]]) -> None:
            with self._lock:
                self._owed[node] -= 1
            error = answered.exception()
            if isinstance(error, ray.exceptions.RayActorError):
                with self._lock:
                    self._actors.pop(node, None)
                self._ask(items, future)
            elif isinstance(error, ray.exceptions.RayTaskError):
                future.set_exception(error.cause)
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(answered.result())

        actor.score.remote(items).future().add_done_callback(done)
