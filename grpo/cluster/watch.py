"""Wait for the engines' actors, and find out which of them died, was lost or is stuck.

Every wait has a deadline. If an actor dies, the error quotes its last log lines. If the deadline passes, each engine
first writes the stacks of its threads to its log.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grpo.cluster.actors import STACK_SIGNAL
from grpo.cluster.remote_samplers import Reference
from grpo.run.folder import is_disk_full
from grpo.suggest import one_line
from grpo.sync.weights import WeightSyncError
from grpo.types import EngineFailure, UserError

T = TypeVar("T")

LOOK_S = 2.0
"""Seconds between two checks, during a wait, that the nodes are still alive."""
STACK_S = 10.0
"""Seconds that a node may take to deliver STACK_SIGNAL."""


class ActorDied(EngineFailure):
    """An actor's process ended."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text, learner_answers=name.startswith("sampler"))
        self.name = name


def _oom_kills() -> int:
    """Return how many processes of this machine the kernel has killed for lack of memory since boot."""
    with contextlib.suppress(OSError):  # a kernel without the counter
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _signal(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)


class ActorWatch:
    """The living actors by name, and waits for their calls."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._names: dict[ActorHandle, str] = {}
        self._processes: dict[ActorHandle, Reference[tuple[str, int]]] = {}
        """Actor -> reference to its node and pid, requested when it is created."""
        self._known: dict[ActorHandle, tuple[str, int]] = {}
        """Actor -> node and pid, of those that have answered."""
        self.hosts: dict[str, str] = {}
        """Engine -> address of its node."""
        self._oom_kills = _oom_kills()

    def add(self, handle: ActorHandle, name: str) -> None:
        self._names[handle] = name
        self._processes[handle] = handle.process.remote()

    def kill(self, handle: ActorHandle) -> None:
        """Kill an actor and forget it."""
        ray.kill(handle)
        for known in (self._names, self._processes, self._known):
            known.pop(handle, None)

    def kill_all(self) -> None:
        for handle in self._names:
            ray.kill(handle)

    def wait(
        self, references: Sequence[Reference[T]], what: str, timeout_s: float, *, of_samplers: bool = False
    ) -> list[T]:
        """Return the results of `references`, or raise the first failure among them.

        Args:
            of_samplers: The references are calls to samplers while the learner is idle.
        """
        pending = list(references)
        asked = time.monotonic()
        while pending:
            ready, pending = self.ready(pending, what, timeout_s, asked)
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, (UserError, WeightSyncError)) or is_disk_full(cause):
                    raise cause from None
                if isinstance(cause, ray.exceptions.RayActorError):  # the learner was waiting for a sampler that died
                    raise self._died(what, cause) from error
                said = one_line(cause, 500)
                failure = f"while waiting for {what}: {type(cause).__name__}: {said}"
                raise EngineFailure(failure, learner_answers=of_samplers) from error
            except ray.exceptions.RayActorError as error:
                raise self._died(what, error) from error
        results: list[T] = ray.get(list(references))
        return results

    def ready(self, references: list[T], what: str, timeout_s: float, asked: float) -> tuple[list[T], list[T]]:
        """Wait for the first of `references` (or streams), as `ray.wait` does, but fail when a node is lost.

        Ray may never report the death of actors on a lost node.

        Raises EngineFailure when a node is lost, or after `timeout_s` since `asked`.
        """
        deadline = asked + timeout_s
        while True:
            ready, pending = ray.wait(references, timeout=max(0.0, min(LOOK_S, deadline - time.monotonic())))
            if ready:
                return ready, pending
            if lost := self._lost():
                raise EngineFailure(f"{lost} while waiting for {what}")
            if time.monotonic() >= deadline:
                raise self._overdue(what, timeout_s)

    def _lost(self) -> str | None:
        """Return which Ray processes or nodes of the engines were lost, in words; None if none."""
        # private Ray: if one helper process has ended, all of them will, and a query to a dying GCS would hang
        dead = [kind for kind, _ in ray._private.worker.global_worker.node.dead_processes()]
        if dead:
            return f"the node of all engines was lost (its {', '.join(dead)} ended)"
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        lost = {self._names[h]: node for h, (node, _) in self._places().items() if node not in alive}
        gone = [f"{name} at {self.hosts.get(name, node[:12])}" for name, node in lost.items()]
        return f"the node of {', '.join(gone)} was lost" if gone else None

    def _places(self) -> dict[ActorHandle, tuple[str, int]]:
        """Return the node and pid of every actor that has reported them so far."""
        asked = [reference for handle, reference in self._processes.items() if handle not in self._known]
        said = ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []
        for handle, reference in self._processes.items():
            if reference in said:
                with contextlib.suppress(ray.exceptions.RayError):  # the actor has died
                    self._known[handle] = ray.get(reference)
        return self._known

    def settle(self, references: Sequence[Reference[T]], timeout_s: float) -> None:
        """Wait until calls have ended, successfully or not."""
        ray.wait(list(references), num_returns=len(references), timeout=timeout_s)

    def _died(self, what: str, error: ray.exceptions.RayActorError) -> EngineFailure:
        """Return the error for a dead actor, with its last lines, or for its lost node, which is then the cause."""
        if lost := self._lost():
            return EngineFailure(f"{lost} while waiting for {what}")
        dead = getattr(error, "actor_id", None)
        name = next((n for handle, n in self._names.items() if handle._actor_id.hex() == str(dead)), "an actor")
        why = one_line(error)
        if struck := _oom_kills() - self._oom_kills:
            why = f"the kernel has killed {struck} processes for lack of memory since the engines were started; {why}"
        # its death may be known before the loss of its node
        at = f" at {self.hosts[name]}" if name in self.hosts and len(set(self.hosts.values())) > 1 else ""
        return ActorDied(name, f"{name}{at} died while waiting for {what} ({why}); its last lines:\n{self._tail(name)}")

    def _overdue(self, what: str, timeout_s: float) -> EngineFailure:
        """Return an error that says what was awaited, and what each engine was doing at the deadline."""
        self._ask_for_stacks()
        tails = "\n".join(f"--- {name}\n{self._tail(name, 40)}" for name in self._names.values())
        return EngineFailure(
            f"waited {timeout_s:.0f} s for {what}; the engines' last lines, with their stacks:\n{tails}"
        )

    def _ask_for_stacks(self) -> None:
        """Have every actor that has started write its stacks to its log. Wait for at most STACK_S."""
        pids: dict[str, list[int]] = {}
        for node, pid in self._places().values():
            pids.setdefault(node, []).append(pid)
        strike = ray.remote(num_cpus=0)(_signal)
        struck = [
            strike.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(found)
            for node, found in pids.items()
        ]
        ray.wait(struck, num_returns=len(struck), timeout=STACK_S)
        time.sleep(0.5)  # time to write; the logs are on the driver's machine or on a shared file system

    def _tail(self, name: str, lines: int = 20) -> str:
        path = self._log_dir / f"{name}.log"
        if not path.exists():
            return "(nothing written)"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
