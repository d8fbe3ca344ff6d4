"""Ray shells around the engines, and the weight-sync transaction between them.

The engines are imported inside the actors' methods, so that the driver's process loads neither vllm nor deepspeed.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from grpo.checkpoint import FileRecord
from grpo.config import Config
from grpo.types import RankStep, SampledBlock, SampleRequest, SamplingSettings, StepResult, UserError
from grpo.weight_sync import (
    PROBE_TOLERANCE,
    Bucket,
    IpcSender,
    Probe,
    Sender,
    SharedMemorySender,
    SyncReport,
    WeightSyncError,
    buckets_of,
    probe_difference,
    refuse_not_finite,
    verify,
)

FLUSH_S = 0.25
"""A sampler hands finished completions over this often, so that scoring starts while others still generate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """A verified weight sync."""

    policy_version: int
    seconds: float
    nbytes: int
    probe_difference: float
    """Largest |learner - sampler| logprob on the probe, over all samplers."""


STACK_SIGNAL = signal.SIGUSR2
"""Makes an actor write what each of its threads is doing to its log, also where it is stuck in C."""


def _log_to(path: str) -> None:
    """Send everything that this process and its libraries print to `path`, and its stacks when it is asked for them."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable(file=2)  # a crash in C has last words, too
    faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)


def _process() -> tuple[str, int]:
    """The Ray node and the pid of this process."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


def place() -> tuple[str, str]:
    """The Ray node of this process, and the UUID of its GPU ("" without one)."""
    import torch  # noqa: PLC0415 - the driver's import of this file stays light

    node: str = ray.get_runtime_context().get_node_id()
    return node, str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else ""


def freeze_garbage() -> None:
    """Keep what was loaded out of later garbage collections: walking it costs tenths of a second each time."""
    gc.collect()
    gc.freeze()


class SamplerActor:
    """A `grpo.sampler.engine.Sampler` behind Ray."""

    def __init__(self, config: Config, index: int, log: str) -> None:
        _log_to(log)
        self._config, self._index = config, index

    def process(self) -> tuple[str, int]:
        return _process()

    def start(self, transport: str) -> None:
        """Load the engine."""
        from grpo.sampler.engine import Sampler  # noqa: PLC0415 - keeps vllm out of the driver

        self._sampler = Sampler(self._config, transport, self._index)
        freeze_garbage()

    def place(self) -> tuple[str, str]:
        """The Ray node of this process, and the UUID of its GPU ("" without one)."""
        return place()

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

    def perturb_for_test(self, substring: str, factor: float) -> None:
        self._sampler.perturb_for_test(substring, factor)


