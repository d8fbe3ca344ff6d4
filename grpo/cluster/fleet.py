"""The actors of a run: create them, load the engines and connect learner and samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle

from grpo.cluster.actors import LearnerActor, SamplerActor
from grpo.cluster.environment import learner_environment, sampler_environment
from grpo.cluster.placement import ENGINES, Reservation
from grpo.cluster.watch import ActorWatch
from grpo.config import Config
from grpo.sync.transport import transport_of
from grpo.types import EngineFailure


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
