"""What a sampler's workers say of a sync, put together: vLLM's layers without an engine, split over two workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from torch import nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from grpo.sampler.vllm.worker import Loaded, merge_reports, slot_size
from grpo.sync.weights import WeightSyncError

def layer(kind, **sizes):
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name, value in sizes.items():
        setattr(made, name, value)
    return made

# of each the worker holds half of the rows, or of the columns; the checkpoint's tensors are whole
model = nn.Module()
model.qkv = layer(QKVParallelLinear, input_size=16, output_size=99, head_size=8, v_head_size=8, total_num_heads=4,
                  num_heads=2, total_num_kv_heads=2, num_kv_heads=1)
model.shared = layer(QKVParallelLinear, input_size=16, output_size=64, head_size=8, v_head_size=8, total_num_heads=4,
                     num_heads=2, total_num_kv_heads=1, num_kv_heads=1)  # one head that both workers hold
model.gate_up = layer(MergedColumnParallelLinear, input_size=16, output_size=2 * 24)
model.down = layer(RowParallelLinear, input_size=24, output_size=16)
model.embed = layer(nn.Module, org_vocab_size=10)
model.norm = nn.Module()
sizes = {
    "qkv.weight": ((2 + 2) * 8, 16), "qkv.bias": ((2 + 2) * 8,), "shared.weight": ((2 + 2) * 8, 16),
    "gate_up.weight": (24, 16), "down.weight": (16, 12), "down.bias": (16,), "embed.weight": (32, 16),
    "embed.bias": (32,),
    "norm.weight": (16,),
}
found = {name: slot_size(model, name, torch.empty(*size)) for name, size in sizes.items()}
assert found == {
    "qkv.weight": (4 + 2 + 2) * 8 * 16, "qkv.bias": (4 + 2 + 2) * 8, "shared.weight": (4 + 1 + 1) * 8 * 16,
    "gate_up.weight": 2 * 24 * 16, "down.weight": 16 * 24, "down.bias": 16, "embed.weight": 10 * 16, "embed.bias": 10,
    "norm.weight": 16,
}, found

one = Loaded(consumed={"a": 1, "b": 2}, unfilled=(), unmapped=("a", "c"))
two = Loaded(consumed={"a": 1, "b": 2}, unfilled=("x",), unmapped=("c", "b"))
assert merge_reports([one]) == one
assert merge_reports([one, two]) == Loaded(consumed=one.consumed, unfilled=("x of worker 1",), unmapped=("c",))
for other in ({"a": 1, "b": 3}, {"a": 1}, {"a": 1, "b": 2, "c": 3}):
    try:
        merge_reports([one, Loaded(consumed=other, unfilled=(), unmapped=())])
    except WeightSyncError as error:
        assert "worker 1 was given other weights than worker 0" in str(error)
    else:
        raise AssertionError(other)
print("DONE")
"""


def test_slots_of_split_layers_and_reports_of_two_workers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.endswith("DONE\n"), done.stdout + done.stderr
