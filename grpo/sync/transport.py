"""Transports: how the bytes of a weight sync travel, and which ranks send them. The layout and device select one:

- colocated, CPU: a memory file per node, which the samplers there map; the first learner rank of each node sends
- colocated, GPU: a buffer per GPU, which a sampler's worker there maps through CUDA IPC; all learner ranks send
- disaggregated, CPU: gloo broadcast; learner rank 0 sends
- disaggregated, GPU: NCCL broadcast; learner rank 0 sends

The receiving ends are in `grpo.sampler.vllm.transfer`.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import psutil
import torch
from torch.distributed import (  # type: ignore[attr-defined]
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
    Work,
)
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from grpo.config import Config
from grpo.sync.weights import (
    BUCKET_BYTES,
    Bucket,
    IpcHandle,
    Location,
    TensorSpec,
    WeightSyncError,
    describe,
    specs_of,
    torch_dtype,
)
from grpo.types import Json, UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupNCCL  # torch's CPU build lacks it

Group: TypeAlias = "ProcessGroupGloo | ProcessGroupNCCL"
Rendezvous = TCPStore

POLL_S = 0.001
"""Polling interval for the end of a broadcast."""


def transport_of(config: Config) -> str:
    """Return the name of the run's transport."""
    if config.cluster.layout == "colocated":
        return "ipc" if config.on_gpu else "shared_memory"
    return "nccl" if config.on_gpu else "gloo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Location of a process."""

    node: str
    """Ray's id of the node."""
    host: str
    """Address of the node."""
    gpus: tuple[str, ...]
    """UUIDs of the GPUs that the process uses."""

    def ends(self, transport: str) -> tuple[str, ...]:
        """Return the ids that bound the transport's reach: those of the GPUs for "ipc", else the node's."""
        return self.gpus if transport == "ipc" else (self.node,)


def senders(transport: str, ranks: Sequence[Place], samplers: Sequence[Place]) -> list[int]:
    """Return the learner ranks that send. Rank 0 always comes first.

    Raises UserError naming a sampler that no rank reaches: shared memory stays within a node, CUDA IPC within a GPU.
    """
    if transport not in ("shared_memory", "ipc"):
        return [0]
    first_at: dict[str, int] = {}
    for rank, place in enumerate(ranks):
        for end in place.ends(transport):
            first_at.setdefault(end, rank)
    needed = {0}
    for i, place in enumerate(samplers):
        for end in place.ends(transport):
            if end not in first_at:
                where = f"GPU {end}" if transport == "ipc" else f"node {place.host}"
                raise UserError(
                    f"Ray placed sampler {i} on {where}, which has no learner rank, and cluster.layout=colocated "
                    "sends weights no further; use cluster.layout=disaggregated, or a learner rank per sampler"
                )
            needed.add(first_at[end])
    return sorted(needed)


def interface_of(host: str) -> str:
    """Return the network interface with the address `host`. By default gloo and NCCL may choose another one.

    Raises RuntimeError if no interface has it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if host in (address.address.partition("%")[0] for address in addresses):
            return name
    raise RuntimeError(f"no network interface of this node has Ray's address {host}")


def open_store(host: str, world_size: int, timeout_s: float) -> Rendezvous:
    """Open a rendezvous on a port that the system chooses; `.port` is its number.

    It listens on `host` only. By default torch would listen on all addresses.
    """
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    return TCPStore(
        host, port, world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip


def join_store(host: str, port: int, world_size: int, timeout_s: float) -> Rendezvous:
    """Join the rendezvous that `open_store` opened."""
    return TCPStore(host, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s))


class Sender(Protocol):
    """A learner rank's end of a transport.

    A sender whose memory the receivers map inherits from it and overrides `init_info` and `pack`: there is nothing to
    connect, to transmit or to abort.
    """

    def init_info(self, sampler: int, place: Place) -> Mapping[str, Json]:
        """Return the arguments that sampler number `sampler` needs to open its end before the first sync."""

    def connect(self) -> None:
        """Open the learner's end while the samplers open theirs."""
        return

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Make `tensors` available and describe them. The previous bucket must have been consumed."""

    def transmit(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Begin to send the bytes while the samplers receive, if the transport is a collective."""
        return

    def transmitted(self) -> None:
        """Wait for the end of `transmit`. Raises RuntimeError if it failed."""
        return

    def abort(self) -> None:
        """Abort a `transmit` that some samplers do not take part in. Nothing can be sent afterwards."""
        return


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """Merge the buckets that several ranks packed. Each sampler finds the part of its own node or GPU in the result.

    Raises WeightSyncError if the ranks do not hold the same weights.
    """
    first = buckets[0]
    for rank, other in enumerate(buckets):
        for spec, ours, theirs in zip(first.tensors, first.checksums, other.checksums, strict=True):
            if ours != theirs:
                raise WeightSyncError(f"sending rank {rank} of the learner has another {spec.name} than rank 0")
    transport: Location = {**first.transport}
    if "files" in transport:
        transport["files"] = {node: file for b in buckets for node, file in b.transport["files"].items()}
    if "handles" in transport:
        transport["handles"] = {gpu: handle for b in buckets for gpu, handle in b.transport["handles"].items()}
    return replace(first, transport=transport)


