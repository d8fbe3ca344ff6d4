"""The weight sync protocol from the learner to the samplers: buckets, checksums, and the probe that verifies them.

The order of its calls is in `grpo.sync.transaction`, the transfer of bytes in `grpo.sync.transport`;
engine code is in `grpo.sampler` and `grpo.learner`.

One sync is one transaction on every sampler, commanded by learner rank 0:

    begin(manifest)        names, shapes and dtypes to come, and the new policy version
    load(bucket) ...       size-capped; the checksum of each tensor is computed where the engine consumes the data
    finish() -> report     ends the reload, drops all caches, and measures the probe's logprobs under the new weights

A sync is valid only if all of the following hold (design invariant 3):

- Every tensor of the manifest was consumed once, with the checksum that it was sent with.
- Every engine slot was filled.
- The sampler reports the new policy version.
- The probe agrees with the learner's own logprobs within rounding (`grpo.sync.probe`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypedDict

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from grpo.suggest import first_of
from grpo.sync.probe import GROUP_SIZE, POWER, RESOLUTION, STRENGTHS, Probe, Reading, Spread, group_members, spread
from grpo.types import Unchecked

BUCKET_BYTES = 256 << 20
"""Maximum size of one bucket, except for a single larger tensor. The peak extra memory of a sync is two buckets on each
side."""


CHECKSUM_WORDS = 1 << 23
CHECKSUM_BYTES = 4 * 8 * CHECKSUM_WORDS
"""A checksum on a GPU widens CHECKSUM_WORDS integers at a time, and holds four 64-bit vectors of that length."""


class WeightSyncError(RuntimeError):
    """The samplers could not be verified to hold the learner's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor on the wire, in Hugging Face names and shapes."""

    name: str
    dtype: str
    """torch's name without the prefix, e.g. "float32"."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the bucket; a multiple of 64."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * torch_dtype(self.dtype).itemsize


IpcHandle: TypeAlias = tuple[Unchecked, ...]
"""Arguments of torch's `rebuild_cuda_tensor`."""


class Location(TypedDict, total=False):
    """Location of a bucket's bytes: the entries that the transport's receiving end expects."""

    files: Mapping[str, str]
    """Node -> file in its shared memory."""
    handles: Mapping[str, IpcHandle]
    """UUID of a GPU -> buffer on it."""
    nbytes: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Description of one bucket, which a `load` call carries. The bytes travel separately."""

    tensors: tuple[TensorSpec, ...]
    checksums: tuple[int, ...]
    transport: Location


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """A sampler's report at the end of a sync."""

    policy_version: int
    consumed: Mapping[str, int]
    """Tensor name -> checksum of the data that the engine received."""
    unfilled_slots: tuple[str, ...]
    """Engine parameters that were not filled, or only partly."""
    unmapped_tensors: tuple[str, ...]
    """Tensors for which the engine has no slot."""
    probe_logprobs: tuple[NDArray[np.float32], ...]
    """[N][L_n - 1] logprob of each probe token given the preceding ones, at temperature 1."""


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def checksum(tensor: torch.Tensor) -> int:
    """Return a 64-bit checksum of the tensor's bytes: xxh3 on CPU, a position-weighted sum on CUDA.

    Both ends of a transport hold the data on the same kind of device, so they use the same checksum.
    """
    data = tensor.detach().contiguous().view(-1)
    if data.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(data.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return weighted_sum(data.view(torch.int32 if data.numel() * data.element_size() % 4 == 0 else torch.int16))


def weighted_sum(words: torch.Tensor, chunk: int = CHECKSUM_WORDS) -> int:
    """Return the sum of integers [N] modulo 2^64, each multiplied by a number that depends on its position.

    At most `chunk` of them are widened at a time.
    """
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk].to(torch.int64)
        position = torch.arange(start + 1, start + 1 + part.numel(), device=words.device)
        total += (part * (position * 2654435761 % 4294967291)).sum()
    return int(total.item()) & 0xFFFFFFFFFFFFFFFF


