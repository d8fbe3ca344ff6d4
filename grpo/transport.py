"""How the bytes of a weight sync travel, and who sends them. Four ways, by layout and device:

- colocated, CPU: a memory file per node, which the samplers there map; the first learner rank of each node sends
- colocated, GPU: CUDA IPC, a sampler's worker reads the tensors on its own GPU; every learner rank sends
- disaggregated, CPU: gloo broadcast; learner rank 0 sends
- disaggregated, GPU: NCCL broadcast (`grpo.sampler.nccl_sender`); learner rank 0 sends
"""

from __future__ import annotations

import mmap
import os
import socket
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch.distributed import (  # type: ignore[attr-defined]
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)
from torch.multiprocessing.reductions import reduce_tensor

from grpo.config import Config
from grpo.types import UserError
from grpo.weight_sync import Bucket, TensorSpec, WeightSyncError, describe, specs_of, torch_dtype


def transport_of(config: Config) -> str:
    """The name of the run's way."""
    if config.cluster.layout == "colocated":
        return "ipc" if config.on_gpu else "shared_memory"
    return "nccl" if config.on_gpu else "gloo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process is."""

    node: str
    """Ray's id of the node."""
    host: str
    """Its address."""
    gpus: tuple[str, ...]
    """UUIDs of the GPUs that the process uses."""

    def ends(self, transport: str) -> tuple[str, ...]:
        """What the transport's reach is counted in: the node, or each GPU."""
        return self.gpus if transport == "ipc" else (self.node,)


def senders(transport: str, ranks: Sequence[Place], samplers: Sequence[Place]) -> list[int]:
    """The learner ranks that send, rank 0 always first.

    Raises UserError naming a sampler that no rank reaches: shared memory ends at the node, CUDA IPC at the GPU.
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
                    f"Ray placed sampler {i} on {where}, where no learner rank is, and cluster.layout=colocated "
                    "brings weights no further; use cluster.layout=disaggregated, or a learner rank per sampler"
                )
            needed.add(first_at[end])
    return sorted(needed)


def interface_of(host: str) -> str:
    """The network interface that holds the address `host`: gloo and NCCL choose another one where they are not told.

    Raises RuntimeError where there is none.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if host in (address.address.partition("%")[0] for address in addresses):
            return name
    raise RuntimeError(f"no network interface of this node has Ray's address {host}")


def open_store(host: str, world_size: int, timeout_s: float) -> TCPStore:
    """A rendezvous on a port that the system chose; its number is `.port`. It listens on `host` alone, where torch by
    itself would listen everywhere."""
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    return TCPStore(
        host, port, world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip


def join_store(host: str, port: int, world_size: int, timeout_s: float) -> TCPStore:
    """The others' end of it."""
    return TCPStore(host, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s))


class Sender(Protocol):
    """A learner rank's end of a transport."""

    def init_info(self, sampler: int, place: Place) -> dict[str, Any]:
        """What sampler number `sampler` must be told before the first sync."""
        ...

    def connect(self) -> None:
        """Open the learner's end while the samplers open theirs."""
        ...

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Make `tensors` available and describe them. The ones before must have been consumed."""
        ...

    def transmit(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Send the bytes while the samplers receive, where the transport is a collective."""
        ...


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """What several ranks have packed, as one: each sampler finds its own node's or GPU's part in it.

    Raises WeightSyncError when the ranks do not hold the same weights.
    """
    first = buckets[0]
    for rank, other in enumerate(buckets):
        for spec, ours, theirs in zip(first.tensors, first.checksums, other.checksums, strict=True):
            if ours != theirs:
                raise WeightSyncError(f"sending rank {rank} of the learner holds another {spec.name} than rank 0")
    transport = dict(first.transport)
    if "files" in transport:
        transport["files"] = {node: file for b in buckets for node, file in b.transport["files"].items()}
    if "ipc_handles" in transport:
        each = zip(*(b.transport["ipc_handles"] for b in buckets), strict=True)
        transport["ipc_handles"] = [{gpu: args for part in parts for gpu, args in part.items()} for parts in each]
    return replace(first, transport=transport)


