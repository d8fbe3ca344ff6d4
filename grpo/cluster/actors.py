"""Ray actors around the engines.

The engines are imported inside the actors' methods, so that the driver process loads neither vllm nor deepspeed.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from ray.actor import ActorHandle

from grpo.cluster.remote_samplers import RemoteSamplers, in_background
from grpo.config import Config
from grpo.files import FileRecord
from grpo.sync.probe import Probe
from grpo.sync.transaction import SyncEnd, SyncResult, publish
from grpo.sync.transport import (
    BroadcastSender,
    IpcSender,
    Place,
    Rendezvous,
    Sender,
    SharedMemorySender,
    join_store,
    network_environment,
    open_store,
    senders,
)
from grpo.sync.weights import Bucket, SyncReport
from grpo.types import Json, RankStep, SampledBlock, SampleRequest, SamplingSettings, StepResult

FLUSH_S = 0.25
"""Seconds between deliveries of finished completions by a sampler. Scoring starts while others are still generated."""


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


@contextmanager
def without_collections() -> Iterator[None]:
    """Run the block without garbage collections. During the import of an engine they free nothing and take a fifth of
    the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
        with without_collections():
            from grpo.sampler.vllm.engine import Sampler  # noqa: PLC0415 - keeps vllm out of the driver

        self._sampler = Sampler(self._config, transport, self._index)
        freeze_garbage()

    def place(self) -> Place:
        return _place(self._sampler.gpus())

    def sample(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> Iterator[SampledBlock]:
        yield from self._sampler.sample(requests, settings, FLUSH_S)

    def init_transfer(self, init_info: Mapping[str, Json]) -> None:
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
    """One rank of a `grpo.learner.zero.engine.Learner` behind Ray. Rank 0 also commands the samplers in a sync."""

    def __init__(self, config: Config, rank: int, log: str) -> None:
        _log_to(log)
        self._config, self._rank = config, rank
        self._run = Path(log).parents[1]
        self._store: Rendezvous | None = None
        self._sender: Sender | None = None
        self._sending: list[int] = [0]
        """Ranks that send weights."""
        self._samplers: Sequence[ActorHandle] = ()

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
        with without_collections():
            from grpo.learner.zero import setup  # noqa: PLC0415 - keeps deepspeed out of the driver
            from grpo.learner.zero.engine import Learner  # noqa: PLC0415

        if self._store is None:
            timeout = self._config.cluster.start_timeout_s
            self._store = join_store(host, port, self._config.cluster.learner_ranks, timeout)
        device = setup.init_process_group(self._config, self._rank, self._store)
        self._learner = Learner(self._config, self._rank, device, self._run)
        freeze_garbage()

    def place(self) -> Place:
        return _place(self._learner.gpus())

    def connect(
        self,
        ranks: Sequence[Place],
        samplers: Sequence[ActorHandle],
        at: Sequence[Place],
        transport: str,
        timeout_s: float,
    ) -> None:
        """Open this rank's end of the weight transfer. Rank 0 also has the samplers open theirs.

        Args:
            ranks: Places of the learner ranks.
            at: Places of the `samplers`.

        Raises UserError when the transport cannot connect the `ranks` with the place of a sampler.
        """
        self._sending = senders(transport, ranks, at)
        if self._rank not in self._sending:
            return
        self._sender = self._make_sender(transport, len(samplers), timeout_s)
        if self._rank == 0:
            self._samplers = samplers
            remote = RemoteSamplers(samplers, self._sender, timeout_s)
            pending = remote.init_transfer([self._sender.init_info(i, place) for i, place in enumerate(at)])
            connected = in_background(self._sender.connect)  # a rendezvous also waits for a sampler that has failed
            remote.all_of(pending)
            if remote.lost is not None:
                raise remote.lost
            connected.result()

    def _make_sender(self, transport: str, samplers: int, timeout_s: float) -> Sender:
        if transport == "ipc":
            return IpcSender(self._learner.gpus()[0], self._learner.device)
        if transport == "shared_memory":
            return SharedMemorySender(ray.get_runtime_context().get_node_id())
        host, workers = ray.util.get_node_ip_address(), self._config.sampler_workers
        return BroadcastSender(host, workers, samplers, timeout_s, self._learner.device)

    def step(self, step: RankStep) -> StepResult:
        self._learner.models.reload()
        return self._learner.step(step)

    def offload(self) -> None:
        self._learner.models.offload()

    def publish(self, policy_version: int, probe: Probe, full_check: bool, timeout_s: float) -> SyncResult:
        """Run one verified sync, see `grpo.sync.transaction.publish`. A collective of all ranks."""
        end = SyncEnd(
            learner=self._learner.synced,
            samplers=RemoteSamplers(self._samplers, self._sender, timeout_s),
            sender=self._sender,
            sending=self._sending,
            rank=self._rank,
            ranks=self._config.cluster.learner_ranks,
            takes_turns=self._config.takes_turns,
        )
        return publish(end, policy_version, probe, dtype=self._config.model.dtype, full_check=full_check)

    def save(self, folder: str) -> None:
        self._learner.models.reload()
        self._learner.save(Path(folder))

    def capture(self, folder: str) -> dict[str, Json]:
        self._learner.models.reload()
        return self._learner.capture(Path(folder) / f"rank-{self._rank}.safetensors")

    def state_bytes(self) -> int:
        return self._learner.state_bytes()

    def captured(self, wait: bool) -> FileRecord | None:
        return self._learner.captured(wait=wait)

    def restore(self, files: Sequence[Path], counters: Mapping[str, Json]) -> None:
        self._learner.restore(files, counters)
