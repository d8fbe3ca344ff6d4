"""A ledger of one GPU's memory: the real orders that engines are given, carried out by engines that only book bytes.

What is real: `grpo.cluster.engines.Engines`, the actors and the transaction of a weight sync. Each call of an actor is
in flight from when it is made until somebody waits, as with Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray as real_ray
import torch
from numpy.typing import NDArray
from test_plan import config_of

from grpo.cluster import actors, engines, remote_samplers, watch
from grpo.config import Config
from grpo.planning.estimate import Lengths, estimate
from grpo.planning.memory import (
    Parts,
    learner_memory,
    perturbed_bytes,
    perturbing_bytes,
    sampler_memory,
    states,
    transfer_bytes,
)
from grpo.planning.shapes import GPUS, shape_of
from grpo.sync import transaction, transport
from grpo.sync.probe import Probe, Reading, Spread
from grpo.sync.transport import Place
from grpo.sync.weights import Bucket, SyncReport
from grpo.types import Mean, StepResult

PROBE = Probe(token_ids=((1, 2, 3),))
LOGPROBS: tuple[NDArray[np.float32], ...] = (np.asarray([-1.0, -2.0], dtype=np.float32),)


class Ledger:
    """Bytes of one GPU by owner, the most that there were at once, and what was in flight together."""

    def __init__(self) -> None:
        self.held: Parts = {}
        self.peak = 0.0
        self.together: list[set[str]] = []

    def book(self, **parts: float) -> None:
        for name, size in parts.items():
            assert name not in self.held, f"{name} is there already"
            self.held[name] = size
        self.peak = max(self.peak, self.total())

    def unbook(self, *names: str) -> None:
        for name in names:
            self.held.pop(name, None)

    def total(self) -> float:
        return sum(self.held.values())


class BookingSampler:
    """Stands for `grpo.sampler.vllm.engine.Sampler`."""

    def __init__(self, ledger: Ledger, parts: Parts, transfer: float) -> None:
        learners = ledger.held.keys() - {"staging"}  # which does not grow or shrink while vLLM measures
        assert not learners, f"vLLM measures free memory while the learner holds {learners}"
        self._ledger, self._transfer = ledger, transfer
        self._weights = parts["weights"]
        self._rest = sum(parts.values()) - parts["weights"] - parts["transfer"]  # KV cache and what a forward takes
        self._consumed: dict[str, int] = {}
        self._version = -1
        self.wake("weights", "kv_cache")

    def gpus(self) -> tuple[str, ...]:
        return ("GPU-0",)

    def sleep(self, *, keep_weights: bool) -> float:
        self._ledger.unbook("sampler", "cache")
        return 0.0

    def wake(self, *tags: str) -> None:
        assert "activations" not in self._ledger.held, "torch still keeps what the learner's step took"
        wanted = {"weights": ("sampler", self._weights), "kv_cache": ("cache", self._rest)}
        for name, size in (wanted[tag] for tag in tags):
            if name not in self._ledger.held:
                self._ledger.book(**{name: size})

    def init_transfer(self, info: Any) -> None: ...

    def begin_sync(self, version: int) -> None:
        assert "sampler" in self._ledger.held, "weights are sent to a sampler that sleeps"
        self._consumed, self._version = {}, version
        self._ledger.book(received=self._transfer)

    def load_bucket(self, bucket: Bucket) -> None:
        self._consumed |= {s.name: c for s, c in zip(bucket.tensors, bucket.checksums, strict=True)}

    def finish_sync(self, probe: Probe) -> SyncReport:
        assert {"sampler", "cache"} <= self._ledger.held.keys(), "the probe is asked of a sampler without its memory"
        self._ledger.unbook("received")
        return SyncReport(
            policy_version=self._version, consumed=self._consumed, unfilled_slots=(), unmapped_tensors=(),
            probe_logprobs=LOGPROBS,
        )  # fmt: skip


class BookingLearner:
    """Stands for `grpo.learner.zero.engine.Learner`, one rank, and for its `models` and its `synced` policy."""

    device = torch.device("cpu")

    def __init__(self, ledger: Ledger, parts: Parts, perturbed: float, perturbing: float) -> None:
        self.models = self.synced = self
        self._ledger, self._states = ledger, states(parts)
        self._step = sum(parts.values()) - self._states
        self._perturbed, self._perturbing = perturbed, perturbing
        self.reload()

    def gpus(self) -> tuple[str, ...]:
        return ("GPU-0",)

    def reload(self) -> None:
        if "learner" not in self._ledger.held:
            self._ledger.book(learner=self._states)

    def offload(self) -> None:
        self._ledger.unbook("learner", "activations")

    def drop_cache(self) -> None:
        self._ledger.unbook("activations")

    def step(self, step: Any) -> Any:
        self._ledger.unbook("activations")
        self._ledger.book(activations=self._step)  # which torch keeps for the next step
        return StepResult(
            optimizer_steps=1,
            skipped_updates=0,
            metrics={},
            maxima={},
            minima={},
            mismatch_square=Mean(),
            kl_ref=Mean(),
            learner_logprob_sums={},
            mismatch_counts=np.zeros(1, np.int64),
        )

    def read_probe(self, probe: Probe) -> Reading:
        assert "learner" in self._ledger.held, "the probe is asked of a learner whose weights are in host memory"
        self._moved = not getattr(self, "_moved", False)
        return Reading(logprobs=LOGPROBS, noise=Spread(q90=1e-3, rms=1e-3))

    def parameter_count(self) -> int:
        return 300

    @contextmanager
    def perturbation(self, group: int, groups: int) -> Iterator[Callable[[float], None]]:
        def perturb(strength: float) -> None:
            self._ledger.book(perturbing=self._perturbing)
            self._ledger.unbook("perturbing")

        self._ledger.book(perturbed=self._perturbed)
        yield perturb
        self._ledger.unbook("perturbed")

    def mean(self, values: Sequence[float]) -> list[float]:
        return [1.0, 100.0]  # every group moves the learner far enough

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((str(i), torch.zeros(4)) for i in range(3))

    def save(self, folder: Path) -> None:
        assert "learner" in self._ledger.held


class InFlight:
    """Stands for Ray: a call is in flight from when it is made until somebody waits for it, or for a later one of the
    same actor."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: list[tuple[Any, Any, str, Callable[[], Any]]] = []
        self._done: dict[int, Any] = {}
        self.exceptions = real_ray.exceptions
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
        context = SimpleNamespace(
            get_node_id=lambda: "node", get_accelerator_ids=lambda: {"GPU": ["0"]},
        )  # fmt: skip
        self.get_runtime_context = lambda: context

    def remote(self, actor: Any) -> Any:
        def make(*arguments: Any) -> Any:
            made = actor(*arguments)
            made_of: Any = SimpleNamespace(**{
                name: SimpleNamespace(remote=self._call(made, f"{actor.__name__}.{name}", getattr(made, name)))
                for name in dir(actor)
                if not name.startswith("_")
            })  # fmt: skip
            return Handle(made_of)

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def _call(self, actor: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            reference = object()
            self._open.append((reference, actor, name, lambda: method(*arguments)))
            return reference

        return call

    def _carry_out(self, references: Sequence[Any]) -> None:
        self._ledger.together.append({name for _, _, name, _ in self._open})
        for wanted in references:
            if id(wanted) in self._done:
                continue
            [its_actor] = [actor for reference, actor, _, _ in self._open if reference is wanted]
            while id(wanted) not in self._done:
                first = next(each for each in self._open if each[1] is its_actor)
                self._open.remove(first)
                reference, _, _, call = first
                self._done[id(reference)] = (reference, call())

    def wait(self, references: Sequence[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        self._carry_out(references)
        return list(references), []

    def kill(self, actor: Any) -> None:
        self._ledger.unbook("sampler", "cache")

    def get(self, references: Any, timeout: float = 0) -> Any:
        self._carry_out(references if isinstance(references, list) else [references])
        if isinstance(references, list):
            return [self._done[id(reference)][1] for reference in references]
        return self._done[id(references)][1]


class Handle:
    def __init__(self, methods: Any) -> None:
        self.__dict__.update(methods.__dict__)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], tuple[Ledger, engines.Engines]]:
    def start(config: Config) -> tuple[Ledger, engines.Engines]:
        ledger, shape = Ledger(), shape_of(config.model.path)
        (learner, _), sampler = learner_memory(config, shape), sampler_memory(config, shape, GPUS["h100"].memory)
        transfer = transfer_bytes(shape, 2 if config.model.dtype == "bfloat16" else 4)
        flying: Any = InFlight(ledger)
        for module in (actors, engines, remote_samplers, watch):
            monkeypatch.setattr(module, "ray", flying)
        monkeypatch.setattr(actors, "_log_to", lambda path: None)
        monkeypatch.setattr(actors, "network_environment", lambda host: {})
        monkeypatch.setattr(actors, "freeze_garbage", lambda: None)
        monkeypatch.setattr(actors, "set_threads", lambda count: None)
        monkeypatch.setattr(actors, "_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
        monkeypatch.setattr(actors, "_place", lambda gpus: Place(node="node", host="127.0.0.1", gpus=tuple(gpus)))
        monkeypatch.setattr(actors, "open_store", lambda *_: SimpleNamespace(port=1))
        monkeypatch.setattr(transaction, "prove", full_check)
        monkeypatch.setattr(engines, "Reservation", lambda *_: SimpleNamespace(of=lambda *_: {}, release=lambda: None))
        monkeypatch.setattr(watch.ActorWatch, "_lost", lambda self: None)
        monkeypatch.setattr(transport, "BUCKET_BYTES", 64)
        monkeypatch.setattr(transport, "reduce_tensor", lambda flat: (None, (0,) * 15))

        def booked_pack(self: transport.IpcSender, tensors: Any) -> Bucket:
            if "staging" not in ledger.held:
                ledger.book(staging=transfer)
            return pack(self, tensors)

        pack = transport.IpcSender.pack
        monkeypatch.setattr(transport.IpcSender, "pack", booked_pack)
        stub("grpo.sampler.vllm.engine", Sampler=lambda *_: BookingSampler(ledger, sampler, transfer))
        copies = (perturbed_bytes(config, shape), perturbing_bytes(config, shape))
        stub("grpo.learner.zero.engine", Learner=lambda *_: BookingLearner(ledger, learner, *copies))
        stub("grpo.learner.zero.setup", init_process_group=lambda *_: torch.device("cpu"))
        return ledger, engines.Engines(config, Path("logs"), lambda _: None, SimpleNamespace())  # type: ignore[arg-type]

    def stub(name: str, **attributes: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, leaf = name.rpartition(".")
        if package in sys.modules and hasattr(sys.modules[package], leaf):
            monkeypatch.setattr(sys.modules[package], leaf, module)

    return start


def full_check(*, learner: Any, before: Reading, probe: Probe, groups: int, transfer: Any) -> tuple[float, ...]:
    """The orders of `grpo.sync.weights.prove`, whose verdicts are not the matter here."""
    for group in range(groups):
        with learner.perturbation(group, groups) as perturb:
            perturb(0.1)
            transfer(learner.read_probe(probe))
    return (0.0,) * groups


def a_run(ledger: Ledger, running: engines.Engines) -> None:
    """The start, two steps with their syncs, and a model that is saved between."""
    for version in range(3):
        running.publish(version, PROBE, full_check=version == 0)()
        assert {"sampler", "cache"} <= ledger.held.keys()  # it can sample
        if version < 2:
            running.step([None])  # type: ignore[list-item]
        else:
            running.save(Path("model"))


CASES = [
    ("gsm8k_qwen2.5_0.5b", ("cluster.sleep=true",)),
    ("math_drgrpo_7b", ("cluster.layout=colocated", "cluster.samplers=1", "cluster.learner_ranks=1")),
    ("gsm8k_qwen2.5_0.5b", ("cluster.sleep=false",)),
]


@pytest.mark.parametrize(("recipe", "overrides"), CASES, ids=["0.5B", "7B", "0.5B without turns"])
def test_the_peak_is_within_the_plan(
    recipe: str, overrides: tuple[str, ...], machine: Callable[[Config], tuple[Ledger, engines.Engines]]
) -> None:
    config = config_of(recipe, *overrides)
    assert config.on_gpu
    assert config.cluster.learner_ranks == config.cluster.samplers == 1
    ledger, running = machine(config)
    a_run(ledger, running)
    shape, lengths = shape_of(config.model.path), Lengths(prompt=100, completion=200, longest=300)
    plan = estimate(config, shape, GPUS["h100"], lengths, nodes=1, gpus_per_node=8)
    planned = [sum(plan.learner.values()), sum(plan.sampler.values()), sum(plan.sync.values())]
    expected = max(planned) if config.takes_turns else sum(planned)
    assert 0.85 * expected <= ledger.peak <= 1.15 * expected


@pytest.mark.parametrize(("recipe", "overrides"), CASES, ids=["0.5B", "7B", "0.5B without turns"])
def test_no_two_engines_load_at_once_on_one_gpu(
    recipe: str, overrides: tuple[str, ...], machine: Callable[[Config], tuple[Ledger, engines.Engines]]
) -> None:
    ledger, _ = machine(config_of(recipe, *overrides))
    loading = [{name for name in each if name.endswith(".start")} for each in ledger.together]
    assert [each for each in loading if each] == [{"SamplerActor.start"}, {"LearnerActor.start"}]


def test_a_sampler_is_replaced_while_the_learner_is_in_host_memory(
    machine: Callable[[Config], tuple[Ledger, engines.Engines]],
) -> None:
    """The new one loads on a GPU that is free, and gets weights that the learner has taken back before it is asked for
    its probe."""
    recipe, overrides = CASES[0]
    ledger, running = machine(config_of(recipe, *overrides))
    a_run(ledger, running)
    before, first = dict(ledger.held), running.fleet.samplers[0]
    running._replace([0], watch.ActorDied("sampler-0", "sampler-0 died"))
    assert running.fleet.samplers[0] is not first
    assert ledger.held == before  # it can sample, and the learner has left again


@pytest.mark.parametrize(("recipe", "overrides"), CASES[:2], ids=["0.5B", "7B"])
def test_while_it_samples_only_the_buffer_of_the_transfer_is_left_of_the_learner(
    recipe: str, overrides: tuple[str, ...], machine: Callable[[Config], tuple[Ledger, engines.Engines]]
) -> None:
    ledger, running = machine(config_of(recipe, *overrides))
    a_run(ledger, running)
    assert ledger.held.keys() == {"sampler", "cache", "staging"}
