"""Samplers and learner that take turns in memory: who leaves it, who returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from grpo.cluster.fleet import Fleet


def put_to_sleep(fleet: Fleet, *, keep_weights: bool) -> dict[str, float]:
    """Put the samplers to sleep, if samplers and learner take turns in memory. Return the memory that the samplers
    still use, as a metric."""
    if not fleet.config.takes_turns:
        return {}
    pending = [sampler.sleep.remote(keep_weights) for sampler in fleet.samplers]
    what, timeout_s = "the samplers to release their memory", fleet.config.cluster.step_timeout_s
    return {"memory/residual_gib": max(fleet.watch.wait(pending, what, timeout_s))}


@contextlib.contextmanager
def learner_between_steps(fleet: Fleet) -> Iterator[None]:
    """Give the learner the memory for the block, then return it to the samplers."""
    put_to_sleep(fleet, keep_weights=True)
    yield
    if fleet.config.takes_turns:
        timeout_s = fleet.config.cluster.step_timeout_s
        leaving = [rank.offload.remote() for rank in fleet.learners]
        fleet.watch.wait(leaving, "the learner to release its memory", timeout_s)
        waking = [sampler.wake.remote("weights", "kv_cache") for sampler in fleet.samplers]
        fleet.watch.wait(waking, "the samplers to wake", timeout_s)