def buckets_of(
    tensors: Iterable[tuple[str, torch.Tensor]], limit: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Split a stream of (name, tensor) into lists of at most `limit` bytes. A larger tensor gets its own list."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and size + nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += nbytes
    if bucket:
        yield bucket


def refuse_not_finite(bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Raise WeightSyncError naming the tensors of `bucket` that hold NaN or infinities. They are not published."""
    finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in bucket]).tolist()
    wrong = [name for (name, _), fine in zip(bucket, finite, strict=True) if not fine]
    if wrong:
        raise WeightSyncError(f"the learner's weights are not finite, and are not published: {_named(wrong)}")


def specs_of(bucket: Sequence[tuple[str, torch.Tensor]]) -> tuple[TensorSpec, ...]:
    """Return specs that lay out the tensors of a bucket one after another, each on a 64-byte boundary."""
    specs, offset = [], 0
    for name, tensor in bucket:
        spec = TensorSpec(
            name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), offset=offset
        )
        specs.append(spec)
        offset += -(-spec.nbytes // 64) * 64
    return tuple(specs)


def describe(bucket: Sequence[tuple[str, torch.Tensor]], transport: Location) -> Bucket:
    """Return the description of `bucket`."""
    checksums = tuple(checksum(tensor) for _, tensor in bucket)
    return Bucket(tensors=specs_of(bucket), checksums=checksums, transport=transport)


def verify(
    *,
    report: SyncReport,
    policy_version: int,
    sent: Mapping[str, int],
    learner: Reading,
    sampler: str,
) -> Spread:
    """Compare a sampler's report with the tensors that were sent and with the learner's probe under the same weights.
    Return the difference between sampler and learner on the probe.

    Raises WeightSyncError naming the sampler, the first tensors at fault and the numbers.
    """
    if report.policy_version != policy_version:
        raise WeightSyncError(f"{sampler} echoes policy version {report.policy_version}, expected {policy_version}")
    if report.unmapped_tensors:
        raise WeightSyncError(f"{sampler} has no slot for {_named(report.unmapped_tensors)}")
    missing = [name for name in sent if name not in report.consumed]
    extra = [name for name in report.consumed if name not in sent]
    if missing or extra:
        raise WeightSyncError(f"{sampler} did not consume {_named(missing)}; consumed unannounced {_named(extra)}")
    wrong = [name for name, value in sent.items() if report.consumed[name] != value]
    if wrong:
        raise WeightSyncError(f"{sampler} received other data than was sent for {_named(wrong)} (checksum)")
    if report.unfilled_slots:
        raise WeightSyncError(f"{sampler} was left with unfilled weights: {_named(report.unfilled_slots)}")
    apart, allowed = spread(report.probe_logprobs, learner.logprobs), learner.noise.allowed()
    if not apart.within(allowed):
        raise WeightSyncError(
            f"{sampler} received every tensor but does not use them: on the probe its logprobs differ from the "
            f"learner's by {apart.q90:.3g} (90 % quantile; rounding explains {allowed.q90:.3g}) and {apart.rms:.3g} "
            f"(root mean square; {allowed.rms:.3g}); a stale packed or cached copy is the usual cause"
        )
    return apart


class ProbedLearner(Protocol):
    """Interface of a learner that the full check needs, see `grpo.learner.zero`. All methods are collectives."""

    def parameter_count(self) -> int:
        """Return the number of parameter tensors."""

    def read_probe(self, probe: Probe) -> Reading:
        """Return the probe's reading under the current weights."""

    def perturbation(self, group: int, groups: int) -> AbstractContextManager[Callable[[float], None]]:
        """Return a context that yields a function. The function perturbs a group of the parameters by a given strength,
        until the context ends."""

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the means over the ranks, identical on each rank."""


def prove(
    *, learner: ProbedLearner, before: Reading, probe: Probe, groups: int, transfer: Callable[[Reading], Spread]
) -> tuple[float, ...]:
    """Prove that samplers compute with the weights they receive: perturb each group of parameters in turn and send all
    weights each time.

    Args:
        before: the probe's reading under the unperturbed weights.
        groups: maximum number of groups that the parameters are split into; each has GROUP_SIZE or more.
        transfer: sends the current weights, verifies the samplers against the reading under these weights, and returns
            the difference between sampler and learner. The learner has its memory again when it returns.

    Returns:
        For each group, the difference between sampler and learner after the perturbation, as a share of the learner's
        movement (90 % quantiles).

    Raises:
        WeightSyncError: a sampler does not follow (from `transfer`), or the learner itself hardly moves.
    """
    groups = max(1, min(groups, learner.parameter_count() // GROUP_SIZE))
    errors: list[float] = []
    with learner.perturbation(groups // 2, groups) as perturb:  # the first and the last have vocabulary matrices
        strength = strongest(learner, before, probe, perturb)
    for group in range(groups):
        with learner.perturbation(group, groups) as perturb:
            perturb(strength)
            reading = learner.read_probe(probe)
            moved, ratio = _movement(learner, before, reading)
            if not ratio >= POWER:
                raise WeightSyncError(
                    f"the full check would prove nothing: perturbing group {group} of the parameters by {strength:g} "
                    f"of their size moves the learner's probe by {moved:.3g}, which is {ratio:.1f} times its rounding "
                    f"noise (needed {POWER:g})"
                )
            try:
                errors.append(transfer(reading).q90 / moved)
            except WeightSyncError as error:
                members = group_members(group, groups, learner.parameter_count())
                where = f"parameters {members[0]} to {members[-1]} of {learner.parameter_count()} perturbed"
                raise WeightSyncError(f"in the full check, with {where}: {error}") from error
    return tuple(errors)


def strongest(learner: ProbedLearner, before: Reading, probe: Probe, perturb: Callable[[float], None]) -> float:
    """Return the strength of STRENGTHS with the largest ratio of the learner's movement to its noise."""
    ratios: dict[float, float] = {}
    for strength in STRENGTHS:
        perturb(strength)
        ratios[strength] = _movement(learner, before, learner.read_probe(probe))[1]
    return max(ratios, key=lambda strength: ratios[strength])


def _movement(learner: ProbedLearner, before: Reading, after: Reading) -> tuple[float, float]:
    """Return the movement of the learner's probe, and its ratio to the noise; 0 for values that are not finite.

    Both are means over the ranks, so that all ranks decide alike.
    """
    moved, noise = spread(after.logprobs, before.logprobs).q90, max(after.noise.q90, RESOLUTION)
    finite = math.isfinite(moved) and math.isfinite(noise)
    mean, ratio = learner.mean([moved, moved / noise] if finite else [0.0, 0.0])
    return mean, ratio


def _named(names: Sequence[str]) -> str:
    return first_of(names, 3) or "nothing"
