"""Buckets, checksums and the verdict on a sync; the engines' side is in tests/integration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from grpo.learner.probe import Perturbation
from grpo.sync import weights as weight_sync
from grpo.sync.probe import Probe, Reading, Spread, group_members, spread
from grpo.sync.weights import (
    SyncReport,
    WeightSyncError,
    buckets_of,
    checksum,
    prove,
    refuse_not_finite,
    verify,
    weighted_sum,
)


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", torch.randn(3, 5, generator=generator)),
        ("b", torch.randn(7, generator=generator).bfloat16()),
        ("c", torch.randn(2, 2, 2, generator=generator)),
    ]


def test_buckets_keep_order_and_respect_the_limit() -> None:
    sized = [(str(n), torch.zeros(n)) for n in (10, 10, 30, 5, 5)]
    names = [[name for name, _ in bucket] for bucket in buckets_of(sized, limit=4 * 20)]
    assert names == [["10", "10"], ["30"], ["5", "5"]]
    assert list(buckets_of([], limit=10)) == []


def test_buckets_go_by_logical_size_of_tensors_without_data() -> None:
    logical = [(str(i), torch.empty(10, device="meta")) for i in range(4)]
    assert [len(bucket) for bucket in buckets_of(logical, limit=80)] == [2, 2]


def test_checksum_sees_a_flipped_bit_a_swap_and_a_shift() -> None:
    original = torch.arange(1.0, 33.0)
    flipped = original.clone()
    flipped.view(torch.int32)[7] ^= 1
    swapped = original.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    values = {checksum(t) for t in (original, flipped, swapped, original.roll(1), torch.zeros(32))}
    assert len(values) == 5
    assert checksum(original.view(4, 8).t().contiguous().t()) == checksum(original)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_checksum_on_gpus_by_hand_however_it_is_cut(chunk: int) -> None:
    """Python's integers, which do not overflow, against int64's that do."""
    words = torch.tensor([2**31 - 1, -(2**31), 0, 5, -7] * 13, dtype=torch.int32)
    expected = sum(word * ((i + 1) * 2654435761 % 4294967291) for i, word in enumerate(words.tolist())) % 2**64
    assert weighted_sum(words, chunk) == expected
    swapped = words.clone()
    swapped[[3, 4]] = words[[4, 3]]
    assert weighted_sum(swapped, chunk) != expected


REPORT = SyncReport(
    policy_version=3,
    consumed={"a": 1, "b": 2},
    unfilled_slots=(),
    unmapped_tensors=(),
    probe_logprobs=(np.asarray([-1.0, -2.0], dtype=np.float32), np.asarray([-3.0, -4.0], dtype=np.float32)),
)


def verdict(**changes: object) -> Spread:
    """The learner is 0.01 lower on each token, its noise 0.006: 1.7 of the 2 times that are allowed."""
    learner = tuple(row - np.float32(0.01) for row in REPORT.probe_logprobs)
    return verify(
        report=dataclasses.replace(REPORT, **changes),
        policy_version=3,
        sent={"a": 1, "b": 2},
        learner=Reading(logprobs=learner, noise=Spread(rms=0.006, q90=0.006)),
        sampler="sampler 0",
    )


def test_a_good_sync_returns_how_far_sampler_and_learner_are_apart() -> None:
    apart = verdict()
    assert apart.rms == pytest.approx(0.01, rel=1e-4)
    assert apart.q90 == pytest.approx(0.01, rel=1e-4)


def test_one_token_of_two_hundred_may_be_far_apart() -> None:
    """In bfloat16 rounding alone moves a token in a few hundred by half a nat: the largest difference has no limit. All
    others are 0.05 apart, and the root mean square is sqrt((199 x 0.0025 + 0.25) / 200) = 0.0611: twice the noise, of
    which five times are allowed."""
    learner = np.full(200, -1.0, dtype=np.float32)
    sampler = learner + np.float32(0.05)
    sampler[17] = -0.5
    apart = verify(
        report=dataclasses.replace(REPORT, probe_logprobs=(sampler,)),
        policy_version=3,
        sent={"a": 1, "b": 2},
        learner=Reading(logprobs=(learner,), noise=Spread(rms=0.03, q90=0.04)),
        sampler="sampler 0",
    )
    assert apart.rms == pytest.approx(0.0611, rel=1e-2)
    assert apart.q90 == pytest.approx(0.05, rel=1e-4)


ONE_OFF = (np.asarray([-1.0, -2.0], dtype=np.float32), np.asarray([-3.0, -4.1], dtype=np.float32))
NOT_A_NUMBER = (np.asarray([-1.0, -2.0], dtype=np.float32), np.asarray([-3.0, np.nan], dtype=np.float32))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy_version": 2}, "echoes policy version 2, expected 3"),
        ({"unmapped_tensors": ("x.bias",)}, "no slot for x.bias"),
        ({"consumed": {"a": 1}}, "did not consume b"),
        ({"consumed": {"a": 1, "b": 2, "c": 3}}, "consumed unannounced c"),
        ({"consumed": {"a": 1, "b": 5}}, "other data than was sent for b"),
        ({"unfilled_slots": ("qkv",)}, "unfilled weights: qkv"),
        ({"probe_logprobs": ONE_OFF}, "does not use them"),
        ({"probe_logprobs": NOT_A_NUMBER}, "differ from the learner's by inf"),
    ],
)
def test_every_defect_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(WeightSyncError, match=words):
        verdict(**changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_refused(value: float) -> None:
    broken = torch.zeros(3, 2, dtype=torch.bfloat16)
    broken[2, 1] = value
    fine = torch.full((4,), 3e38)
    refuse_not_finite([("fine", fine)])
    with pytest.raises(WeightSyncError, match=r"not finite, and are not published: b$"):
        refuse_not_finite([("a", fine), ("b", broken)])


class Mlp:
    """A learner that really computes: logprobs of 64 tokens from four matrices, and their noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(8, 8, generator=generator)) for _ in range(4)]
        self.given = torch.randn(64, 8, generator=generator)
        self.deaf = False

    def logprobs(self, weights: list[torch.Tensor], rounding: float) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        hidden = self.given
        with torch.no_grad():
            for weight in weights:
                hidden = torch.tanh(hidden @ weight / 3) * (1 + rounding * torch.randn(64, 8, generator=generator))
        return torch.log_softmax(hidden, -1)[:, 0].numpy()

    def parameter_count(self) -> int:
        return len(self.weights)

    def read_probe(self, probe: Probe, noise: Spread | None = None) -> Reading:
        exact = (self.logprobs([self.given.new_ones(8, 8)] if self.deaf else self.weights, 0.0),)
        rounded = (self.logprobs([self.given.new_ones(8, 8)] if self.deaf else self.weights, 1e-3),)
        return Reading(logprobs=exact, noise=spread(exact, rounded))

    @contextmanager
    def perturbation(self, group: int, groups: int) -> Iterator[Callable[[float], None]]:
        perturbation = Perturbation(self.weights, group_members(group, groups, 4), vocabulary=100, rank=0)
        yield perturbation.apply
        perturbation.undo()

    def mean(self, values: Sequence[float]) -> list[float]:
        return list(values)


