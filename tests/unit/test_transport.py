"""How buckets travel, between processes of this machine, and which rank of the learner reaches which sampler."""

from __future__ import annotations

import dataclasses
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from grpo.sync import transport
from grpo.sync.transport import (
    BroadcastSender,
    IpcReceiver,
    IpcSender,
    Place,
    SharedMemorySender,
    broadcast,
    broadcast_group,
    finish,
    interface_of,
    join_store,
    joined,
    read_shared_memory,
    senders,
    tensor_view,
)
from grpo.sync.weights import WeightSyncError, checksum
from grpo.types import UserError

CPU = torch.device("cpu")


def tensors(scale: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", scale * torch.randn(3, 5, generator=generator)),
        ("b", scale * torch.randn(7, generator=generator).bfloat16()),
        ("c", scale * torch.randn(2, 2, 2, generator=generator)),
    ]


def same(sent: list[tuple[str, torch.Tensor]], got: list[tuple[str, torch.Tensor]]) -> bool:
    return all(
        name == other and tensor.dtype == copy.dtype and torch.equal(tensor, copy)
        for (name, tensor), (other, copy) in zip(sent, got, strict=True)
    )


def test_shared_memory_carries_every_bit_and_is_reused() -> None:
    sender = SharedMemorySender("node")
    for scale in (1.0, -3.0):
        bucket = sender.pack(tensors(scale))
        file, nbytes = bucket.transport["files"]["node"], bucket.transport["nbytes"]
        got = read_shared_memory(file, nbytes, bucket.transport["tensors"])
        sender.pack(tensors(0.0))  # reuse must not reach what was read
        assert same(tensors(scale), got)
        assert [checksum(tensor) for _, tensor in got] == list(bucket.checksums)


def test_a_sender_that_is_gone_holds_no_memory() -> None:
    sender = SharedMemorySender("node")
    file = sender.pack(tensors()).transport["files"]["node"]
    assert Path(file).resolve().name.startswith("memfd:grpo-weights")
    del sender
    assert not Path(file).exists()


def test_gloo_carries_every_bit_to_every_worker() -> None:
    """Two samplers of two workers each, as threads."""
    sender = BroadcastSender("127.0.0.1", 2, 2, 60.0, CPU)

    def worker(sampler: int, worker: int) -> list[list[tuple[str, torch.Tensor]]]:
        info = sender.init_info(sampler, Place(node="n", host="127.0.0.1", gpus=()))
        store = join_store(info["host"], info["port"], info["world_size"], 60.0)
        group = broadcast_group(CPU, store, info["rank_offset"] + worker, info["world_size"], 60.0)
        out = []
        for _ in range(2):
            flat = torch.empty(bucket.transport["nbytes"], dtype=torch.uint8)
            finish(broadcast(group, flat), 60.0)
            out.append([(spec.name, tensor_view(flat, spec)) for spec in bucket.transport["tensors"]])
        return out

    bucket = sender.pack(tensors())
    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(worker, i, j) for i in range(2) for j in range(2)]
        sender.connect()
        for scale in (1.0, -3.0):
            sender.transmit(tensors(scale))
            sender.transmitted()
        found = [done.result(timeout=60) for done in workers]
    for first, second in found:
        assert same(tensors(), first)
        assert same(tensors(-3.0), second)


class Driver:
    """What torch's CUDA IPC does, on CPU: an export is a tuple of which argument 6 is the device, a mapping a view of
    the exporter's memory. It counts both, since memory is freed only when each export was mapped and unmapped once."""

    def __init__(self) -> None:
        self.memory: dict[int, weakref.ref[torch.Tensor]] = {}
        self.mapped: list[int] = []
        self.unmapped: list[int] = []

    def reduce_tensor(self, tensor: torch.Tensor) -> tuple[None, tuple[object, ...]]:
        number = len(self.memory)
        self.memory[number] = weakref.ref(tensor)
        return None, ("tensor", (tensor.numel(),), (1,), 0, "storage", tensor.dtype, 5, number, False)

    def rebuild_cuda_tensor(self, *handle: object) -> torch.Tensor:
        assert handle[6] == 3  # the receiver's own number of the device
        number = handle[7]
        assert isinstance(number, int)
        exported = self.memory[number]()
        assert exported is not None
        view = exported[:]
        self.mapped.append(number)
        weakref.finalize(view, self.unmapped.append, number)
        return view


