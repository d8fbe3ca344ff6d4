"""The engines of a run as the driver's loop uses them: place, start, wait, and replace samplers that die.

Every wait has a deadline. If an actor dies, the error quotes its last log lines. If the deadline passes, each engine
first writes the stacks of its threads to its log.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grpo.cluster.actors import STACK_SIGNAL, LearnerActor, SamplerActor, SyncResult
from grpo.cluster.placement import ENGINES, Reservation
from grpo.config import Config
from grpo.files import FileRecord
from grpo.machine import usable_cpus
from grpo.run.folder import is_disk_full
from grpo.run.timeline import Timeline
from grpo.sync.probe import Probe
from grpo.sync.transport import transport_of
from grpo.sync.weights import WeightSyncError
from grpo.types import (
    EngineFailure,
    RankStep,
    SampledBlock,
    SampleRequest,
    SamplingSettings,
    StepResult,
    UserError,
    only,
)

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


def sampler_environment(config: Config) -> dict[str, str]:
    """Return the environment of a sampler process. It must be set before the process imports vllm or torch."""
    environment = COMMON | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the actor's process, where its model is accessible
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if not config.on_gpu:
        threads = config.sampler.threads or usable_cpus()
        environment |= CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
        if config.sampler_workers > 1:  # otherwise vLLM requires a NUMA node for each worker
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return environment


def learner_environment(config: Config, rank: int) -> dict[str, str]:
    """Return the environment of a learner process. It must be set before the process imports torch or deepspeed."""
    environment = COMMON | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(config.cluster.learner_ranks)}
    if not config.on_gpu:
        threads = config.learner.threads or max(1, usable_cpus() // config.cluster.learner_ranks)
        environment |= CPU_ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return environment


CPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    # waiting threads sleep: spinning would slow down everything else on these cores
    "OMP_WAIT_POLICY": "PASSIVE",
}

COMMON = {
    "PYTHONSAFEPATH": "1",  # vLLM starts `python -m ...`, which would let the working directory shadow modules
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # from torch, about calls that DeepSpeed makes in every step
}


def train_settings(config: Config, end_token_ids: Sequence[int]) -> SamplingSettings:
    """Return the sampling settings of training. The learner uses the same temperature in its replay."""
    return SamplingSettings(
        temperature=config.sampling.temperature,
        max_tokens=config.sampling.max_tokens,
        end_token_ids=tuple(end_token_ids),
        stop=config.sampling.stop,
    )


def eval_settings(config: Config, end_token_ids: Sequence[int]) -> SamplingSettings:
    """Return the sampling settings of evaluation."""
    e = config.data.eval
    return SamplingSettings(
        temperature=e.temperature,
        max_tokens=e.max_tokens or config.sampling.max_tokens,
        end_token_ids=tuple(end_token_ids),
        stop=config.sampling.stop,
        top_p=e.top_p,
        top_k=e.top_k,
        min_p=e.min_p,
    )


class Engines:
    """All actors of a run, with the operations that the driver's loop calls. A sampler that dies is replaced."""

    def __init__(self, config: Config, log_dir: Path, say: Callable[[str], None], timeline: Timeline) -> None:
        """Place the actors and load the engines: all at once or, if they share GPUs, the samplers first.

        Without learner ranks, the samplers keep the weights of the model folder.

        Args:
            say: Called with a line when a sampler has been replaced.

        Raises EngineFailure when an engine does not start, UserError when the model folder is the cause.
        """
        self._config, self._log_dir, self._say, self._timeline = config, log_dir, say, timeline
        self._timeout = config.cluster.step_timeout_s
        self._names: dict[Any, str] = {}
        self._processes: dict[Any, Any] = {}
        """Actor -> reference to its node and pid, requested when it is created."""
        self._outstanding: dict[int, int] = {}
        """Sampler -> completions that it still has to deliver."""
        self._known: dict[Any, tuple[str, int]] = {}
        """Actor -> node and pid, of those that have answered."""
        self._transport = transport_of(config)
        self._published: tuple[int, Probe] | None = None
        self._replaced = 0
        self.hosts: dict[str, str] = {}
        """Engine -> address of its node."""
        self._oom_kills = _oom_kills()
        start = config.cluster.start_timeout_s
        try:
            self._reserved = Reservation(config, start, ENGINES)
        except TimeoutError as error:
            raise EngineFailure(str(error)) from error
        learner_class: Any = ray.remote(LearnerActor)
        self.learners = [
            self._make(learner_class, "learner", i, learner_environment(config, i), gpus=int(config.on_gpu))
            for i in range(config.cluster.learner_ranks)
        ]
        self.samplers = [self._make_sampler(i) for i in range(config.cluster.samplers)]
        loading = [s.start.remote(self._transport, self._devices_of(i)) for i, s in enumerate(self.samplers)]
        if self.learners and (config.takes_turns or self._transport == "ipc"):
            self._wait(loading, "the samplers to load", start)  # vLLM measures the free memory while it loads
            loading = []
        if config.takes_turns and self.learners:
            leaving = [sampler.sleep.remote(False) for sampler in self.samplers]
            self._wait(leaving, "the samplers to leave the memory to the learner", start)
        if self.learners:
            host, port = self._wait([self.learners[0].open_store.remote()], "the learner's rendezvous", start)[0]
            loading += [learner.start.remote(host, port) for learner in self.learners]
        self._wait(loading, "the engines to load", start)
        if self.learners:
            self._connect()

    def _connect(self) -> None:
        """Open the weight transfer between learner and samplers."""
        start = self._config.cluster.start_timeout_s
        ranks = self._wait([rank.place.remote() for rank in self.learners], "the learner's places", start)
        at = self._wait([sampler.place.remote() for sampler in self.samplers], "the samplers' places", start)
        self.hosts = {f"learner-{i}": place.host for i, place in enumerate(ranks)}
        self.hosts |= {f"sampler-{i}": place.host for i, place in enumerate(at)}
        connecting = [rank.connect.remote(ranks, self.samplers, at, self._transport, start) for rank in self.learners]
        self._wait(connecting, "the weight transfer to open", start)

    def _devices_of(self, sampler: int) -> list[str]:
        """Return the GPUs that a sampler shares with learner ranks, in the order of the sampler's workers."""
        if self._transport != "ipc":
            return []
        workers = self._config.sampler_workers
        ranks = self.learners[sampler * workers : (sampler + 1) * workers]
        start = self._config.cluster.start_timeout_s
        found = self._wait([rank.devices.remote() for rank in ranks], "the learner's GPUs", start)
        return [device for devices in found for device in devices]

    def _make_sampler(self, index: int) -> Any:
        sampler_class: Any = ray.remote(SamplerActor)
        gpus = self._config.sampler_workers if self._config.on_gpu and self._transport != "ipc" else 0
        return self._make(sampler_class, "sampler", index, sampler_environment(self._config), gpus=gpus)

    def _make(self, actor: Any, kind: str, index: int, environment: dict[str, str], *, gpus: int) -> Any:
        name = f"{kind}-{index}"
        cluster = self._config.cluster
        options = self._reserved.of(kind, index) | {
            "num_cpus": cluster.sampler_cpus if kind == "sampler" else cluster.learner_cpus,
            "num_gpus": gpus,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment},
            # unique in the run's namespace; the name of an actor that died may not be free yet
            "name": f"{name}.{self._replaced}" if self._replaced else name,
        }
        handle = actor.options(**options).remote(self._config, index, str(self._log_dir / f"{name}.log"))
        self._names[handle] = name
        self._processes[handle] = handle.process.remote()
        return handle

    def sample(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> Iterator[SampledBlock]:
        """Spread `requests` over the samplers in contiguous shares. Yield finished completions as they arrive.

        When a sampler dies, its replacement samples the missing completions, with the same seeds.
        """
        count = len(self.samplers)
        shares = [requests[i * len(requests) // count : (i + 1) * len(requests) // count] for i in range(count)]
        streams = {self._ask(i, share, settings): (i, share) for i, share in enumerate(shares) if share}
        self._outstanding = {i: sum(len(r.seeds) for r in share) for i, share in enumerate(shares) if share}
        done: set[tuple[int, int]] = set()
        spans = {i: self._timeline.begin(f"sampler {i}", "sample") for i, _ in streams.values()}
        while streams:
            ready, _ = self._ready(list(streams), "completions from the samplers", self._timeout, time.monotonic())
            try:
                [block] = self._wait([next(ready[0])], "completions from the samplers", self._timeout, of_samplers=True)
            except StopIteration:
                spans[streams.pop(ready[0])[0]]()
                continue
            except ActorDied as error:
                lost, share = streams.pop(ready[0])
                self._replace([lost], error)
                owed = [r for r in share if any((r.index, i) not in done for i in range(len(r.seeds)))]
                streams[self._ask(lost, owed, settings)] = (lost, owed)
                continue
            fresh = [key not in done for key in zip(block.index.tolist(), block.sample_index.tolist(), strict=True)]
            done.update(zip(block.index.tolist(), block.sample_index.tolist(), strict=True))
            self._outstanding[streams[ready[0]][0]] -= sum(fresh)
            yield only(block, fresh)

    def outstanding(self) -> dict[str, int]:
        """Return how many completions of the last `sample` each sampler still has to deliver."""
        return {f"sampler-{i}": count for i, count in self._outstanding.items()}

    def _ask(self, sampler: int, share: Sequence[SampleRequest], settings: SamplingSettings) -> Any:
        return self.samplers[sampler].sample.options(num_returns="streaming").remote(share, settings)

    def _replace(self, lost: Sequence[int], error: ActorDied) -> None:
        """Replace lost samplers, and sync the weights to the new ones with a full check.

        Raises `error` when `cluster.max_replacements` would be exceeded, or when a replacement is not possible.
        """
        self._replaced += len(lost)
        too_many = self._replaced > self._config.cluster.max_replacements
        if too_many or (self.learners and (self._transport == "nccl" or self._published is None)):
            raise error
        started = time.monotonic()
        for i in lost:
            ray.kill(self.samplers[i])
            for known in (self._names, self._processes, self._known):
                known.pop(self.samplers[i], None)
            self.samplers[i] = self._make_sampler(i)
        starting = [self.samplers[i].start.remote(self._transport, self._devices_of(i)) for i in lost]
        self._wait(starting, "a sampler to be replaced", self._config.cluster.start_timeout_s)
        if self._published is not None:
            self._connect()
            self._publish(*self._published, full_check=True)
        names = ", ".join(f"sampler-{i}" for i in lost)
        self._say(f"{str(error).splitlines()[0]}; replaced {names} in {time.monotonic() - started:.0f} s")

    def step(self, steps: Sequence[RankStep]) -> StepResult:
        """Run one driver step on every learner rank."""
        residual = self._put_to_sleep(keep_weights=False)
        pending = [learner.step.remote(step) for learner, step in zip(self.learners, steps, strict=True)]
        result: StepResult = self._wait(pending, "the learner's step", self._timeout)[0]
        return replace(result, extremes={**result.extremes, **residual})

    def _put_to_sleep(self, *, keep_weights: bool) -> dict[str, float]:
        """Put the samplers to sleep, if samplers and learner take turns in memory. Return the memory that the samplers
        still use, as a metric."""
        if not self._config.takes_turns:
            return {}
        pending = [sampler.sleep.remote(keep_weights) for sampler in self.samplers]
        taken = self._wait(pending, "the samplers to leave the memory to the learner", self._timeout)
        return {"memory/residual_gib": max(taken)}

    @contextlib.contextmanager
    def _learner_between_steps(self) -> Iterator[None]:
        """Give the learner the memory for the block, then return it to the samplers."""
        self._put_to_sleep(keep_weights=True)
        yield
        if self._config.takes_turns:
            leaving = [rank.offload.remote() for rank in self.learners]
            self._wait(leaving, "the learner to leave the memory to the samplers", self._timeout)
            waking = [sampler.wake.remote("weights", "kv_cache") for sampler in self.samplers]
            self._wait(waking, "the samplers to wake", self._timeout)

    def publish(self, policy_version: int, probe: Probe, *, full_check: bool) -> Callable[[], SyncResult]:
        """Start the weight sync from the learner to every sampler. The returned function waits until it is verified."""
        pending = self._publishing(policy_version, probe, full_check)

        def finish() -> SyncResult:
            self._published = (policy_version, probe)
            try:
                result: SyncResult = self._wait(pending, "the weight sync", self._timeout)[0]
            except ActorDied as error:
                if not error.name.startswith("sampler"):
                    raise
                self._settle(pending)
                # the others are in a sync that will not end, so they are replaced, too
                self._replace(range(len(self.samplers)), error)
                # the metrics are the same as without a replacement
                result = self._publish(policy_version, probe, full_check=full_check)
            return result

        return finish

    def _publishing(self, policy_version: int, probe: Probe, full_check: bool) -> list[Any]:
        return [learner.publish.remote(policy_version, probe, full_check, self._timeout) for learner in self.learners]

    def _publish(self, policy_version: int, probe: Probe, *, full_check: bool) -> SyncResult:
        pending = self._publishing(policy_version, probe, full_check)
        result: SyncResult = self._wait(pending, "the weight sync", self._timeout)[0]
        return result

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        with self._learner_between_steps():
            pending = [learner.save.remote(str(folder)) for learner in self.learners]
            self._wait(pending, "the model to be saved", self._timeout)

    def capture(self, folder: Path) -> dict[str, Any]:
        """Have every rank copy its state and start to write it to `folder`. Return the parts that are not tensors."""
        with self._learner_between_steps():
            pending = [learner.capture.remote(str(folder)) for learner in self.learners]
            counters: dict[str, Any] = self._wait(pending, "the checkpoint's copy", self._timeout)[0]
        return counters | {"ranks": self._config.cluster.learner_ranks, "zero_stage": self._config.learner.zero_stage}

    def state_bytes(self) -> int:
        """Return the approximate size of a learner checkpoint, in bytes."""
        return int(self._wait([self.learners[0].state_bytes.remote()], "the size of a checkpoint", self._timeout)[0])

    def captured(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """Return the written files by name, or None while a rank is still writing."""
        pending = [learner.captured.remote(wait) for learner in self.learners]
        records = self._wait(pending, "the checkpoint to be written", self._timeout)
        if None in records:
            return None
        return {f"rank-{rank}.safetensors": record for rank, record in enumerate(records)}

    def restore(self, folder: Path, learner: Mapping[str, Any]) -> None:
        """Restore the learner from a checkpoint whose files have been verified."""
        files = [folder / "learner" / f"rank-{rank}.safetensors" for rank in range(learner["ranks"])]
        pending = [rank.restore.remote(files, learner) for rank in self.learners]
        self._wait(pending, "the learner to take over the checkpoint", self._config.cluster.start_timeout_s)

    def close(self) -> None:
        """Kill every actor and release its placement."""
        for handle in self._names:
            ray.kill(handle)
        self._reserved.release()

    def _wait(self, references: Sequence[Any], what: str, timeout_s: float, *, of_samplers: bool = False) -> list[Any]:
        """Return the results of `references`, or raise the first failure among them.

        Args:
            of_samplers: The references are calls to samplers while the learner is idle.
        """
        pending = list(references)
        asked = time.monotonic()
        while pending:
            ready, pending = self._ready(pending, what, timeout_s, asked)
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, (UserError, WeightSyncError)) or is_disk_full(cause):
                    raise cause from None
                if isinstance(cause, ray.exceptions.RayActorError):  # the learner was waiting for a sampler that died
                    raise self._died(what, cause) from error
                said = " ".join(str(cause).split())[:500]
                failure = f"while waiting for {what}: {type(cause).__name__}: {said}"
                raise EngineFailure(failure, learner_answers=of_samplers) from error
            except ray.exceptions.RayActorError as error:
                raise self._died(what, error) from error
        results: list[Any] = ray.get(list(references))
        return results

    def _ready(self, references: list[Any], what: str, timeout_s: float, asked: float) -> tuple[list[Any], list[Any]]:
        """Wait for the first of `references`, as `ray.wait` does, but fail when a node is lost.

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

    def _places(self) -> dict[Any, tuple[str, int]]:
        """Return the node and pid of every actor that has reported them so far."""
        asked = [reference for handle, reference in self._processes.items() if handle not in self._known]
        said = ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []
        for handle, reference in self._processes.items():
            if reference in said:
                with contextlib.suppress(ray.exceptions.RayError):  # the actor has died
                    self._known[handle] = ray.get(reference)
        return self._known

    def _settle(self, references: Sequence[Any]) -> None:
        """Wait until calls have ended, successfully or not."""
        ray.wait(list(references), num_returns=len(references), timeout=self._timeout)

    def _died(self, what: str, error: Any) -> EngineFailure:
        """Return the error for a dead actor, with its last lines, or for its lost node, which is then the cause."""
        if lost := self._lost():
            return EngineFailure(f"{lost} while waiting for {what}")
        dead = getattr(error, "actor_id", None)
        name = next((n for handle, n in self._names.items() if handle._actor_id.hex() == str(dead)), "an actor")
        why = " ".join(str(error).split())[:300]
        if struck := _oom_kills() - self._oom_kills:
            why = f"the kernel has killed {struck} processes for want of memory since the engines were started; {why}"
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
        strike: Any = ray.remote(num_cpus=0)(_signal)
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
