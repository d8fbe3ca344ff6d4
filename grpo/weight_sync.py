"""How weights travel from the learner to the samplers: buckets, checksums and the probe that proves they arrived.

Owns the protocol and the shared-memory transport for CPU; engine code stays in `grpo.sampler` and `grpo.learner`.

One sync is one transaction on every sampler, commanded by learner rank 0:

    begin(manifest)        names, shapes and dtypes to come, and the new policy version
    load(bucket) ...       size-capped; a checksum per tensor is taken on the data where the engine consumes it
    finish() -> report     reload ended, every cache dropped, logprobs of the probe under the weights now in use

The sync holds only if every tensor of the manifest was consumed once with the checksum it was sent with, every engine
slot was filled, the version came back, and the probe agrees with the learner's own logprobs (design invariant 3).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.multiprocessing.reductions import reduce_tensor

BUCKET_BYTES = 256 << 20
"""Logical size of one bucket. Peak extra memory of a sync is two of them on either side."""

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest |learner - sampler| logprob on the probe. bfloat16 kernels of two engines differ by some 1e-2 per token."""


class WeightSyncError(RuntimeError):
    """The samplers do not verifiably hold the learner's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor on the wire, in Hugging Face names and shapes."""

    name: str
    dtype: str
    """torch's name without the prefix, e.g. "float32"."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of its bucket; a multiple of 64."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What one `load` call carries besides the bytes themselves."""

    tensors: tuple[TensorSpec, ...]
    checksums: tuple[int, ...]
    transport: Mapping[str, Any]
    """Where the bytes are: {"file", "nbytes"} in shared memory, or the payload of vLLM's own engine on CUDA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Fixed tokens whose logprobs are compared after every sync."""

    token_ids: tuple[tuple[int, ...], ...]
    """[N][L_n], L_n >= 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sampler says when a sync has ended."""

    policy_version: int
    consumed: Mapping[str, int]
    """Tensor name -> checksum of the data that the engine was given."""
    unfilled_slots: tuple[str, ...]
    """Engine parameters that nothing was loaded into, or only partly."""
    unmapped_tensors: tuple[str, ...]
    """Tensors that the engine loaded nowhere."""
    probe_logprobs: tuple[NDArray[np.float32], ...]
    """[N][L_n - 1] logprob of each probe token given those before it, temperature 1."""


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def checksum(tensor: torch.Tensor) -> int:
    """64-bit checksum of the tensor's bytes: xxh3 on CPU, on CUDA a position-weighted sum computed in place.

    Both sides of one transport hold the data on the same kind of device, so they take the same one.
    """
    data = tensor.detach().contiguous().view(-1)
    if data.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(data.view(torch.uint8).numpy())  # type: ignore[arg-type]
    words = data.view(torch.int32 if data.numel() * data.element_size() % 4 == 0 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), 1 << 26):
        part = words[start : start + (1 << 26)].to(torch.int64)
        position = torch.arange(start + 1, start + 1 + part.numel(), device=words.device)
        total += (part * (position * 2654435761 % 4294967291)).sum()
    return int(total.item()) & 0xFFFFFFFFFFFFFFFF