def test_cuda_ipc_exports_one_buffer_and_shares_nothing_of_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of several syncs, a larger one after them. What was read survives the next bucket: vLLM holds tensors of
    a padded vocabulary until the end of the sync."""
    driver = Driver()
    monkeypatch.setattr(transport, "reduce_tensor", driver.reduce_tensor)
    monkeypatch.setattr(transport, "rebuild_cuda_tensor", driver.rebuild_cuda_tensor)
    monkeypatch.setattr(transport, "BUCKET_BYTES", 256)
    sender, receiver = IpcSender("gpu-a", CPU), IpcReceiver(3)
    read: list[tuple[float, list[tuple[str, torch.Tensor]]]] = []

    def send(scale: float, extra: int = 0) -> None:
        given = tensors(scale) + ([("embedding", torch.full((extra,), scale))] if extra else [])
        bucket = sender.pack(given)
        sender.transmit(given)
        read.append((scale, receiver.read(bucket.transport["handles"]["gpu-a"], bucket.transport["tensors"])))
        assert [checksum(tensor) for _, tensor in read[-1][1]] == list(bucket.checksums)
        sender.transmitted()
        held = [weakref.ref(tensor) for _, tensor in given]
        del given
        assert [reference() for reference in held] == [None] * len(held)  # the learner's memory can go

    for scale in (1.0, 2.0, 3.0):
        send(scale)
    assert (len(driver.memory), driver.mapped, driver.unmapped) == (1, [0], [])
    send(4.0, extra=1000)
    send(5.0, extra=1000)
    assert (len(driver.memory), driver.mapped, driver.unmapped) == (2, [0, 1], [0])
    assert driver.memory[0]() is None  # freed: it was mapped once and unmapped once
    for scale, got in read:
        assert same(tensors(scale), got[:3])


def place(node: str, *gpus: str) -> Place:
    return Place(node=node, host=f"host of {node}", gpus=gpus)


def test_the_first_rank_of_each_node_sends_where_memory_is_shared() -> None:
    ranks = [place("n1"), place("n1"), place("n2"), place("n2"), place("n3")]
    assert senders("shared_memory", ranks, [place("n1"), place("n1")]) == [0]
    assert senders("shared_memory", ranks, [place("n2"), place("n1"), place("n2")]) == [0, 2]
    assert senders("shared_memory", ranks, [place("n3")]) == [0, 4]  # rank 0 gives the commands
    assert senders("gloo", ranks, [place("n9")]) == senders("nccl", ranks, [place("n9")]) == [0]


def test_every_rank_sends_to_its_own_gpu() -> None:
    ranks = [place("n1", "A"), place("n1", "B"), place("n2", "C"), place("n2", "D")]
    assert senders("ipc", ranks, [place("n1", "A", "B"), place("n2", "C", "D")]) == [0, 1, 2, 3]
    assert senders("ipc", ranks, [place("n1", "B")]) == [0, 1]


def test_samplers_out_of_reach_are_named() -> None:
    with pytest.raises(UserError, match=r"sampler 1 on node host of n2, which has no learner rank"):
        senders("shared_memory", [place("n1")], [place("n1"), place("n2")])
    with pytest.raises(UserError, match=r"sampler 0 on GPU B, which has no learner rank"):
        senders("ipc", [place("n1", "A")], [place("n1", "A", "B")])


def test_what_ranks_pack_is_joined() -> None:
    one, two = (SharedMemorySender(node).pack(tensors()) for node in ("n1", "n2"))
    assert joined([one, two]).transport["files"].keys() == {"n1", "n2"}
    assert joined([one, two]).checksums == one.checksums
    other = SharedMemorySender("n2").pack([*tensors()[:2], ("c", torch.zeros(2, 2, 2))])
    with pytest.raises(WeightSyncError, match=r"rank 1 of the learner has another c than rank 0"):
        joined([one, other])
    handles = [dataclasses.replace(one, transport={"handles": {gpu: (gpu, 1)}}) for gpu in ("A", "B")]
    assert joined(handles).transport["handles"] == {"A": ("A", 1), "B": ("B", 1)}


def test_the_interface_is_the_one_with_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET" and address.address != "127.0.0.1":
                assert interface_of(address.address) == name
    with pytest.raises(RuntimeError, match=r"no network interface of this node has Ray's address 192\.0\.2\.77"):
        interface_of("192.0.2.77")
