"""The engines of a run as the driver's loop uses them.

`Engines` samples, steps, syncs and closes. `Maker` creates the actors of its `Fleet` where the placement has room.
`LearnerState` writes checkpoints and restores them. `put_to_sleep` and `learner_between_steps` pass the memory between
samplers and learner that take turns in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray import ObjectRefGenerator
from ray.actor import ActorHandle

from grpo.cluster.actors import LearnerActor, SamplerActor
from grpo.cluster.environment import learner_environment, sampler_environment
from grpo.cluster.placement import ENGINES, Reservation
from grpo.cluster.remote_samplers import Reference
from grpo.cluster.watch import ActorDied, ActorWatch
from grpo.config import Config
from grpo.files import FileRecord
from grpo.run.checkpoints import LearnerRecord
from grpo.run.timeline import Timeline
from grpo.sync.probe import Probe
from grpo.sync.transaction import SyncResult
from grpo.sync.transport import transport_of
from grpo.types import EngineFailure, RankStep, SampledBlock, SampleRequest, SamplingSettings, StepResult, only


class Engines:
    """All actors of a run, with the operations that the driver's loop calls. A sampler that dies is replaced."""

    def __init__(self, config: Config, log_dir: Path, say: Callable[[str], None], timeline: Timeline) -> None:
        """Place the actors and load the engines: all at once or, if they share GPUs, the samplers first.

        Without learner ranks, the samplers keep the weights of the model folder.

        Args:
            say: Called with a line when a sampler has been replaced.

        Raises EngineFailure when an engine does not start, UserError when the model folder is the cause.
        """
        self._config, self._say, self._timeline = config, say, timeline
        self._timeout = config.cluster.step_timeout_s
        self._outstanding: dict[int, int] = {}
        """Sampler -> completions that it still has to deliver."""
        self._published: tuple[int, Probe] | None = None
        self._replaced = 0
        self._watch = ActorWatch(log_dir)
        self._maker = Maker(config, log_dir, self._watch)
        self.fleet = self._maker.fleet()
        self.state = LearnerState(self.fleet)
        load(self.fleet)

    @property
    def hosts(self) -> dict[str, str]:
        """Return engine -> address of its node."""
        return self._watch.hosts

    def sample(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> Iterator[SampledBlock]:
        """Spread `requests` over the samplers in contiguous shares. Yield finished completions as they arrive.

        When a sampler dies, its replacement samples the missing completions, with the same seeds.
        """
        count = len(self.fleet.samplers)
        shares = [requests[i * len(requests) // count : (i + 1) * len(requests) // count] for i in range(count)]
        streams = {self._ask(i, share, settings): (i, share) for i, share in enumerate(shares) if share}
        self._outstanding = {i: sum(len(r.seeds) for r in share) for i, share in enumerate(shares) if share}
        done: set[tuple[int, int]] = set()
        spans = {i: self._timeline.begin(f"sampler {i}", "sample") for i, _ in streams.values()}
        what = "completions from the samplers"
        while streams:
            ready, _ = self._watch.ready(list(streams), what, self._timeout, time.monotonic())
            try:
                [block] = self._watch.wait([next(ready[0])], what, self._timeout, of_samplers=True)
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

    def _ask(self, sampler: int, share: Sequence[SampleRequest], settings: SamplingSettings) -> ObjectRefGenerator:
        return self.fleet.samplers[sampler].sample.options(num_returns="streaming").remote(share, settings)

    def _replace(self, lost: Sequence[int], error: ActorDied) -> None:
        """Replace lost samplers, and sync the weights to the new ones with a full check.

        Raises `error` when `cluster.max_replacements` would be exceeded, or when a replacement is not possible.
        """
        self._replaced += len(lost)
        too_many = self._replaced > self._config.cluster.max_replacements
        if too_many or (self.fleet.learners and (self.fleet.transport == "nccl" or self._published is None)):
            raise error
        started = time.monotonic()
        for i in lost:
            self._watch.kill(self.fleet.samplers[i])
            self.fleet.samplers[i] = self._maker.sampler(i, replaced=self._replaced)
        load_samplers(self.fleet, lost)
        if self._published is not None:
            connect(self.fleet)
            self._synced(self._publishing(*self._published, full_check=True))
        names = ", ".join(f"sampler-{i}" for i in lost)
        self._say(f"{str(error).splitlines()[0]}; replaced {names} in {time.monotonic() - started:.0f} s")

    def step(self, steps: Sequence[RankStep]) -> StepResult:
        """Run one driver step on every learner rank."""
        residual = put_to_sleep(self.fleet, keep_weights=False)
        pending = [learner.step.remote(step) for learner, step in zip(self.fleet.learners, steps, strict=True)]
        result: StepResult = self._watch.wait(pending, "the learner's step", self._timeout)[0]
        return replace(result, maxima={**result.maxima, **residual})

    def publish(self, policy_version: int, probe: Probe, *, full_check: bool) -> Callable[[], SyncResult]:
        """Start the weight sync from the learner to every sampler. The returned function waits until it is verified."""
        pending = self._publishing(policy_version, probe, full_check)

        def finish() -> SyncResult:
            self._published = (policy_version, probe)
            try:
                return self._synced(pending)
            except ActorDied as error:
                if not error.name.startswith("sampler"):
                    raise
                self._watch.settle(pending, self._timeout)
                # the others are in a sync that will not end, so they are replaced, too
                self._replace(range(len(self.fleet.samplers)), error)
                # the metrics are the same as without a replacement
                return self._synced(self._publishing(policy_version, probe, full_check))

        return finish

    def _publishing(self, policy_version: int, probe: Probe, full_check: bool) -> list[Reference[SyncResult]]:
        return [
            learner.publish.remote(policy_version, probe, full_check, self._timeout) for learner in self.fleet.learners
        ]

    def _synced(self, pending: Sequence[Reference[SyncResult]]) -> SyncResult:
        return self._watch.wait(pending, "the weight sync", self._timeout)[0]

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self.state.save(folder)

    def close(self) -> None:
        """Kill every actor and release its placement."""
        self._watch.kill_all()
        self._maker.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The actors of a run by index, and their watch."""

    config: Config
    transport: str
    watch: ActorWatch
    learners: list[ActorHandle]
    samplers: list[ActorHandle]
    """A sampler that is replaced is replaced here."""


class Maker:
    """Creates actors where the placement of the run has room for them."""

    def __init__(self, config: Config, log_dir: Path, watch: ActorWatch) -> None:
        """Reserve the room. Raises EngineFailure when there is none."""
        self._config, self._log_dir, self._watch = config, log_dir, watch
        self._transport = transport_of(config)
        try:
            self._reserved = Reservation(config, config.cluster.start_timeout_s, ENGINES)
        except TimeoutError as error:
            raise EngineFailure(str(error)) from error

    def fleet(self) -> Fleet:
        """Return a whole fleet, whose engines are still to be loaded."""
        cluster = self._config.cluster
        return Fleet(
            config=self._config,
            transport=self._transport,
            watch=self._watch,
            learners=[self._learner(i) for i in range(cluster.learner_ranks)],
            samplers=[self.sampler(i, replaced=0) for i in range(cluster.samplers)],
        )

    def sampler(self, index: int, *, replaced: int) -> ActorHandle:
        """Return a new sampler. `replaced`: how many samplers of the run have been replaced."""
        gpus = self._config.sampler_workers if self._config.on_gpu and self._transport != "ipc" else 0
        # unique in the run's namespace; the name of an actor that died may not be free yet
        suffix = f".{replaced}" if replaced else ""
        return self._make(SamplerActor, "sampler", index, sampler_environment(self._config), gpus=gpus, suffix=suffix)

    def _learner(self, rank: int) -> ActorHandle:
        environment = learner_environment(self._config, rank)
        return self._make(LearnerActor, "learner", rank, environment, gpus=int(self._config.on_gpu))

    def _make(
        self, actor: type, kind: str, index: int, environment: dict[str, str], *, gpus: int, suffix: str = ""
    ) -> ActorHandle:
        name = f"{kind}-{index}"
        cluster = self._config.cluster
        made = ray.remote(actor).options(
            scheduling_strategy=self._reserved.of(kind, index),
            num_cpus=cluster.sampler_cpus if kind == "sampler" else cluster.learner_cpus,
            num_gpus=gpus,
            max_restarts=0,
            runtime_env={"env_vars": environment},
            name=f"{name}{suffix}",
        )
        handle = made.remote(self._config, index, str(self._log_dir / f"{name}.log"))
        self._watch.add(handle, name)
        return handle

    def release(self) -> None:
        self._reserved.release()


def load(fleet: Fleet) -> None:
    """Load the engines, all at once or, if they share GPUs, the samplers first, and open the weight transfer."""
    config, watch, start = fleet.config, fleet.watch, fleet.config.cluster.start_timeout_s
    loading = [s.start.remote(fleet.transport, _devices_of(fleet, i)) for i, s in enumerate(fleet.samplers)]
    if fleet.learners and (config.takes_turns or fleet.transport == "ipc"):
        watch.wait(loading, "the samplers to load", start)  # vLLM measures the free memory while it loads
        loading = []
    if config.takes_turns and fleet.learners:
        leaving = [sampler.sleep.remote(False) for sampler in fleet.samplers]
        watch.wait(leaving, "the samplers to release their memory", start)
    if fleet.learners:
        host, port = watch.wait([fleet.learners[0].open_store.remote()], "the learner's rendezvous", start)[0]
        loading += [learner.start.remote(host, port) for learner in fleet.learners]
    watch.wait(loading, "the engines to load", start)
    if fleet.learners:
        connect(fleet)


def load_samplers(fleet: Fleet, indices: Sequence[int]) -> None:
    """Load the engines of samplers that replace others."""
    starting = [fleet.samplers[i].start.remote(fleet.transport, _devices_of(fleet, i)) for i in indices]
    fleet.watch.wait(starting, "a sampler to be replaced", fleet.config.cluster.start_timeout_s)


def connect(fleet: Fleet) -> None:
    """Open the weight transfer between learner and samplers."""
    watch, start = fleet.watch, fleet.config.cluster.start_timeout_s
    ranks = watch.wait([rank.place.remote() for rank in fleet.learners], "the learner's places", start)
    at = watch.wait([sampler.place.remote() for sampler in fleet.samplers], "the samplers' places", start)
    watch.hosts = {f"learner-{i}": place.host for i, place in enumerate(ranks)}
    watch.hosts |= {f"sampler-{i}": place.host for i, place in enumerate(at)}
    connecting = [rank.connect.remote(ranks, fleet.samplers, at, fleet.transport, start) for rank in fleet.learners]
    watch.wait(connecting, "the weight transfer to open", start)


def _devices_of(fleet: Fleet, sampler: int) -> list[str]:
    """Return the GPUs that a sampler shares with learner ranks, in the order of the sampler's workers."""
    if fleet.transport != "ipc":
        return []
    workers = fleet.config.sampler_workers
    ranks = fleet.learners[sampler * workers : (sampler + 1) * workers]
    start = fleet.config.cluster.start_timeout_s
    found = fleet.watch.wait([rank.devices.remote() for rank in ranks], "the learner's GPUs", start)
    return [device for devices in found for device in devices]


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


class LearnerState:
    """Checkpoints of the learner in a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._timeout = fleet.config.cluster.step_timeout_s

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        with learner_between_steps(self._fleet):
            pending = [learner.save.remote(str(folder)) for learner in self._fleet.learners]
            self._fleet.watch.wait(pending, "the model to be saved", self._timeout)

    def capture(self, folder: Path) -> LearnerRecord:
        """Have every rank copy its state and start to write it to `folder`. Return the parts that are not tensors."""
        with learner_between_steps(self._fleet):
            pending = [learner.capture.remote(str(folder)) for learner in self._fleet.learners]
            counters = self._fleet.watch.wait(pending, "the checkpoint's copy", self._timeout)[0]
        config = self._fleet.config
        return {**counters, "ranks": config.cluster.learner_ranks, "zero_stage": config.learner.zero_stage}

    def state_bytes(self) -> int:
        """Return the approximate size of a learner checkpoint, in bytes."""
        pending = [self._fleet.learners[0].state_bytes.remote()]
        return int(self._fleet.watch.wait(pending, "the size of a checkpoint", self._timeout)[0])

    def captured(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """Return the written files by name, or None while a rank is still writing."""
        pending = [learner.captured.remote(wait) for learner in self._fleet.learners]
        records = self._fleet.watch.wait(pending, "the checkpoint to be written", self._timeout)
        if None in records:
            return None
        return {f"rank-{rank}.safetensors": record for rank, record in enumerate(records)}

    def restore(self, folder: Path, learner: LearnerRecord) -> None:
        """Restore the learner from a checkpoint whose files have been verified."""
        files = [folder / "learner" / f"rank-{rank}.safetensors" for rank in range(learner["ranks"])]
        pending = [rank.restore.remote(files, learner) for rank in self._fleet.learners]
        start = self._fleet.config.cluster.start_timeout_s
        self._fleet.watch.wait(pending, "the learner to load the checkpoint", start)
