"""The engines of a run as the driver's loop uses them. A sampler that dies is replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ray import ObjectRefGenerator

from grpo.cluster.fleet import Maker, connect, load, load_samplers
from grpo.cluster.learner_state import LearnerState
from grpo.cluster.remote_samplers import Reference
from grpo.cluster.turns import put_to_sleep
from grpo.cluster.watch import ActorDied, ActorWatch
from grpo.config import Config
from grpo.run.timeline import Timeline
from grpo.sync.probe import Probe
from grpo.sync.transaction import SyncResult
from grpo.types import RankStep, SampledBlock, SampleRequest, SamplingSettings, StepResult, only


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
            self._publish(*self._published, full_check=True)
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
                return self._watch.wait(pending, "the weight sync", self._timeout)[0]
            except ActorDied as error:
                if not error.name.startswith("sampler"):
                    raise
                self._watch.settle(pending, self._timeout)
                # the others are in a sync that will not end, so they are replaced, too
                self._replace(range(len(self.fleet.samplers)), error)
                # the metrics are the same as without a replacement
                return self._publish(policy_version, probe, full_check=full_check)

        return finish

    def _publishing(self, policy_version: int, probe: Probe, full_check: bool) -> list[Reference[SyncResult]]:
        return [
            learner.publish.remote(policy_version, probe, full_check, self._timeout) for learner in self.fleet.learners
        ]

    def _publish(self, policy_version: int, probe: Probe, *, full_check: bool) -> SyncResult:
        pending = self._publishing(policy_version, probe, full_check)
        return self._watch.wait(pending, "the weight sync", self._timeout)[0]

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self.state.save(folder)

    def close(self) -> None:
        """Kill every actor and release its placement."""
        self._watch.kill_all()
        self._maker.release()
