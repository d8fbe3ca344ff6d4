"""Pool of reward workers that can be killed: takes groups of completions, returns `Scored | Failed` for each.

One thread, the pump, serves all workers. A job is a few calls on completions of one group. A worker has one job at a
time and answers each call separately. Other threads submit groups and read the counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from grpo.config import RewardConfig, part_names
from grpo.rewards.counts import Counted, Counter
from grpo.rewards.groups import RewardItem, make_group
from grpo.rewards.job_queue import JobQueue
from grpo.rewards.process import scrubbed, spec_of, withheld
from grpo.rewards.pump import Pump
from grpo.rewards.workers import Workers
from grpo.types import Failed, Scored


class RewardPool:
    """Pool of `workers` processes that load the reward files. Close it, or use it as a context manager.

    If a file does not load, every future raises a UserError that says why.
    """

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        files: Sequence[Path],
        workers: int,
        log_dir: Path,
        sources: Sequence[bytes] = (),
        first: int = 0,
    ) -> None:
        """Start the workers.

        Args:
            sources: Contents of the files, if the files may be missing on this machine.
            first: Index of the first of `rewards` in the recipe.
        """
        self._rewards = list(rewards)
        self._names = part_names(rewards)
        # copied now: starting a child while another thread changes the environment may fail (EFAULT)
        passed = {name for reward in rewards for name in reward.env}
        environment, kept_back = scrubbed(os.environ, passed), withheld(os.environ, passed)
        specs = [
            spec_of(first + i, reward, file, source=sources[i] if sources else None, kept_back=kept_back)
            for i, (reward, file) in enumerate(zip(rewards, files, strict=True))
        ]
        log_dir.mkdir(parents=True, exist_ok=True)
        memory_gib = max(reward.memory_gib for reward in rewards)
        self._workers = Workers(specs, environment=environment, memory_gib=memory_gib, log_dir=log_dir)
        self._queue, self._counter = JobQueue(), Counter()
        self._pump = Pump(self._workers, workers, self._queue, self._counter)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]:
        """Score the completions of one group: items with the same row. Thread-safe.

        The future returns one outcome per item, in order.
        """
        if not items:
            nothing: Future[list[Scored | Failed]] = Future()
            nothing.set_result([])
            return nothing
        group, jobs = make_group(items, self._rewards, self._names)
        if jobs:
            self._queue.put(jobs)
            self._pump.wake_up()
        else:
            self._counter.add(scored=len(items), failed=len(items))
            group.future.set_result([group.outcome(i) for i in range(len(items))])
        return group.future

    def counts(self) -> Counted:
        """Return the counts so far, including running calls. Thread-safe."""
        now = time.monotonic()
        running = [(now - worker.since, tuple(job.calls)) for worker, job in self._workers.jobs()]
        return self._counter.read((self._names[calls[0][0]], seconds) for seconds, calls in running if calls)

    def close(self) -> None:
        """Kill every worker and cancel the futures that are not done. A second call does nothing."""
        self._pump.close()
