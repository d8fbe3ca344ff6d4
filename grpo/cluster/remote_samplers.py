"""All samplers as learner rank 0 commands them in a weight sync, by Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import ray
from ray.actor import ActorHandle

from grpo.sync.probe import Probe
from grpo.sync.transport import Sender
from grpo.sync.weights import Bucket, SyncReport
from grpo.types import Json

T = TypeVar("T")
ENDING_S = 10.0
"""Seconds that calls to samplers may take to end after one of them has failed."""


class Reference(Protocol[T]):
    """Ray's reference to the result of a call, `ray.ObjectRef`. Ray is not typed here, so its own type says nothing."""

    def future(self) -> Future[T]: ...


class RemoteSamplers:
    """Implementation of `grpo.sync.transaction.SyncedSamplers`, for one sync."""

    def __init__(self, handles: Sequence[ActorHandle], sender: Sender | None, timeout_s: float) -> None:
        """`handles`: empty on ranks other than 0. `sender`: aborted when a sampler has failed."""
        self._handles, self._sender, self._timeout = handles, sender, timeout_s
        self._begun: list[Reference[None]] = []
        """Calls that the first bucket waits for, too."""
        self._pending: list[Reference[None]] = []
        """Calls for the current bucket."""
        self.lost: Exception | None = None

    def init_transfer(self, infos: Sequence[Mapping[str, Json]]) -> list[Reference[None]]:
        """Have the samplers open their ends of the transport, without waiting."""
        return [s.init_transfer.remote(info) for s, info in zip(self._handles, infos, strict=True)]

    def sleep(self) -> None:
        self.all_of([s.sleep.remote(False) for s in self._handles])

    def wake(self, part: str) -> None:
        self.all_of([s.wake.remote(part) for s in self._handles])

    def begin_sync(self, policy_version: int) -> None:
        self._begun = [s.begin_sync.remote(policy_version) for s in self._handles]

    def load_bucket(self, bucket: Bucket) -> None:
        self._pending = [*self._begun, *(s.load_bucket.remote(bucket) for s in self._handles)]
        self._begun = []

    def loaded(self) -> None:
        self.all_of(self._pending)

    def died(self) -> bool:
        self.lost = self.lost or first_death(self._pending)
        return self.lost is not None

    def finish_sync(self, probe: Probe) -> list[SyncReport]:
        return self.all_of([s.finish_sync.remote(probe) for s in self._handles])

    def all_of(self, references: Sequence[Reference[T]]) -> list[T]:
        """Return the results of calls to samplers, or an empty list if one of them has died.

        The first failure ends the wait. The others may be waiting in a collective for the one that failed. They get an
        error at once only if this end aborts the collective.
        """
        waiting, deadline = list(references), time.monotonic() + self._timeout
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"the samplers have not answered in {self._timeout:.0f} s")
                ray.get(ready)
        except ray.exceptions.RayActorError as error:
            self.lost = error
            if self._sender is not None:
                self._sender.abort()
        except ray.exceptions.RayTaskError:  # losing a peer in a collective fails a call, too; the death is the cause
            if self._sender is not None:
                self._sender.abort()
            self.lost = first_death(references)
            if self.lost is None:
                raise
        if self.lost is not None:
            return []
        found: list[T] = ray.get(list(references))
        return found


def in_background(call: Callable[[], None]) -> Future[None]:
    """Run `call` in a daemon thread, and return a future of its outcome."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            call()
            outcome.set_result(None)
        except Exception as error:  # noqa: BLE001 - the future carries it
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def first_death(references: Sequence[Reference[T]]) -> Exception | None:
    """Return the error of the first of these calls whose actor has died within ENDING_S; None if none has."""
    ended, _ = ray.wait(list(references), num_returns=len(references), timeout=ENDING_S)
    for reference in ended:
        try:
            ray.get(reference)
        except ray.exceptions.RayActorError as error:
            lost: Exception = error
            return lost
        except ray.exceptions.RayTaskError:
            continue
    return None
