"""Bytes of the plan that no engine shows on a CPU: by hand, and against the code that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_plan import config_of
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo.learner.probe import Perturbation
from grpo.planning.estimate import Lengths, estimate
from grpo.planning.memory import (
    PERTURB_ELEMENT,
    Parts,
    learner_memory,
    perturbed_bytes,
    perturbing_bytes,
    pinned,
    rounding_bytes,
    sampler_memory,
    states,
    sync_memory,
    transfer_bytes,
)
from grpo.planning.shapes import GPUS, Shape, shape_of
from grpo.sync.probe import PERTURBED_GROUPS, group_members
from grpo.sync.weights import BUCKET_BYTES, CHECKSUM_BYTES, CHECKSUM_WORDS, weighted_sum

P, EMBEDDING = 494_032_768, 151_936 * 896
"""Qwen2.5-0.5B, tied."""


def half_a_billion() -> Shape:
    return shape_of("Qwen/Qwen2.5-0.5B-Instruct")


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within the block, as long as they are there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {given.untyped_storage()._cdata for given in tree_leaves(args) if isinstance(given, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in before:
                self._made[key] = (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return out


def test_what_is_live_by_hand() -> None:
    """Two tensors of 400 bytes, and their sum beside them; then one of the three and a view of it."""
    with Live() as live:
        a, b = torch.zeros(100), torch.zeros(100)
        c = a + b
        del a, b
        d = c[:50] + 1
    assert live.peak == 1200
    assert d.numel() == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_parameter_that_is_perturbed_takes_what_is_planned(dtype: torch.dtype) -> None:
    """Beside its copy: its elements' signs, and two numbers in float32."""
    parameter = torch.nn.Parameter(torch.randn(400, 100).to(dtype))
    with Live() as copied:
        perturbation = Perturbation([parameter], chosen=(0,), vocabulary=50, rank=0)
    assert copied.peak == parameter.numel() * dtype.itemsize
    with Live() as live:
        perturbation.apply(0.1)
    assert live.peak == pytest.approx(PERTURB_ELEMENT * parameter.numel(), rel=0.01)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_the_copies_of_the_full_check_by_the_models_own_groups(dtype: str, width: int) -> None:
    """In float32 the whole model is copied, in bfloat16 one group of sixteen at a time; the first is the largest."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
            )
        )  # fmt: skip
    sizes = [p.numel() for p in model.parameters()]
    groups = PERTURBED_GROUPS[dtype]
    largest = width * max(sum(sizes[i] for i in group_members(group, groups, len(sizes))) for group in range(groups))
    planned = perturbed_bytes(config_of("gsm8k_qwen2.5_0.5b", f"model.dtype={dtype}"), half_a_billion())
    assert largest <= planned < 1.1 * largest
    assert dtype == "bfloat16" or planned == 4 * P


def test_a_checksum_takes_what_is_planned() -> None:
    """Four 64-bit vectors of a chunk, however long the tensor is."""
    words = torch.arange(50_000, dtype=torch.int32)
    with Live() as live:
        weighted_sum(words, chunk=5_000)
    assert live.peak == pytest.approx(4 * 8 * 5_000, rel=0.01)
    assert CHECKSUM_BYTES == 4 * 8 * CHECKSUM_WORDS


def test_a_sync_in_turns_by_hand() -> None:
    """2 + 12 bytes of the learner; the copy of the embedding and a sixteenth of the rest; the sampler's 2; at each end
    two buckets, as large as the embedding, and the checksum."""
    config, shape = config_of("gsm8k_qwen2.5_0.5b", "cluster.sleep=true", "algorithm.kl_coef=0"), half_a_billion()
    learner, _ = learner_memory(config, shape)
    found = sync_memory(config, shape, learner, sampler_memory(config, shape, 80e9))
    assert found == {
        "learner": 14 * P, "perturbed": pytest.approx(2 * (EMBEDDING + (P - EMBEDDING) / 16)), "sampler": 2 * P,
        "transfer": 2 * (2 * 2 * EMBEDDING + 4 * 8 * (1 << 23)),
    }  # fmt: skip
    assert 2 * EMBEDDING > BUCKET_BYTES


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_a_learner_apart_has_room_for_the_full_check(dtype: str, width: int) -> None:
    """With an optimizer in host memory a step takes nothing then: the copy of the parameters, and nine bytes for each
    element of the embedding, or both buckets and the checksum where these are more."""
    config = config_of(
        "gsm8k_qwen2.5_0.5b", "cluster.layout=disaggregated", "cluster.sleep=null", "learner.offload=optimizer",
        f"model.dtype={dtype}", "learner.tokens_per_microbatch=1536", "learner.gradient_checkpointing=true",
    )  # fmt: skip
    learner, _ = learner_memory(config, half_a_billion())
    later = sum(learner[name] for name in ("activations", "logits", "step and sync"))
    copies = P if width == 4 else EMBEDDING + (P - EMBEDDING) / 16
    assert later == pytest.approx(width * copies + max(9 * EMBEDDING, 2 * width * EMBEDDING + 2**28))
    assert perturbing_bytes(config, half_a_billion()) == 9 * EMBEDDING
    assert transfer_bytes(half_a_billion(), width) == 2 * width * EMBEDDING + 2**28


@pytest.mark.parametrize(("nbytes", "taken"), [(0, 0), (1, 1), (2**30, 2**30), (2**30 + 1, 2**31), (3e9, 2**32)])
def test_pinned_memory_is_a_power_of_two(nbytes: float, taken: float) -> None:
    assert pinned(nbytes) == taken


MATRICES = {2_064_384: 2**21, 1_605_632: 2**21, 17_432_576: 2**25, 8_716_288: 2**24}
"""Of a layer in bfloat16: 896 x 1152 of queries, keys and values, 896 x 896 back, 896 x 9728, 4864 x 896."""
OF_THE_SAMPLER = 24 * sum(taken - size for size, taken in MATRICES.items()) + 2**29 - 2 * EMBEDDING


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # weights of 0.99 GB, master copy and two moments of 1.98 GB each
        (("cluster.sleep=true",), 2**30 - 2 * P + 3 * (2**31 - 4 * P) + OF_THE_SAMPLER),
        (
            ("cluster.sleep=true", "optimizer.name=sgd", "optimizer.betas=[0.9,0.999]"),
            2**30 - 2 * P + 2**31 - 4 * P + OF_THE_SAMPLER,
        ),
        # the moments in host memory are not pinned; the gradients are
        (
            ("cluster.sleep=true", "learner.offload=optimizer"),
            2**30 - 2 * P + 2 * (2**31 - 4 * P) + OF_THE_SAMPLER,
        ),
        (("learner.offload=optimizer",), 2 * (2**31 - 4 * P)),
        ((), 0),
    ],
)
def test_the_rounding_of_pinned_memory_by_hand(overrides: tuple[str, ...], expected: float) -> None:
    config = config_of("gsm8k_qwen2.5_0.5b", "algorithm.kl_coef=0", *overrides)
    lengths = Lengths(prompt=9, completion=9, longest=9)
    assert rounding_bytes(config, half_a_billion()) == expected
    host: Parts = estimate(config, half_a_billion(), GPUS["h100"], lengths, nodes=1, gpus_per_node=8).host
    assert host.get("rounding", 0) == expected
    learner, _ = learner_memory(config, half_a_billion())
    if config.takes_turns:
        assert host["set aside"] == states(learner) + 2 * P
