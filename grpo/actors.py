"""Ray shells around the engines, their placement, and the weight-sync transaction between them.

The engines are imported inside the actors' constructors, so that the driver's process loads neither vllm nor
deepspeed. Every wait has a deadline; when an actor fails first, its last log lines come with the error.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from grpo.checkpoint import FileRecord
from grpo.config import Config
from grpo.types import RankStep, SampledBlock, SampleRequest, SamplingSettings, StepResult, UserError
from grpo.update import NonFiniteError
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
    verify,
)

FLUSH_S = 0.25
"""A sampler hands finished completions over this often, so that scoring starts while others still generate."""


class EngineFailure(RuntimeError):
    """An actor failed or did not answer in time: says who, what was awaited, and what it last wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """A verified weight sync."""

    policy_version: int
    seconds: float
    nbytes: int
    probe_difference: float
    """Largest |learner - sampler| logprob on the probe, over all samplers."""


def _log_to(path: str) -> None:
    """Send everything that this process and its libraries print to `path`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


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
        self._store: Any = None
        self._sender: Sender | None = None
        self._samplers: Sequence[Any] = ()

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
        self._learner = Learner(self._config, self._rank, device)
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
        if full_check:
            before = self._learner.probe_logprobs(probe)
            with self._learner.perturbed():
                moved = probe_difference(before, self._learner.probe_logprobs(probe))
                if moved < 3 * tolerance:
                    raise WeightSyncError(f"the full check moved the probe by {moved:.3g} only: it would prove nothing")
                self._transfer(policy_version, probe, tolerance, timeout_s)
        return self._transfer(policy_version, probe, tolerance, timeout_s)

    def _transfer(self, policy_version: int, probe: Probe, tolerance: float, timeout_s: float) -> SyncResult:
        started, nbytes, sent = time.monotonic(), 0, dict[str, int]()
        # before the samplers have anything to do: two engines computing at once on the same cores cost each other 0.1 s
        logprobs = self._learner.probe_logprobs(probe)
        pending = [s.begin_sync.remote(policy_version) for s in self._samplers]
        for tensors in buckets_of(self._learner.weights()):
            if self._sender is not None:
                bucket = self._sender.pack(tensors)
                pending += [s.load_bucket.remote(bucket) for s in self._samplers]
                self._sender.transmit(tensors)
                ray.get(pending, timeout=timeout_s)
                pending = []
                sent |= {spec.name: value for spec, value in zip(bucket.tensors, bucket.checksums, strict=True)}
                nbytes += sum(spec.nbytes for spec in bucket.tensors)
        finishing = [s.finish_sync.remote(probe) for s in self._samplers]
        reports: list[SyncReport] = ray.get(finishing, timeout=timeout_s)
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

    def save(self, folder: str) -> None:
        self._learner.save(Path(folder))

    def capture(self, folder: str) -> dict[str, Any]:
        return self._learner.capture(Path(folder) / f"rank-{self._rank}.safetensors")

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


def transport_of(config: Config) -> str:
    """Shared memory on CPU; on GPU vLLM's IPC engine where sampler and learner share one, NCCL where they do not."""
    if not config.on_gpu:
        return "shared_memory"
    return "ipc" if config.learner.gpus < 1 or config.sampler.gpus < 1 else "nccl"


def sampler_environment(config: Config) -> dict[str, str]:
    """Environment of a sampler's process, in place before it imports vllm or torch."""
    environment = QUIET | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor's process, its model within reach
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if config.sampler.gpus == 0:
        threads = config.sampler.threads or os.cpu_count() or 1
        environment |= CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    return environment


def learner_environment(config: Config, rank: int) -> dict[str, str]:
    """Environment of a learner's process, in place before it imports torch or deepspeed."""
    environment = QUIET | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(config.learner.ranks)}
    if config.learner.gpus == 0:
        threads = config.learner.threads or max(1, (os.cpu_count() or 1) // config.learner.ranks)
        environment |= CPU_ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return environment


CPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    # threads that wait for each other sleep instead of spinning: whatever else runs on these cores would pay for it
    "OMP_WAIT_POLICY": "PASSIVE",
}

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # torch's, about calls that DeepSpeed makes at every step
}


def train_settings(config: Config, end_token_ids: Sequence[int]) -> SamplingSettings:
    """The sampling record as the sampler takes it; the learner replays its temperature."""
    return SamplingSettings(
        temperature=config.sampling.temperature,
        max_tokens=config.sampling.max_tokens,
        end_token_ids=tuple(end_token_ids),
        stop=config.sampling.stop,
    )


