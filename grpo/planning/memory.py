"""Predict the bytes on a GPU and in host memory: of the learner, of a sampler, and of a weight sync.

The bytes are counted tensor by tensor, as the engines hold them. docs/scale.md has the formulas and their sources.
"""

from __future__ import annotations

import math

from grpo.config import Config
from grpo.objective.logprobs import CHUNK_ELEMENTS
from grpo.planning.shapes import Shape
from grpo.sync.probe import PERTURBED_GROUPS
from grpo.sync.weights import BUCKET_BYTES, CHECKSUM_BYTES

ZERO_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements."""
ZERO_LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and sub_group_size, in elements."""
SAMPLING_COPIES = 4
"""Number of float32 copies of the logits of a decoding step: logits, logprobs, probabilities, noise."""

PERTURB_ELEMENT = 9
"""Bytes per element of a parameter that `grpo.learner.probe.Perturbation` takes while it changes the parameter: one for
the random sign, and two float32 numbers."""

Parts = dict[str, float]
"""Name of a part -> bytes, or seconds."""


def itemsize(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


def model_states(
    parameters: int, *, stage: int, ranks: int, width: int, moments: int = 2, offload: str = "none"
) -> tuple[Parts, Parts]:
    """Return the bytes of a trained model on one rank: (on the device, in host memory).

    This is how DeepSpeed holds it with gradients accumulated in float32. `width`: bytes of a weight.
    """
    p, share = parameters, parameters / ranks
    optimizer = 4 * moments * p if stage == 0 else 4 * (moments + 1) * share  # ZeRO 0 has no float32 master copy
    weights = width * (share if stage == 3 else p)
    gradients = 4 * (share if stage >= 2 else p)
    if stage == 1 and width == 2 and offload == "none":
        gradients += 2 * p  # BF16_Optimizer keeps the bfloat16 gradients in addition to the float32 ones
    device: Parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    host: Parts = {}
    if offload != "none":
        host["optimizer"] = device.pop("optimizer") + 4 * share
        if stage >= 2:
            device.pop("gradients")
    if offload == "parameters":
        host["weights"] = device.pop("weights")
    if not (stage == 0 or (stage == 1 and width == 2 and offload == "none")):
        device["reduce bucket"] = width * ZERO_BUCKET
    if stage == 3:
        device["gathered weights"] = width * min(p, ZERO_LIVE)
    return device, host


def layer_bytes(shape: Shape, width: int) -> int:
    """Return the bytes that one layer keeps per token for the backward pass: two norms (input in float32, normalized,
    scaled), queries, keys, values and the attention output, and four tensors of the feed-forward part."""
    norms = 2 * shape.hidden * (4 + 2 * width)
    attention = width * 2 * (shape.queries + shape.keys)
    return norms + attention + width * 4 * shape.intermediate


def activation_bytes(shape: Shape, tokens: int, width: int, *, checkpointing: bool, eager_row: int = 0) -> float:
    """Return the bytes of the activations of one microbatch.

    `eager_row`: the length of the longest row with eager attention, which keeps its square matrix of probabilities.
    """
    layer = layer_bytes(shape, width) + eager_row * shape.heads * (4 + (width if width < 4 else 0))
    kept = shape.layers * shape.hidden * width + layer if checkpointing else shape.layers * layer
    last_norm = shape.hidden * (4 + 2 * width)
    return tokens * (kept + last_norm)


def head_bytes(shape: Shape, tokens: int, width: int, *, float32_head: bool, entropy: bool) -> float:
    """Return the peak bytes, in forward or backward, of computing logprobs from hidden states
    (`grpo.objective.logprobs`): a chunk of logits, and the float32 gradient of the projection plus the next term that
    is added to it."""
    wide = 4 if float32_head else width
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // shape.vocab)) * shape.vocab
    forward = chunk * 8
    backward = chunk * (4 + (wide if wide < 4 else 0) + (4 if entropy else 0))
    backward += shape.embedding * (4 + (wide if wide < 4 else 0)) + tokens * shape.hidden * width
    copy = shape.embedding * 4 if float32_head and width < 4 else 0
    return max(forward, backward) + copy


def learner_memory(config: Config, shape: Shape) -> tuple[Parts, Parts]:
    """Return (bytes on the device of each rank, bytes of host memory of each rank) at the peak of a step."""
    c, a, width = config.learner, config.algorithm, itemsize(config)
    moments = 2 if config.optimizer.name == "adamw" else 0
    ranks = config.cluster.learner_ranks
    how = {"stage": c.zero_stage, "ranks": ranks, "width": width}
    device, host = model_states(shape.parameters, moments=moments, offload=c.offload, **how)
    if a.advantage == "gae":
        moments = 2 if config.critic.optimizer.name == "adamw" else 0
        of_critic = model_states(shape.body + shape.embedding, moments=moments, offload=c.offload, **how)
        device["critic"], host["critic"] = (sum(part.values()) for part in of_critic)
    if a.kl_coef > 0:
        where = host if c.reference_offload or c.offload == "parameters" else device
        where["reference"] = width * shape.parameters / (ranks if c.zero_stage == 3 else 1)
    row = config.data.max_prompt_tokens + config.sampling.max_tokens - 1
    tokens = max(c.tokens_per_microbatch, row)
    eager_row = row if config.model.attention == "eager" else 0
    activations = activation_bytes(shape, tokens, width, checkpointing=c.gradient_checkpointing, eager_row=eager_row)
    head = head_bytes(shape, tokens, width, float32_head=config.model.float32_head, entropy=a.entropy_coef != 0)
    if not config.on_gpu and "reduce bucket" in device:  # memory that is never written is not allocated on CPU
        device["reduce bucket"] = min(device["reduce bucket"], width * shape.parameters)
    share = shape.parameters if c.zero_stage == 0 else min(shape.parameters / ranks, ZERO_LIVE)
    # float32 flattened gradients and square root of the second moment, or a sync; neither overlaps with activations
    step = 0.0 if c.offload != "none" else 4 * (1 if c.zero_stage < 2 else 2) * share
    sync = perturbed_bytes(config, shape) + max(transfer_bytes(shape, width), perturbing_bytes(config, shape))
    later = max(step, sync)
    device |= {"activations": activations, "logits": head, "step and sync": max(0.0, later - activations - head)}
    return device, host


def transfer_bytes(shape: Shape, width: int) -> float:
    """Return the bytes of a weight sync: two buckets, each large enough for the largest tensor, and the checksum
    buffer."""
    return 2 * max(BUCKET_BYTES, shape.embedding * width) + CHECKSUM_BYTES


def perturbed_bytes(config: Config, shape: Shape) -> float:
    """Return the bytes per rank of the original values that the full check of a sync keeps: one group of perturbed
    parameters at a time. The first group contains the embedding."""
    groups = PERTURBED_GROUPS[config.model.dtype]
    kept = shape.embedding + (shape.parameters - shape.embedding) / groups
    return itemsize(config) * kept / (config.cluster.learner_ranks if config.learner.zero_stage == 3 else 1)


def perturbing_bytes(config: Config, shape: Shape) -> float:
    """Return the bytes per rank that the full check takes while it changes the largest parameter, in addition to
    `perturbed_bytes`. They are free again before weights are sent."""
    largest = max(shape.embedding, shape.hidden * shape.intermediate)
    return PERTURB_ELEMENT * largest / (config.cluster.learner_ranks if config.learner.zero_stage == 3 else 1)


def sync_memory(config: Config, shape: Shape, learner: Parts, sampler: Parts) -> Parts:
    """Return the bytes on a GPU during a weight sync of engines that take turns, when both have their weights on it.

    From ZeRO 2 on, there are no gradients between steps. While the full check changes parameters, the sampler is
    asleep; its weights take more than `perturbing_bytes`.
    """
    gradients = learner.get("gradients", 0.0) if config.learner.zero_stage >= 2 else 0.0
    return {
        "learner": states(learner) - gradients, "perturbed": perturbed_bytes(config, shape),
        "sampler": sampler["weights"], "transfer": 2 * transfer_bytes(shape, itemsize(config)),
    }  # fmt: skip


def sampler_memory(config: Config, shape: Shape, memory: float) -> Parts:
    """Return the bytes of one sampler on each of its GPUs, which have `memory` bytes each.

    The KV cache has the configured size, or else takes what is left of `gpu_memory_utilization`.
    """
    s, width, workers = config.sampler, itemsize(config), config.sampler_workers
    batched = max(8192, config.max_row_tokens)
    parts: Parts = {
        "weights": width * shape.over(config.cluster.tensor_parallel).parameters / workers,
        "forward": batched * width * (2 * shape.hidden + 3 * shape.intermediate / config.cluster.tensor_parallel),
        "logits": s.max_num_seqs * shape.vocab * 4 * SAMPLING_COPIES,
    }
    if s.kv_cache_gib is not None or not config.on_gpu:
        kv = (s.kv_cache_gib or 0.25) * 2**30
    else:
        kv = max(0.0, s.gpu_memory_utilization * memory - sum(parts.values()))
    return parts | {"KV cache": kv, "transfer": transfer_bytes(shape, width)}


def states(learner: Parts) -> float:
    """Return the bytes of a rank that are offloaded from the GPU while the sampler works."""
    return sum(learner.get(name, 0.0) for name in ("weights", "gradients", "optimizer", "critic", "reference"))


def pinned(nbytes: float) -> float:
    """Return the bytes that torch allocates for a pinned buffer: the next power of two.

    torch keeps a buffer that is released, for the next one of its size.
    """
    return 2.0 ** math.ceil(math.log2(nbytes)) if nbytes > 0 else 0.0


def rounding_bytes(config: Config, shape: Shape) -> float:
    """Return by how much the pinned buffers in host memory are larger than their contents, for each rank.

    DeepSpeed pins the weights, the master copy and each moment of a model that is offloaded for the sampler, and the
    master copy and the gradients of an optimizer in host memory. vLLM pins each of its matrices before a save.
    """
    c, width, share = config.learner, itemsize(config), 1 / config.cluster.learner_ranks
    trained = [(shape.parameters, config.optimizer.name)]
    if config.algorithm.advantage == "gae":
        trained.append((shape.body + shape.embedding, config.critic.optimizer.name))
    buffers: list[tuple[float, float]] = []
    for parameters, optimizer in trained:
        whole = 4 * parameters * share
        if c.offload != "none":
            buffers.append((2, whole))
        if c.offload == "parameters":
            buffers.append((1, width * parameters * share))
        if config.takes_turns:
            buffers.append((1, width * parameters))
            buffers.append(((3 if optimizer == "adamw" else 1) if c.offload == "none" else 0, whole))
    if config.takes_turns:
        buffers += sampler_matrices(config, shape)
    return sum(count * (pinned(nbytes) - nbytes) for count, nbytes in buffers)


def sampler_matrices(config: Config, shape: Shape) -> list[tuple[float, float]]:
    """Return (number, bytes) of the matrices of each size on a GPU of a sampler, as vLLM merges them."""
    parts, width = config.cluster.tensor_parallel, itemsize(config)
    shared = shape.over(parts)
    layer = (
        shape.hidden * (shared.queries + 2 * shared.keys), shared.queries * shape.hidden,
        2 * shape.hidden * shape.intermediate, shape.intermediate * shape.hidden,
    )  # fmt: skip
    layers = shape.layers / config.cluster.pipeline_parallel
    vocabulary = [(1.0, width * size / parts) for size in (shape.embedding, shape.head) if size]
    return vocabulary + [(layers, width * size / parts) for size in layer]