class LearnerActor:
    """One rank of a `grpo.learner.engine.Learner` behind Ray; rank 0 also commands weight syncs."""

    def __init__(self, config: Config, rank: int, log: str) -> None:
        _log_to(log)
        self._config, self._rank = config, rank
        self._dumps = Path(log).parents[1] / "nonfinite"
        self._store: Any = None
        self._sender: Sender | None = None
        self._samplers: Sequence[Any] = ()
        self._lost: Exception | None = None
        """A sampler died in the sync under way."""

    def process(self) -> tuple[str, int]:
        return _process()

    def open_store(self) -> tuple[str, int]:
        """Rank 0: open the rendezvous; returns its host and port."""
        from grpo.learner import setup  # noqa: PLC0415 - keeps deepspeed out of the driver

        host = ray.util.get_node_ip_address()
        self._store = setup.open_store(host, self._config.learner.ranks, self._config.cluster.start_timeout_s)
        return host, self._store.port

    def start(self, host: str, port: int) -> None:
        """Join the group and build the engine; a collective."""
        from grpo.learner import setup  # noqa: PLC0415
        from grpo.learner.engine import Learner  # noqa: PLC0415

        if self._store is None:
            timeout = self._config.cluster.start_timeout_s
            self._store = setup.join_store(host, port, self._config.learner.ranks, timeout)
        device = setup.init_process_group(self._config, self._rank, self._store)
        self._learner = Learner(self._config, self._rank, device, self._dumps)
        freeze_garbage()

    def connect(self, samplers: Sequence[Any], transport: str, timeout_s: float) -> None:
        """Rank 0: open the weight transfer to `samplers`, on both ends.

        Raises UserError when the transport cannot reach from here to where a sampler was placed.
        """
        self._samplers = samplers
        if transport != "nccl":
            refuse_distance(transport, place(), ray.get([s.place.remote() for s in samplers], timeout=timeout_s))
        if transport == "nccl":
            from grpo.sampler.nccl_sender import NcclSender  # noqa: PLC0415 - it needs vllm

            self._sender = NcclSender(ray.util.get_node_ip_address(), len(samplers))
        else:
            self._sender = IpcSender() if transport == "ipc" else SharedMemorySender()
        pending = [s.init_transfer.remote(self._sender.init_info(i)) for i, s in enumerate(samplers)]
        self._sender.connect()
        ray.get(pending, timeout=timeout_s)

    def step(self, step: RankStep) -> StepResult:
        return self._learner.step(step)

    def publish(self, policy_version: int, probe: Probe, full_check: bool, timeout_s: float) -> SyncResult:
        """One verified sync (all ranks together). `full_check` first proves that what is sent is what is used:
        perturbed weights must move every sampler's logprobs to where they move the learner's.

        Raises WeightSyncError.
        """
        tolerance = PROBE_TOLERANCE[self._config.model.dtype]
        self._lost = None
        if full_check:
            before = self._learner.probe_logprobs(probe)
            with self._learner.perturbed():
                moved = probe_difference(before, self._learner.probe_logprobs(probe))
                if moved < 3 * tolerance:
                    raise WeightSyncError(f"the full check moved the probe by {moved:.3g} only: it would prove nothing")
                self._transfer(policy_version, probe, tolerance, timeout_s)
        result = self._transfer(policy_version, probe, tolerance, timeout_s)
        if self._lost is not None:
            raise self._lost
        return result

    def _transfer(self, policy_version: int, probe: Probe, tolerance: float, timeout_s: float) -> SyncResult:
        """One sync. A sampler that dies in it is remembered, and the rest goes on without any: at ZeRO 3 the other
        ranks are in the same collectives."""
        started, nbytes, sent = time.monotonic(), 0, dict[str, int]()
        # before the samplers have anything to do: two engines computing at once on the same cores cost each other 0.1 s
        logprobs = self._learner.probe_logprobs(probe)
        pending = [s.begin_sync.remote(policy_version) for s in self._samplers]
        for tensors in buckets_of(self._learner.weights()):
            refuse_not_finite(tensors)
            if self._sender is not None and self._lost is None:
                bucket = self._sender.pack(tensors)
                pending += [s.load_bucket.remote(bucket) for s in self._samplers]
                self._sender.transmit(tensors)
                self._all_of(pending, timeout_s)
                pending = []
                sent |= {spec.name: value for spec, value in zip(bucket.tensors, bucket.checksums, strict=True)}
                nbytes += sum(spec.nbytes for spec in bucket.tensors)
        reports: list[SyncReport] = []
        if self._lost is None:
            reports = self._all_of([s.finish_sync.remote(probe) for s in self._samplers], timeout_s)
        worst = [
            verify(
                report=report,
                policy_version=policy_version,
                sent=sent,
                learner_logprobs=logprobs,
                tolerance=tolerance,
                sampler=f"sampler {i}",
            )
            for i, report in enumerate(reports)
        ]
        return SyncResult(
            policy_version=policy_version,
            seconds=time.monotonic() - started,
            nbytes=nbytes,
            probe_difference=max(worst, default=0.0),
        )

    def _all_of(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Results from the samplers; none where one of them has died."""
        try:
            found: list[Any] = ray.get(list(references), timeout=timeout_s)
        except ray.exceptions.RayActorError as error:
            self._lost = error
            return []
        return found

    def save(self, folder: str) -> None:
        self._learner.save(Path(folder))

    def capture(self, folder: str) -> dict[str, Any]:
        return self._learner.capture(Path(folder) / f"rank-{self._rank}.safetensors")

    def state_bytes(self) -> int:
        return self._learner.state_bytes()

    def captured(self, wait: bool) -> FileRecord | None:
        return self._learner.captured(wait=wait)

    def restore(self, files: Sequence[Path], counters: Mapping[str, Any]) -> None:
        self._learner.restore(files, counters)


def refuse_distance(transport: str, learner: tuple[str, str], samplers: Sequence[tuple[str, str]]) -> None:
    """Shared memory ends at the node, CUDA IPC at the GPU. Raises UserError naming the sampler beyond it."""
    for i, (node, gpu) in enumerate(samplers):
        if node != learner[0]:
            raise UserError(
                f"Ray placed sampler {i} on another node than learner rank 0, and {transport.replace('_', ' ')} does "
                "not reach there; use a cluster with one node that holds them all, or whole GPUs (sampler.gpus=1 "
                "learner.gpus=1), whose weights travel by NCCL"
            )
        if transport == "ipc" and gpu != learner[1]:
            raise UserError(
                f"Ray placed sampler {i} on GPU {gpu} and learner rank 0 on GPU {learner[1]}: sharing one GPU is what "
                "sampler.gpus + learner.gpus <= 1 means; use cluster.gpus=1, or sampler.gpus=1 learner.gpus=1"
            )
