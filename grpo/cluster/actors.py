"""Ray actors around the engines, and the weight-sync transaction between them.

The engines are imported inside the actors' methods, so that the driver process loads neither vllm nor deepspeed.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from grpo.config import Config
from grpo.files import FileRecord
from grpo.sync.probe import PERTURBED_GROUPS, Probe, Reading, Spread
from grpo.sync.transport import (
    BroadcastSender,
    IpcSender,
    Place,
    Sender,
    SharedMemorySender,
    join_store,
    joined,
    network_environment,
    open_store,
    senders,
)
from grpo.sync.weights import Bucket, SyncReport, buckets_of, prove, refuse_not_finite, verify
from grpo.types import RankStep, SampledBlock, SampleRequest, SamplingSettings, StepResult

ENDING_S = 10.0
"""Seconds that calls to samplers may take to end after one of them has failed."""

FLUSH_S = 0.25
"""Seconds between deliveries of finished completions by a sampler. Scoring starts while others are still generated."""


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


STACK_SIGNAL = signal.SIGUSR2
"""Makes an actor write the stacks of all its threads to its log, even when it is stuck in C."""


def _log_to(path: str) -> None:
    """Redirect all output of this process and its libraries to `path`, and write its stacks there on STACK_SIGNAL."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable(file=2)  # also write the stacks on a crash in C
    faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)


def _process() -> tuple[str, int]:
    """Return the Ray node and the pid of this process."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _place(gpus: Sequence[str]) -> Place:
    """Return the place of this process. `gpus`: UUIDs of the GPUs that it uses."""
    return Place(node=ray.get_runtime_context().get_node_id(), host=ray.util.get_node_ip_address(), gpus=tuple(gpus))


def _resources() -> Mapping[str, float]:
    """Return the Ray resources of this node: "CPU", "GPU" and others."""
    here = ray.get_runtime_context().get_node_id()
    [found] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
    resources: Mapping[str, float] = found
    return resources


def cpus_per_gpu(resources: Mapping[str, float]) -> int:
    """Return the number of CPUs per GPU of a node, at least 1."""
    return max(1, int(resources.get("CPU", 1) // max(1, resources.get("GPU", 1))))


def set_threads(count: int) -> None:
    """Compute with `count` threads from now on, in torch and in libraries loaded later with a separate OpenMP."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def freeze_garbage() -> None:
    """Exclude loaded objects from later garbage collections: traversing them costs tenths of a second each time."""
    gc.collect()
    gc.freeze()