class IpcSender:
    """CUDA IPC handles for vLLM's `ipc` engine: the sampler's worker shares this GPU and reads the tensors in place."""

    def __init__(self) -> None:
        self._alive: list[torch.Tensor] = []

    def init_info(self, sampler: int, place: Place) -> dict[str, Any]:
        return {}

    def connect(self) -> None:
        """Handles need no rendezvous."""

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """The handles stay valid until the next call."""
        self._alive = [tensor.detach().contiguous() for _, tensor in tensors]
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = [{uuid: reduce_tensor(tensor)[1]} for tensor in self._alive]  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().synchronize()
        return describe(tensors, vllm_fields(tensors) | {"ipc_handles": handles})

    def transmit(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """The receiver reads; nothing is sent."""


class SharedMemorySender:
    """Puts buckets into an anonymous memory file that other processes of this user map through /proc.

    The file has no name in any file system: the kernel frees it with the last process that maps it, however that
    process dies.
    """

    def __init__(self, node: str) -> None:
        """`node`: this process's, by which the samplers beside it know their file."""
        self._node = node
        self._fd = os.memfd_create("grpo-weights")
        weakref.finalize(self, os.close, self._fd)  # a replaced sampler brings another sender
        self._size = 0
        self._map: mmap.mmap | None = None

    def init_info(self, sampler: int, place: Place) -> dict[str, Any]:
        return {"node": place.node}

    def connect(self) -> None:
        """Shared memory needs no rendezvous."""

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Copy `tensors` in and describe them. The receiver must be done with the ones before."""
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

    def transmit(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """The receiver reads; nothing is sent."""


class GlooSender:
    """Broadcasts buckets from CPU to CPU over the network, to every worker of every sampler."""

    def __init__(self, host: str, workers: int, samplers: int, timeout_s: float) -> None:
        """`workers`: processes of one sampler."""
        self._workers, self._size, self._timeout = workers, 1 + workers * samplers, timeout_s
        self._host, self._store = host, open_store(host, self._size, timeout_s)
        self._group: Any = None

    def init_info(self, sampler: int, place: Place) -> dict[str, Any]:
        return {
            "host": self._host,
            "port": self._store.port,
            "rank_offset": 1 + sampler * self._workers,
            "world_size": self._size,
            "timeout_s": self._timeout,
        }

    def connect(self) -> None:
        """Returns when every worker has joined."""
        self._group = gloo_group(self._store, 0, self._size, self._timeout)

    def pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Announce the tensors; the bytes follow in `transmit`."""
        specs = specs_of(tensors)
        return describe(tensors, {"nbytes": size_of(specs), "tensors": specs})

    def transmit(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        specs = specs_of(tensors)
        flat = torch.empty(size_of(specs), dtype=torch.uint8)
        lay_out(flat, specs, tensors)
        broadcast(self._group, flat)


def gloo_group(store: Store, rank: int, size: int, timeout_s: float) -> Any:
    """A process group of its own, beside whatever group the process is already in."""
    return ProcessGroupGloo(PrefixStore("weights", store), rank, size, timedelta(seconds=timeout_s))


def broadcast(group: Any, flat: torch.Tensor) -> None:
    """From rank 0 to all of `group`."""
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([flat], options).wait()


def vllm_fields(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """What vLLM's own CUDA engines are told of a bucket."""
    return {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


def size_of(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a bucket."""
    return max(1, specs[-1].offset + specs[-1].nbytes)


def lay_out(flat: torch.Tensor, specs: Sequence[TensorSpec], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Copy `tensors` to their places in `flat` [bytes]."""
    for spec, (_, tensor) in zip(specs, tensors, strict=True):
        cut(flat, spec).copy_(tensor.detach())


def cut(flat: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The part of `flat` [bytes] that is the tensor of `spec`, in its shape; no copy."""
    return flat[spec.offset : spec.offset + spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)


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


def network_environment(host: str) -> Mapping[str, str]:
    """What keeps gloo, NCCL and vLLM on the interface of Ray's address `host`; what the user has set stays."""
    interface = interface_of(host)
    found = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "VLLM_HOST_IP": host}
    return {name: value for name, value in found.items() if name not in os.environ}