def eval_settings(config: Config, end_token_ids: Sequence[int]) -> SamplingSettings:
    """Evaluation's own settings."""
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
    """All actors of a run, with the verbs that the driver's loop calls."""

    def __init__(self, config: Config, log_dir: Path) -> None:
        """Place the actors and load the engines, samplers and learner at the same time.

        Raises EngineFailure when one does not come up, UserError when the model folder is at fault.
        """
        self._config, self._log_dir = config, log_dir
        self._timeout = config.cluster.step_timeout_s
        self._names: dict[Any, str] = {}
        transport = transport_of(config)
        sampler_class: Any = ray.remote(SamplerActor)
        learner_class: Any = ray.remote(LearnerActor)
        self.samplers = [
            self._make(sampler_class, f"sampler-{i}", config.sampler, sampler_environment(config), config, i)
            for i in range(config.sampler.num_samplers)
        ]
        self.learners = [
            self._make(learner_class, f"learner-{i}", config.learner, learner_environment(config, i), config, i)
            for i in range(config.learner.ranks)
        ]
        start = config.cluster.start_timeout_s
        loading = [s.start.remote(transport) for s in self.samplers]
        host, port = self._wait([self.learners[0].open_store.remote()], "the learner's rendezvous", start)[0]
        loading += [learner.start.remote(host, port) for learner in self.learners]
        self._wait(loading, "the engines to load", start)
        self._wait(
            [self.learners[0].connect.remote(self.samplers, transport, start)], "the weight transfer to open", start
        )

    def _make(self, actor: Any, name: str, section: Any, environment: dict[str, str], *arguments: Any) -> Any:
        options = {
            "num_cpus": section.cpus,
            "num_gpus": section.gpus,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment},
        }
        handle = actor.options(**options).remote(*arguments, str(self._log_dir / f"{name}.log"))
        self._names[handle] = name
        return handle

    def sample(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> Iterator[SampledBlock]:
        """Spread `requests` over the samplers in whole runs; yields finished completions as they come in."""
        count = len(self.samplers)
        shares = [requests[i * len(requests) // count : (i + 1) * len(requests) // count] for i in range(count)]
        streams = [
            sampler.sample.options(num_returns="streaming").remote(share, settings)
            for sampler, share in zip(self.samplers, shares, strict=True)
            if share
        ]
        while streams:
            ready, _ = ray.wait(streams, timeout=self._timeout)
            if not ready:
                raise self._overdue("completions from the samplers", self._timeout)
            try:
                reference = next(ready[0])
            except StopIteration:
                streams.remove(ready[0])
                continue
            yield self._wait([reference], "completions from the samplers", self._timeout)[0]

    def step(self, steps: Sequence[RankStep]) -> StepResult:
        """One driver step on every learner rank."""
        pending = [learner.step.remote(step) for learner, step in zip(self.learners, steps, strict=True)]
        result: StepResult = self._wait(pending, "the learner's step", self._timeout)[0]
        return result

    def publish(self, policy_version: int, probe: Probe, *, full_check: bool) -> Callable[[], SyncResult]:
        """Start to bring the learner's weights to every sampler; what comes back waits until they are verified."""
        pending = [
            learner.publish.remote(policy_version, probe, full_check, self._timeout) for learner in self.learners
        ]

        def finish() -> SyncResult:
            result: SyncResult = self._wait(pending, "the weight sync", self._timeout)[0]
            return result

        return finish

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self._wait(
            [learner.save.remote(str(folder)) for learner in self.learners], "the model to be saved", self._timeout
        )

    def capture(self, folder: Path) -> dict[str, Any]:
        """Every rank copies its state and begins to write it to `folder`. Returns what is not a tensor of it."""
        counters: dict[str, Any] = self._wait(
            [learner.capture.remote(str(folder)) for learner in self.learners], "the checkpoint's copy", self._timeout
        )[0]
        return counters | {"ranks": self._config.learner.ranks, "zero_stage": self._config.learner.zero_stage}

    def captured(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """The written files by name, or None while a rank still writes."""
        pending = [learner.captured.remote(wait) for learner in self.learners]
        records = self._wait(pending, "the checkpoint to be written", self._timeout)
        if None in records:
            return None
        return {f"rank-{rank}.safetensors": record for rank, record in enumerate(records)}

    def restore(self, folder: Path, learner: Mapping[str, Any]) -> None:
        """Give the learner the state of a checkpoint, whose files have been checked."""
        files = [folder / "learner" / f"rank-{rank}.safetensors" for rank in range(learner["ranks"])]
        pending = [rank.restore.remote(files, learner) for rank in self.learners]
        self._wait(pending, "the learner to take over the checkpoint", self._config.cluster.start_timeout_s)

    def close(self) -> None:
        """Kill every actor."""
        for handle in self._names:
            ray.kill(handle)

    def _wait(self, references: Sequence[Any], what: str, timeout_s: float) -> list[Any]:
        """Results of `references`, or the first failure among them."""
        pending = list(references)
        deadline = time.monotonic() + timeout_s
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._overdue(what, timeout_s)
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, (UserError, WeightSyncError, NonFiniteError)):
                    raise cause from None
                if isinstance(cause, ray.exceptions.RayActorError):  # the learner waited for a sampler, and it died
                    raise EngineFailure(f"while waiting for {what}: {self._dead(cause)}") from error
                said = " ".join(str(cause).split())[:500]
                raise EngineFailure(f"while waiting for {what}: {type(cause).__name__}: {said}") from error
            except ray.exceptions.RayActorError as error:
                raise EngineFailure(f"while waiting for {what}: {self._dead(error)}") from error
        results: list[Any] = ray.get(list(references))
        return results

    def _dead(self, error: Any) -> str:
        """Which actor died, and the last lines it wrote."""
        dead = getattr(error, "actor_id", None)
        for handle, name in self._names.items():
            if dead is not None and handle._actor_id.hex() == str(dead):
                return f"{name} died ({' '.join(str(error).split())[:300]}); its last lines:\n{self._tail(name)}"
        return f"{error}"

    def _overdue(self, what: str, timeout_s: float) -> EngineFailure:
        tails = "\n".join(f"--- {name}\n{self._tail(name, 5)}" for name in self._names.values())
        return EngineFailure(f"waited {timeout_s:.0f} s for {what}; the engines' last lines:\n{tails}")

    def _tail(self, name: str, lines: int = 20) -> str:
        path = self._log_dir / f"{name}.log"
        if not path.exists():
            return "(nothing written)"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