class Follower:
    """A sampler that copies the learner's matrices, but for those that it keeps."""

    def __init__(self, learner: Mlp, keeps: Sequence[int] = ()) -> None:
        self.learner, self.keeps = learner, keeps
        self.first = [weight.detach().clone() for weight in learner.weights]

    def transfer(self, learner: Reading) -> Spread:
        weights = [self.first[i] if i in self.keeps else w.detach() for i, w in enumerate(self.learner.weights)]
        report = dataclasses.replace(REPORT, probe_logprobs=(self.learner.logprobs(weights, 5e-4),))
        return verify(report=report, policy_version=3, sent={"a": 1, "b": 2}, learner=learner, sampler="sampler 0")


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 1), (16, 1), (16, 2), (16, 9)])
def test_a_sampler_that_follows_is_proven(groups: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One movement for each group of `size` parameters or more; the learner ends as it began."""
    monkeypatch.setattr(weight_sync, "GROUP_SIZE", size)
    learner = Mlp()
    follower = Follower(learner)
    probe = Probe(token_ids=((1, 2),))
    before = learner.read_probe(probe)
    errors = prove(learner=learner, before=before, probe=probe, groups=groups, transfer=follower.transfer)
    assert len(errors) == max(1, min(groups, 4 // size))
    assert all(0 < error < 0.2 for error in errors)
    assert all(torch.equal(now, first) for now, first in zip(learner.weights, follower.first, strict=True))


@pytest.mark.parametrize("stale", range(4))
@pytest.mark.parametrize("groups", [1, 4])
def test_a_sampler_that_keeps_any_one_matrix_is_refused(
    stale: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unperturbed, it holds the learner's weights, and nothing is wrong with it. The message names the parameters that
    were perturbed."""
    monkeypatch.setattr(weight_sync, "GROUP_SIZE", 1)
    learner = Mlp()
    follower = Follower(learner, keeps=[stale])
    probe = Probe(token_ids=((1, 2),))
    before = learner.read_probe(probe)
    follower.transfer(before)
    first, last = (stale, stale) if groups == 4 else (0, 3)
    where = rf"with parameters {first} to {last} of 4 perturbed.*does not use"
    with pytest.raises(WeightSyncError, match=rf"in the full check, {where}"):
        prove(learner=learner, before=before, probe=probe, groups=groups, transfer=follower.transfer)


def test_a_learner_that_does_not_move_proves_nothing() -> None:
    learner = Mlp()
    learner.deaf = True
    probe = Probe(token_ids=((1, 2),))
    before = learner.read_probe(probe)
    with pytest.raises(WeightSyncError, match="would prove nothing: perturbing group 0"):
        prove(learner=learner, before=before, probe=probe, groups=2, transfer=Follower(learner).transfer)