class IpcSender(Sender):
    """A buffer on this rank's GPU. The sampler's worker there maps it through CUDA IPC and copies each bucket from it.

    The buffer is exported once for the whole run: torch counts one mapping for each export, and memory that was
    exported more often than mapped is never freed. None of the learner's other memory is shared, so all of it can be
    offloaded when the last bucket has been consumed.
    """

    def __init__(self, gpu: str, device: torch.device) -> None:
        """`gpu`: UUID of the GPU `device`."""
        self._gpu, self._device = gpu, device
        self._flat: torch.Tensor | None = None
        self._handle: IpcHandle = ()

    def init_info(self, sampler: int, place: Place) -> Mapping[str, Json]:
        return {}

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Copy `tensors` into the buffer and describe them. The receiver must have copied the previous bucket."""
        specs = specs_of(tensors)
        nbytes = size_of(specs)
        if self._flat is None or self._flat.numel() < nbytes:
            self._flat = None  # freed when the receiver maps the next one; the largest tensor usually comes early
            self._flat = torch.empty(max(nbytes, BUCKET_BYTES), dtype=torch.uint8, device=self._device)
            self._handle = reduce_tensor(self._flat)[1]  # type: ignore[no-untyped-call]
        lay_out(self._flat, specs, tensors)
        settle(self._flat)
        return describe(tensors, {"handles": {self._gpu: self._handle}, "tensors": specs})


class IpcReceiver:
    """A worker's view of the `IpcSender`'s buffer on its GPU."""

    def __init__(self, device_index: int) -> None:
        self._index = device_index
        self._handle: IpcHandle = ()
        self._flat: torch.Tensor | None = None

    def read(self, handle: IpcHandle, tensors: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
        """Return copies of the tensors of a bucket.

        They must be copies because the sender reuses the buffer, and vLLM keeps tensors of layers that it has not fully
        received (with a padded vocabulary, until the end of the sync).
        """
        if self._flat is None or handle != self._handle:
            self._flat = None  # unmaps the previous buffer
            # argument 6 of `rebuild_cuda_tensor` is the device index: the sender's is replaced by the receiver's
            self._flat = rebuild_cuda_tensor(*handle[:6], self._index, *handle[7:])  # type: ignore[call-arg, no-untyped-call]
            self._handle = handle
        assert self._flat is not None
        copies = [(spec.name, tensor_view(self._flat, spec).clone()) for spec in tensors]
        settle(self._flat)
        return copies


class SharedMemorySender(Sender):
    """Writes buckets into an anonymous memory file that other processes of this user map through /proc.

    The file has no name in any file system. The kernel frees it when the last process that maps it has ended, even if
    that process crashes.
    """

    def __init__(self, node: str) -> None:
        """`node`: this process's node, by which the samplers on it find their file."""
        self._node = node
        self._fd = os.memfd_create("grpo-weights")
        weakref.finalize(self, os.close, self._fd)  # replacing a sampler creates a new sender
        self._size = 0
        self._map: mmap.mmap | None = None

    def init_info(self, sampler: int, place: Place) -> Mapping[str, Json]:
        return {"node": place.node}

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Copy `tensors` into the file and describe them. The receiver must have consumed the previous bucket."""
        specs = specs_of(tensors)
        nbytes = size_of(specs)
        if nbytes > self._size:
            os.ftruncate(self._fd, nbytes)
            self._map = mmap.mmap(self._fd, nbytes)
            self._size = nbytes
        assert self._map is not None
        lay_out(torch.frombuffer(self._map, dtype=torch.uint8), specs, tensors)
        files = {self._node: f"/proc/{os.getpid()}/fd/{self._fd}"}
        return describe(tensors, {"files": files, "nbytes": nbytes, "tensors": specs})


class BroadcastSender:
    """Broadcasts buckets over the network to all workers of all samplers: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, host: str, workers: int, samplers: int, timeout_s: float, device: torch.device) -> None:
        """`workers`: number of worker processes of one sampler. `device`: device of the tensors on both ends."""
        self._workers, self._size, self._timeout = workers, 1 + workers * samplers, timeout_s
        self._host, self._store = host, open_store(host, self._size, timeout_s)
        self._device = device
        self._group: Group | None = None
        self._sending: Work

    def init_info(self, sampler: int, place: Place) -> Mapping[str, Json]:
        return {
            "host": self._host,
            "port": self._store.port,
            "rank_offset": 1 + sampler * self._workers,
            "world_size": self._size,
            "timeout_s": self._timeout,
        }

    def connect(self) -> None:
        """Create the group. Return when all workers have joined."""
        self._group = broadcast_group(self._device, self._store, 0, self._size, self._timeout)

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Announce the tensors; the bytes follow in `transmit`."""
        specs = specs_of(tensors)
        return describe(tensors, {"nbytes": size_of(specs), "tensors": specs})

    def transmit(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        specs = specs_of(tensors)
        flat = torch.empty(size_of(specs), dtype=torch.uint8, device=self._device)
        lay_out(flat, specs, tensors)
        assert self._group is not None, "transmit before connect"
        self._sending = broadcast(self._group, flat)

    def transmitted(self) -> None:
        finish(self._sending, self._timeout)

    def abort(self) -> None:
        if self._group is not None:
            self._group.abort()


def broadcast_group(device: torch.device, store: Store, rank: int, size: int, timeout_s: float) -> Group:
    """Return a new process group, separate from any group that the process is already in, once all ranks have joined.

    NCCL joins ranks only at the first collective. One is run here, so that this wait has a timeout.
    """
    prefix, timeout = PrefixStore("weights", store), timedelta(seconds=timeout_s)
    if device.type == "cpu":
        return ProcessGroupGloo(prefix, rank, size, timeout)
    from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415 - torch's CPU build lacks it

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = ProcessGroupNCCL(prefix, rank, size, options)
    finish(broadcast(group, torch.zeros(1, dtype=torch.uint8, device=device)), timeout_s)
    return group


def broadcast(group: Group, flat: torch.Tensor) -> Work:
    """Begin to send `flat` from rank 0 to all ranks of `group`. The result keeps the memory alive."""
    options = BroadcastOptions()
    options.rootRank = 0
    work: Work = group.broadcast([flat], options)  # type: ignore[union-attr] # torch's stubs lack the method
    return work


def finish(work: Work, timeout_s: float) -> None:
    """Wait for a collective by polling. With NCCL, `wait` would block the stream, and all later work on it, for as long
    as another rank is missing.

    Raises RuntimeError if the collective failed or has not ended in time.
    """
    deadline = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"a broadcast of weights has not ended in {timeout_s:.0f} s")
        time.sleep(POLL_S)
    work.wait()


def settle(tensor: torch.Tensor) -> None:
    """Wait until pending reads and writes of `tensor` on its device have completed."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def size_of(specs: Sequence[TensorSpec]) -> int:
    """Return the size of a bucket in bytes."""
    return max(1, specs[-1].offset + specs[-1].nbytes)