class SamplerActor:
    """A `grpo.sampler.vllm.engine.Sampler` behind Ray."""

    def __init__(self, config: Config, index: int, log: str) -> None:
        _log_to(log)
        self._config, self._index = config, index

    def process(self) -> tuple[str, int]:
        return _process()

    def start(self, transport: str, devices: Sequence[str]) -> None:
        """Load the engine. `devices`: GPUs that it shares with learner ranks; empty if none."""
        os.environ.update(network_environment(ray.util.get_node_ip_address()))
        if devices:  # Ray has assigned them to the ranks
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        from grpo.sampler.vllm.engine import Sampler  # noqa: PLC0415 - keeps vllm out of the driver

        self._sampler = Sampler(self._config, transport, self._index)
        freeze_garbage()

    def place(self) -> Place:
        return _place(self._sampler.gpus())

    def sample(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> Iterator[SampledBlock]:
        yield from self._sampler.sample(requests, settings, FLUSH_S)

    def init_transfer(self, init_info: Mapping[str, Any]) -> None:
        self._sampler.init_transfer(init_info)

    def begin_sync(self, policy_version: int) -> None:
        self._sampler.begin_sync(policy_version)

    def load_bucket(self, bucket: Bucket) -> None:
        self._sampler.load_bucket(bucket)

    def finish_sync(self, probe: Probe) -> SyncReport:
        return self._sampler.finish_sync(probe)

    def sleep(self, keep_weights: bool) -> float:
        return self._sampler.sleep(keep_weights=keep_weights)

    def wake(self, *tags: str) -> None:
        self._sampler.wake(*tags)

    def perturb_for_test(self, substring: str, factor: float) -> None:
        self._sampler.perturb_for_test(substring, factor)


class LearnerActor:
    """One rank of a `grpo.learner.zero.engine.Learner` behind Ray. Rank 0 also coordinates weight syncs."""

    def __init__(self, config: Config, rank: int, log: str) -> None:
        _log_to(log)
        self._config, self._rank = config, rank
        self._dumps = Path(log).parents[1] / "nonfinite"
        self._store: Any = None
        self._sender: Sender | None = None
        self._sending: list[int] = [0]
        """Ranks that send weights."""
        self._samplers: Sequence[Any] = ()
        self._lost: Exception | None = None
        """Error of a sampler that died during the current sync."""

    def process(self) -> tuple[str, int]:
        return _process()

    def devices(self) -> list[str]:
        """Return the GPUs that Ray has assigned to this rank, as CUDA_VISIBLE_DEVICES names them."""
        found: list[str] = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return found

    def open_store(self) -> tuple[str, int]:
        """Open the rendezvous on rank 0. Return its host and port."""
        host = ray.util.get_node_ip_address()
        self._store = open_store(host, self._config.cluster.learner_ranks, self._config.cluster.start_timeout_s)
        return host, self._store.port

    def start(self, host: str, port: int) -> None:
        """Join the process group and build the engine. A collective of all ranks."""
        os.environ.update(network_environment(ray.util.get_node_ip_address()))
        if self._config.on_gpu:  # Ray allows only one thread
            set_threads(self._config.learner.threads or cpus_per_gpu(_resources()))
        from grpo.learner.zero import setup  # noqa: PLC0415 - keeps deepspeed out of the driver
        from grpo.learner.zero.engine import Learner  # noqa: PLC0415

        if self._store is None:
            timeout = self._config.cluster.start_timeout_s
            self._store = join_store(host, port, self._config.cluster.learner_ranks, timeout)
        device = setup.init_process_group(self._config, self._rank, self._store)
        self._learner = Learner(self._config, self._rank, device, self._dumps)
        freeze_garbage()

    def place(self) -> Place:
        return _place(self._learner.gpus())

    def connect(
        self, ranks: Sequence[Place], samplers: Sequence[Any], at: Sequence[Place], transport: str, timeout_s: float
    ) -> None:
        """Open this rank's end of the weight transfer. Rank 0 also has the samplers open theirs.

        Args:
            ranks: Places of the learner ranks.
            at: Places of the `samplers`.

        Raises UserError when the transport cannot connect the `ranks` with the place of a sampler.
        """
        self._lost = None  # lost samplers have been replaced
        self._sending = senders(transport, ranks, at)
        if self._rank not in self._sending:
            return
        self._sender = self._make_sender(transport, len(samplers), timeout_s)
        if self._rank == 0:
            self._samplers = samplers
            infos = [self._sender.init_info(i, place) for i, place in enumerate(at)]
            pending = [s.init_transfer.remote(info) for s, info in zip(samplers, infos, strict=True)]
            connected = in_background(self._sender.connect)  # a rendezvous also waits for a sampler that has failed
            self._all_of(pending, timeout_s)
            if self._lost is not None:
                raise self._lost
            connected.result()

    def _make_sender(self, transport: str, samplers: int, timeout_s: float) -> Sender:
        if transport == "ipc":
            return IpcSender(self._learner.gpus()[0], self._learner.device)
        if transport == "shared_memory":
            return SharedMemorySender(ray.get_runtime_context().get_node_id())
        host, workers = ray.util.get_node_ip_address(), self._config.sampler_workers
        return BroadcastSender(host, workers, samplers, timeout_s, self._learner.device)

    def step(self, step: RankStep) -> StepResult:
        self._learner.reload()
        return self._learner.step(step)

    def offload(self) -> None:
        self._learner.offload()

    def publish(self, policy_version: int, probe: Probe, full_check: bool, timeout_s: float) -> SyncResult:
        """Run one verified sync. A collective of all ranks.

        `full_check` first proves that the sent weights are the ones in use: perturbed weights must move every sampler's
        logprobs to where they move the learner's.

        Raises WeightSyncError.
        """
        self._lost = None
        reading = self._reading(probe, timeout_s)
        errors: tuple[float, ...] = ()
        full_check_s = 0.0
        if full_check:

            def transfer(perturbed: Reading) -> Spread:
                result = self._transfer(policy_version, probe, perturbed, timeout_s)
                self._take_memory(timeout_s)
                return result.probe

            started = time.monotonic()
            groups = PERTURBED_GROUPS[self._config.model.dtype]
            errors = prove(learner=self._learner, before=reading, probe=probe, groups=groups, transfer=transfer)
            full_check_s = time.monotonic() - started
        # the reading is from before the perturbations: weights that were not restored are refused
        result = self._transfer(policy_version, probe, reading, timeout_s)
        if self._lost is not None:
            raise self._lost
        return replace(result, movement_errors=errors, full_check_s=full_check_s)

    def _reading(self, probe: Probe, timeout_s: float) -> Reading:
        """Take the memory, then return the learner's probe and its rounding noise.

        The samplers are still idle: two engines that compute at once on the same cores cost each other 0.1 s.
        """
        self._take_memory(timeout_s)
        return self._learner.read_probe(probe)

    def _take_memory(self, timeout_s: float) -> None:
        """Put the samplers to sleep and load the learner into the memory, if they take turns in it."""
        self._take_turns("sleep", False, timeout_s=timeout_s)
        self._learner.reload()

    def _transfer(self, policy_version: int, probe: Probe, reading: Reading, timeout_s: float) -> SyncResult:
        """Sync the weights that gave the `reading`.

        If a sampler dies during the sync, its error is kept in `_lost`, and the sync is completed without any sampler:
        with ZeRO 3, the other ranks are in the same collectives.
        """
        started, nbytes, sent = time.monotonic(), 0, dict[str, int]()
        self._take_memory(timeout_s)
        if self._config.takes_turns:
            self._learner.drop_cache()
        self._take_turns("wake", "weights", timeout_s=timeout_s)
        pending = [s.begin_sync.remote(policy_version) for s in self._samplers]
        for tensors in buckets_of(self._learner.weights()):
            refuse_not_finite(tensors)
            bucket = self._packed(tensors)
            if bucket is not None and self._lost is None:
                pending += [s.load_bucket.remote(bucket) for s in self._samplers]
                self._transmit(tensors, pending, timeout_s)
                pending = []
                sent |= {spec.name: value for spec, value in zip(bucket.tensors, bucket.checksums, strict=True)}
                nbytes += sum(spec.nbytes for spec in bucket.tensors)
            if len(self._sending) > 1:
                self._learner.barrier()  # the buckets of the other ranks have been read
        tensors = []  # these were views of weights that are about to leave the GPU
        if self._config.takes_turns:
            self._learner.offload()
        self._take_turns("wake", "kv_cache", timeout_s=timeout_s)
        reports: list[SyncReport] = []
        if self._lost is None:
            reports = self._all_of([s.finish_sync.remote(probe) for s in self._samplers], timeout_s)
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

    def _take_turns(self, verb: str, argument: Any, *, timeout_s: float) -> None:
        """Have every sampler sleep or wake, if samplers and learner take turns in memory.

        All ranks wait for each other before it, and wait until the samplers are done after it.
        """
        if not self._config.takes_turns:
            return
        if self._config.cluster.learner_ranks > 1:
            self._learner.barrier()
        if self._lost is None:
            self._all_of([getattr(s, verb).remote(argument) for s in self._samplers], timeout_s)
        if self._config.cluster.learner_ranks > 1:
            self._learner.barrier()

    def _packed(self, tensors: Sequence[tuple[str, Any]]) -> Bucket | None:
        """Return, on rank 0, the joined bucket of all sending ranks; None on other ranks."""
        ours = self._sender.pack(tensors) if self._sender is not None else None
        if len(self._sending) > 1:
            every = self._learner.gathered(ours)
            ours = joined([bucket for bucket in every if bucket is not None])
        return ours if self._rank == 0 else None

    def _transmit(self, tensors: Sequence[tuple[str, Any]], pending: Sequence[Any], timeout_s: float) -> None:
        """Send a bucket and wait until every sampler has loaded it."""
        assert self._sender is not None
        try:
            self._sender.transmit(tensors)
            self._all_of(pending, timeout_s)
            if self._lost is None:
                self._sender.transmitted()
        except RuntimeError:  # the other end of a collective may have died: check with Ray
            self._lost = self._lost or first_death(pending)
            if self._lost is None:
                raise

    def _all_of(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Return the results of calls to samplers, or an empty list if one of them has died.

        The first failure ends the wait. The others may be waiting in a collective for the one that failed. They get an
        error at once only if this end aborts the collective.
        """
        waiting, deadline = list(references), time.monotonic() + timeout_s
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"the samplers have not answered in {timeout_s:.0f} s")
                ray.get(ready)
        except ray.exceptions.RayActorError as error:
            self._lost = error
            if self._sender is not None:
                self._sender.abort()
        except ray.exceptions.RayTaskError:  # losing a peer in a collective fails a call, too; the death is the cause
            if self._sender is not None:
                self._sender.abort()
            self._lost = first_death(references)
            if self._lost is None:
                raise
        if self._lost is not None:
            return []
        found: list[Any] = ray.get(list(references))
        return found

    def save(self, folder: str) -> None:
        self._learner.reload()
        self._learner.save(Path(folder))

    def capture(self, folder: str) -> dict[str, Any]:
        self._learner.reload()
        return self._learner.capture(Path(folder) / f"rank-{self._rank}.safetensors")

    def state_bytes(self) -> int:
        return self._learner.state_bytes()

    def captured(self, wait: bool) -> FileRecord | None:
        return self._learner.captured(wait=wait)

    def restore(self, files: Sequence[Path], counters: Mapping[str, Any]) -> None:
        self._learner.restore(files, counters)


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


def first_death(references: Sequence[Any]) -> Exception | None:
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