def buckets_of(
    tensors: Iterable[tuple[str, torch.Tensor]], limit: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Cut a stream of (name, tensor) into lists of at most `limit` bytes; a larger tensor goes alone."""
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
    """Raises WeightSyncError naming the tensors of `bucket` that hold NaN or infinities: nothing such is published."""
    finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in bucket]).tolist()
    wrong = [name for (name, _), fine in zip(bucket, finite, strict=True) if not fine]
    if wrong:
        raise WeightSyncError(f"the learner's weights are not finite, and are not published: {_some(wrong)}")


def specs_of(bucket: Sequence[tuple[str, torch.Tensor]]) -> tuple[TensorSpec, ...]:
    """Lay the tensors of a bucket out behind each other, each on a 64-byte boundary."""
    specs, offset = [], 0
    for name, tensor in bucket:
        spec = TensorSpec(
            name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), offset=offset
        )
        specs.append(spec)
        offset += -(-spec.nbytes // 64) * 64
    return tuple(specs)


def describe(bucket: Sequence[tuple[str, torch.Tensor]], transport: Mapping[str, Any]) -> Bucket:
    """The message that goes with `bucket`; for vLLM's CUDA engines `transport` is completed with their field names."""
    specs = specs_of(bucket)
    if "file" not in transport:
        transport = {
            "names": [spec.name for spec in specs],
            "dtype_names": [spec.dtype for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
            **transport,
        }
    return Bucket(tensors=specs, checksums=tuple(checksum(tensor) for _, tensor in bucket), transport=transport)


class Sender(Protocol):
    """The learner's end of a transport."""

    def init_info(self, sampler: int) -> dict[str, Any]:
        """What sampler number `sampler` must be told before the first sync."""
        ...

    def connect(self) -> None:
        """Open the learner's end while the samplers open theirs."""
        ...

    def pack(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Make `bucket` available and describe it. The one before must have been consumed."""
        ...

    def transmit(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Send the bytes while the samplers receive, where the transport is a collective."""
        ...


class IpcSender:
    """CUDA IPC handles for vLLM's `ipc` engine: the sampler shares this GPU and reads the tensors in place."""

    def __init__(self) -> None:
        self._alive: list[torch.Tensor] = []

    def init_info(self, sampler: int) -> dict[str, Any]:
        return {}

    def connect(self) -> None:
        """Handles need no rendezvous."""

    def pack(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """The handles stay valid until the next call."""
        self._alive = [tensor.detach().contiguous() for _, tensor in bucket]
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = [{uuid: reduce_tensor(tensor)[1]} for tensor in self._alive]  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().synchronize()
        return describe(bucket, transport={"ipc_handles": handles})

    def transmit(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """The receiver reads; nothing is sent."""


class SharedMemorySender:
    """Puts buckets into an anonymous memory file that other processes of this user map through /proc.

    The file has no name in any file system: the kernel frees it with the last process that maps it, however that
    process dies.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("grpo-weights")
        self._size = 0
        self._map: mmap.mmap | None = None

    def pack(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Copy `bucket` in and describe it. The receiver must be done with it before the next call."""
        specs = specs_of(bucket)
        nbytes = max(1, specs[-1].offset + specs[-1].nbytes)
        if nbytes > self._size:
            os.ftruncate(self._fd, nbytes)
            self._map = mmap.mmap(self._fd, nbytes)
            self._size = nbytes
        assert self._map is not None
        flat = torch.frombuffer(self._map, dtype=torch.uint8)
        for spec, (_, tensor) in zip(specs, bucket, strict=True):
            place = flat[spec.offset : spec.offset + spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)
            place.copy_(tensor.detach())
        return describe(bucket, transport={"file": f"/proc/{os.getpid()}/fd/{self._fd}", "nbytes": nbytes})

    def init_info(self, sampler: int) -> dict[str, Any]:
        return {}

    def connect(self) -> None:
        """Shared memory needs no rendezvous."""

    def transmit(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """The receiver reads; nothing is sent."""


def read_shared_memory(file: str, nbytes: int, tensors: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket as copies, since the sender reuses the memory for the next one."""
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), nbytes, access=mmap.ACCESS_READ) as view:
        data = np.frombuffer(view, dtype=np.uint8)
        out = []
        for spec in tensors:
            raw = torch.from_numpy(data[spec.offset : spec.offset + spec.nbytes].copy())
            out.append((spec.name, raw.view(torch_dtype(spec.dtype)).view(spec.shape)))
        del data
    return out


def verify(
    *,
    report: SyncReport,
    policy_version: int,
    sent: Mapping[str, int],
    learner_logprobs: Sequence[NDArray[np.float32]],
    tolerance: float,
    sampler: str,
) -> float:
    """Hold a sampler's report against what was sent. Returns the largest |learner - sampler| probe logprob.

    Raises WeightSyncError naming the sampler, the first tensors at fault and the numbers.
    """
    if report.policy_version != policy_version:
        raise WeightSyncError(f"{sampler} echoes policy version {report.policy_version}, expected {policy_version}")
    if report.unmapped_tensors:
        raise WeightSyncError(f"{sampler} has no slot for {_some(report.unmapped_tensors)}")
    missing = [name for name in sent if name not in report.consumed]
    extra = [name for name in report.consumed if name not in sent]
    if missing or extra:
        raise WeightSyncError(f"{sampler} did not consume {_some(missing)}; consumed unannounced {_some(extra)}")
    wrong = [name for name, value in sent.items() if report.consumed[name] != value]
    if wrong:
        raise WeightSyncError(f"{sampler} received other data than was sent for {_some(wrong)} (checksum)")
    if report.unfilled_slots:
        raise WeightSyncError(f"{sampler} was left with unfilled weights: {_some(report.unfilled_slots)}")
    worst = probe_difference(report.probe_logprobs, learner_logprobs)
    if not worst <= tolerance:
        raise WeightSyncError(
            f"{sampler} received every tensor but does not use them: its logprobs on the probe differ from the "
            f"learner's by up to {worst:.3g} (allowed {tolerance:g}); a stale packed or cached copy is the usual cause"
        )
    return worst


def probe_difference(a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]]) -> float:
    """Largest absolute difference; NaN counts as infinitely different."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        difference = float(np.abs(x - y).max())
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