def lay_out(flat: torch.Tensor, specs: Sequence[TensorSpec], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Copy `tensors` to their offsets in `flat` [bytes]."""
    for spec, (_, tensor) in zip(specs, tensors, strict=True):
        tensor_view(flat, spec).copy_(tensor.detach())


def tensor_view(flat: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the tensor of `spec` as a view of `flat` [bytes], in its shape and dtype."""
    return flat[spec.offset : spec.offset + spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)


def read_shared_memory(file: str, nbytes: int, tensors: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """Return copies of the tensors of a bucket. The sender reuses the memory for the next bucket."""
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), nbytes, access=mmap.ACCESS_READ) as view:
        data = np.frombuffer(view, dtype=np.uint8)
        out = []
        for spec in tensors:
            raw = torch.from_numpy(data[spec.offset : spec.offset + spec.nbytes].copy())
            out.append((spec.name, raw.view(torch_dtype(spec.dtype)).view(spec.shape)))
        del data
    return out


def network_environment(host: str) -> Mapping[str, str]:
    """Return the variables that keep gloo, NCCL and vLLM on the interface of Ray's address `host`, except those that
    the user has set."""
    interface = interface_of(host)
    found = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "VLLM_HOST_IP": host}
    return {name: value for name, value in found.items() if name not in os.environ}
