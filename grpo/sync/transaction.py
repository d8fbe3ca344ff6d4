"""One verified weight sync, as every learner rank carries it out. Rank 0 also commands the samplers.

`publish` reads from top to bottom: take the memory, read the learner's probe, prove (a full check), then `transfer`:
begin, load the buckets one by one, finish, and verify the reports. Samplers and learner are reached by protocols only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from grpo.sync.probe import PERTURBED_GROUPS, Probe, Reading, Spread
from grpo.sync.transport import Sender, joined
from grpo.sync.weights import Bucket, ProbedLearner, SyncReport, buckets_of, prove, refuse_not_finite, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """A verified weight sync."""

    policy_version: int
    seconds: float
    nbytes: int
    probe: Spread
    """Difference between learner and sampler on the probe, for the sampler with the largest difference."""
    noise: Spread
    """The learner's own rounding noise on the probe."""
    full_check_s: float = 0.0
    """Seconds of the full check before the sync; 0 if there was none."""
    movement_errors: tuple[float, ...] = ()
    """After a full check, for each perturbed group of parameters: the difference between the logprobs of a sampler and
    of the learner, as a share of how far the learner's had moved (90 % quantiles)."""


class SyncedLearner(ProbedLearner, Protocol):
    """Interface of a learner rank that a sync needs, see `grpo.learner.zero`."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every weight by its name in the model folder. A collective."""

    def reload(self) -> None:
        """Load states and weights into the memory that `offload` left."""

    def offload(self) -> None:
        """Leave the memory to the samplers."""

    def drop_cache(self) -> None:
        """Release the memory that is cached for the next step."""

    def barrier(self) -> None:
        """Wait for every rank."""

    def gathered(self, ours: Bucket | None) -> list[Bucket | None]:
        """Return the bucket of every rank. A collective."""


class SyncedSamplers(Protocol):
    """All samplers as rank 0 commands them; on other ranks there are none. Each call is made on every sampler."""

    @property
    def lost(self) -> Exception | None:
        """Error of a sampler that died during this sync. No other call is made then."""

    def sleep(self) -> None:
        """Release the memory, weights included, and wait until that is done."""

    def wake(self, part: str) -> None:
        """Allocate the memory of "weights" or "kv_cache", and wait until that is done."""

    def begin_sync(self, policy_version: int) -> None:
        """Announce a sync, without waiting."""

    def load_bucket(self, bucket: Bucket) -> None:
        """Have a bucket loaded, without waiting."""

    def loaded(self) -> None:
        """Wait until the bucket has been loaded."""

    def died(self) -> bool:
        """Return whether a sampler has died, after the transfer of the bucket has failed; it is `lost` then."""

    def finish_sync(self, probe: Probe) -> list[SyncReport]:
        """Return the reports; none if a sampler has died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncEnd:
    """One learner rank's end of a sync."""

    learner: SyncedLearner
    samplers: SyncedSamplers
    sender: Sender | None
    """None if this rank sends nothing."""
    sending: Sequence[int]
    """Ranks that send weights."""
    rank: int
    ranks: int
    takes_turns: bool
    """Samplers and learner take turns in memory."""


def publish(end: SyncEnd, policy_version: int, probe: Probe, *, dtype: str, full_check: bool) -> SyncResult:
    """Run one verified sync. A collective of all ranks.

    `full_check` first proves that the sent weights are the ones in use: perturbed weights must move every sampler's
    logprobs to where they move the learner's.

    Raises WeightSyncError, or the error of a sampler that died.
    """
    # the samplers are still idle: two engines that compute at once on the same cores cost each other 0.1 s
    _take_memory(end)
    reading = end.learner.read_probe(probe)
    errors: tuple[float, ...] = ()
    full_check_s = 0.0
    if full_check:

        def send(perturbed: Reading) -> Spread:
            result = transfer(end, policy_version, probe, perturbed)
            _take_memory(end)
            return result.probe

        started = time.monotonic()
        groups = PERTURBED_GROUPS[dtype]
        errors = prove(learner=end.learner, before=reading, probe=probe, groups=groups, transfer=send)
        full_check_s = time.monotonic() - started
    # the reading is from before the perturbations: weights that were not restored are refused
    result = transfer(end, policy_version, probe, reading)
    if end.samplers.lost is not None:
        raise end.samplers.lost
    return replace(result, movement_errors=errors, full_check_s=full_check_s)


def transfer(end: SyncEnd, policy_version: int, probe: Probe, reading: Reading) -> SyncResult:
    """Sync the weights that gave the `reading`.

    If a sampler dies during the sync, it is `samplers.lost`, and the sync is completed without any sampler: with ZeRO
    3, the other ranks are in the same collectives.
    """
    started, nbytes, sent = time.monotonic(), 0, dict[str, int]()
    learner, samplers = end.learner, end.samplers
    _take_memory(end)
    if end.takes_turns:
        learner.drop_cache()
    _in_turn(end, lambda: samplers.wake("weights"))
    samplers.begin_sync(policy_version)
    for tensors in buckets_of(learner.weights()):
        refuse_not_finite(tensors)
        bucket = _packed(end, tensors)
        if bucket is not None and samplers.lost is None:
            samplers.load_bucket(bucket)
            _transmit(end, tensors)
            sent |= {spec.name: value for spec, value in zip(bucket.tensors, bucket.checksums, strict=True)}
            nbytes += sum(spec.nbytes for spec in bucket.tensors)
        if len(end.sending) > 1:
            learner.barrier()  # the buckets of the other ranks have been read
    tensors = []  # these were views of weights that are about to leave the GPU
    if end.takes_turns:
        learner.offload()
    _in_turn(end, lambda: samplers.wake("kv_cache"))
    reports = samplers.finish_sync(probe) if samplers.lost is None else []
    apart = [
        verify(report=report, policy_version=policy_version, sent=sent, learner=reading, sampler=f"sampler {i}")
        for i, report in enumerate(reports)
    ]
    return SyncResult(
        policy_version=policy_version,
        seconds=time.monotonic() - started,
        nbytes=nbytes,
        probe=max(apart, key=lambda each: each.q90, default=Spread(q90=0.0, rms=0.0)),
        noise=reading.noise,
    )


def _take_memory(end: SyncEnd) -> None:
    """Put the samplers to sleep and load the learner into the memory, if they take turns in it."""
    _in_turn(end, end.samplers.sleep)
    end.learner.reload()


def _in_turn(end: SyncEnd, command: Callable[[], None]) -> None:
    """Give the samplers a command to sleep or wake, if samplers and learner take turns in memory.

    All ranks wait for each other before it, and wait until the samplers are done after it.
    """
    if not end.takes_turns:
        return
    if end.ranks > 1:
        end.learner.barrier()
    if end.samplers.lost is None:
        command()
    if end.ranks > 1:
        end.learner.barrier()


def _packed(end: SyncEnd, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket | None:
    """Return, on rank 0, the joined bucket of all sending ranks; None on other ranks."""
    ours = end.sender.pack(tensors) if end.sender is not None else None
    if len(end.sending) > 1:
        ours = joined([bucket for bucket in end.learner.gathered(ours) if bucket is not None])
    return ours if end.rank == 0 else None


def _transmit(end: SyncEnd, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Send a bucket and wait until every sampler has loaded it."""
    assert end.sender is not None
    try:
        end.sender.transmit(tensors)
        end.samplers.loaded()
        if end.samplers.lost is None:
            end.sender.transmitted()
    except RuntimeError:  # the other end of a collective may have died
        if not end.samplers.died():
            raise
