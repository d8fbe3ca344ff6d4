"""Predict the seconds per step and the hours of a run, without any GPU, and whether the recipe fits into memory.

This is pure arithmetic. The seconds are the amount of work divided by data-sheet rates and four stated efficiencies.
docs/scale.md has the formulas, their sources and the errors compared with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from grpo.config import Config
from grpo.planning.memory import (
    Parts,
    itemsize,
    learner_memory,
    rounding_bytes,
    sampler_memory,
    states,
    sync_memory,
)
from grpo.planning.shapes import Gpu, Shape, split_problems

LEARNER_SHARE = 0.3
"""Fraction of the bfloat16 peak that forward and backward passes reach; also prefill."""
MEMORY_SHARE = 0.6
"""Fraction of the memory bandwidth that decoding reaches."""
LINK_SHARE = 0.7
"""Fraction of the bandwidth of a link that a collective reaches."""
ALL_REDUCE_S = 15e-6
"""Latency of one all-reduce among the GPUs of a sampler, in addition to its transfer time. Each decoding step has two
per layer."""
REST = 1.2
"""Ratio of a step to the sum of its parts; covers rewards, padding, waiting for the slowest, and bookkeeping."""
DECODE_S = 5e-3
"""Overhead of a decoding step with CUDA graphs, in addition to memory reads and arithmetic: vLLM's scheduler and
sampling."""
EAGER_LAYER_S = 0.5e-3
"""Additional overhead per layer of a decoding step without CUDA graphs (`sampler.enforce_eager`)."""
HOST_BANDWIDTH = 50e9
"""Memory bandwidth of an optimizer in host memory, in bytes per second."""
PCIE_BANDWIDTH = 25e9
"""Bandwidth between a GPU and pinned host memory, in bytes per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths that a recipe does not define: the mean tokens of a prompt and of a completion over the run."""

    prompt: float
    completion: float
    longest: float
    """Tokens of the longest completion of a step; usually some completions reach the limit."""


def sampling_seconds(
    shape: Shape, gpu: Gpu, lengths: Lengths, *, completions: float, prompts: float, kv: float, max_num_seqs: int,
    width: int = 2, eager: bool = False,
) -> float:  # fmt: skip
    """Return the seconds that one sampler takes for its `completions` of `prompts`.

    `gpu` stands for all GPUs of the sampler; `kv`: bytes of its whole cache. A decoding step reads the weights once,
    and the keys and values of the completions in flight. The last completions are decoded alone. GPUs that share each
    layer sum up its two results in all-reduces.
    """
    held = lengths.prompt + lengths.completion / 2
    per_token = shape.kv_bytes(width)
    in_flight = max(1.0, min(completions, max_num_seqs, kv / (held * per_token)))
    tokens = completions * lengths.completion
    steps = tokens / in_flight + max(0.0, lengths.longest - lengths.completion)
    read = (steps * width * shape.multiplied + tokens * held * per_token) / (MEMORY_SHARE * gpu.bandwidth)
    flops = 2 * shape.multiplied * tokens / (LEARNER_SHARE * gpu.flops)
    prefill = 2 * shape.multiplied * prompts * lengths.prompt / (LEARNER_SHARE * gpu.flops)
    each = DECODE_S + (EAGER_LAYER_S * shape.layers if eager else 0)
    added = 0.0
    if gpu.parts > 1:
        each += 2 * shape.layers * ALL_REDUCE_S
        sent = 2 * (gpu.parts - 1) / gpu.parts * width * shape.hidden * (tokens + prompts * lengths.prompt)
        added = 2 * shape.layers * sent / (LINK_SHARE * gpu.link)
    return steps * each + max(read, flops) + prefill + added


def pass_seconds(shape: Shape, gpu: Gpu, lengths: Lengths, *, rows: float, ranks: int, passes: float) -> float:
    """Return the seconds of `passes` forward passes over the rows, shared by the ranks; a backward pass counts as
    two. Only the tokens of completions are projected to the vocabulary."""
    tokens = lengths.prompt + lengths.completion
    attention = 2 * shape.layers * shape.queries * tokens  # scores and weighted sums, half masked
    flops = (2 * shape.body + attention) * tokens + 2 * shape.embedding * lengths.completion
    return passes * flops * rows / (LEARNER_SHARE * gpu.flops * ranks)


def exchange_bytes(shape: Shape, *, stage: int, ranks: int, width: int, microbatches: float, updates: float) -> float:
    """Return the bytes that each rank sends in a step.

    Gradients are sent once per update below ZeRO 2, else once per microbatch. Weights are sent once per update, with
    ZeRO 3 twice per microbatch.
    """
    if ranks == 1:
        return 0
    reduced = 8 * updates if stage < 2 else width * microbatches  # a float32 all-reduce sends its data twice
    gathered = 2 * width * microbatches if stage == 3 else width * updates * (stage > 0)
    return shape.parameters * (reduced + gathered) * (ranks - 1) / ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Results of `grpo plan`."""

    learner: Parts
    host: Parts
    """Host memory of each rank."""
    sampler: Parts
    sync: Parts
    """Bytes on a GPU during a weight sync, if samplers and learner take turns on it; else empty."""
    seconds: Parts
    """Seconds of each part of a step; their sum is the step."""
    gpus: int
    at_once: float
    """Completions of mean length that fit into a sampler's KV cache."""
    hours: float
    problems: tuple[str, ...]
    """Reasons why the recipe does not fit, with the options to change. Empty: it fits."""


def estimate(
    config: Config, shape: Shape, gpu: Gpu, lengths: Lengths, *, nodes: int, gpus_per_node: int,
    evaluations: int = 0, evaluated: float = 0, rounds: float = 1,
) -> Estimate:  # fmt: skip
    """Return the plan of a recipe.

    `evaluations`: number of evaluations in the run, of `evaluated` completions each. `rounds`: mean number of times
    that a step samples, including refills.
    """
    a, samplers = config.algorithm, config.cluster.samplers
    learner, host = learner_memory(config, shape)
    sampler = sampler_memory(config, shape, gpu.memory)
    if config.takes_turns:  # before a save, both are briefly offloaded, the sampler including its weights
        host = host | {"set aside": states(learner) + sampler["weights"]}
    if (rounding := rounding_bytes(config, shape)) > 0:
        host = host | {"rounding": rounding}
    sync = sync_memory(config, shape, learner, sampler) if config.takes_turns else {}
    cache = sampler["KV cache"] * config.sampler_workers
    shared = shape.over(config.cluster.tensor_parallel)
    workers = config.sampler_workers
    together = replace(
        gpu, flops=gpu.flops * workers, bandwidth=gpu.bandwidth * workers, parts=config.cluster.tensor_parallel
    )

    def sample(completions: float, prompts: float) -> float:
        return sampling_seconds(
            shared, together, lengths, completions=completions / samplers, prompts=prompts / samplers, kv=cache,
            max_num_seqs=config.sampler.max_num_seqs, width=itemsize(config), eager=config.enforce_eager,
        )  # fmt: skip

    link = gpu.link if config.gpus_used <= gpus_per_node else gpu.network
    seconds: Parts = {
        "sampling": rounds * sample(a.prompts_per_step * a.group_size, a.prompts_per_step),
        **learner_seconds(config, shape, gpu, lengths, link=link, in_host=host.get("optimizer", 0.0)),
        "taking turns": 2 * states(learner) / PCIE_BANDWIDTH if config.takes_turns else 0,
    }
    seconds["rest"] = (REST - 1) * sum(seconds.values())
    evaluation = REST * evaluations * sample(evaluated, evaluated) if evaluated else 0.0
    at_once = cache / ((lengths.prompt + lengths.completion) * shared.kv_bytes(itemsize(config)))
    return Estimate(
        learner=learner, host=host, sampler=sampler, sync=sync, seconds=seconds, gpus=config.gpus_used, at_once=at_once,
        hours=(config.run.steps * sum(seconds.values()) + evaluation) / 3600,
        problems=tuple(find_problems(config, shape, gpu, learner, sampler, sync, nodes, gpus_per_node)),
    )  # fmt: skip


def learner_seconds(config: Config, shape: Shape, gpu: Gpu, lengths: Lengths, *, link: float, in_host: float) -> Parts:
    """Return the seconds of each part of a step that the learner works in.

    `link`: bandwidth between its ranks, and to the samplers. `in_host`: bytes of an optimizer in host memory.
    """
    a, c, width = config.algorithm, config.learner, itemsize(config)
    rows, updates = a.prompts_per_step * a.group_size, config.optimizer_steps_per_step
    ranks = config.cluster.learner_ranks
    tokens = rows * (lengths.prompt + lengths.completion)
    microbatches = max(a.minibatches_per_step, tokens / (c.tokens_per_microbatch * ranks)) * a.epochs_per_step
    exchange = exchange_bytes(
        shape, stage=c.zero_stage, ranks=ranks, width=width, microbatches=microbatches, updates=updates
    )
    models = 2 if a.advantage == "gae" else 1
    old = updates > 1 or (a.kl_coef > 0 and a.kl_place == "reward")

    def passed(passes: float) -> float:
        return pass_seconds(shape, gpu, lengths, rows=rows, ranks=ranks, passes=passes)

    return {
        "old logprobs": passed(1) if old else 0,
        "reference": passed(1) if a.kl_coef > 0 else 0,
        "values": passed(1) if models == 2 else 0,
        "update": passed(models * (3 + c.gradient_checkpointing) * a.epochs_per_step),
        "exchange": models * exchange / (LINK_SHARE * link),
        "host optimizer": models * updates * 2 * in_host / HOST_BANDWIDTH,
        "sync": 0 if config.cluster.layout == "colocated" else width * shape.parameters / (LINK_SHARE * link),
    }


def find_problems(
    config: Config, shape: Shape, gpu: Gpu, learner: Parts, sampler: Parts, sync: Parts, nodes: int, gpus_per_node: int
) -> list[str]:
    """Return one sentence for each reason why the recipe does not fit, with the options to change."""
    s, ranks, gpus = config.sampler, config.cluster.learner_ranks, config.gpus_used
    both = config.cluster.layout == "colocated" and not config.takes_turns
    given = s.kv_cache_gib is not None  # vLLM then ignores gpu_memory_utilization
    share, held = ("kv_cache_gib", s.kv_cache_gib) if given else ("gpu_memory_utilization", s.gpu_memory_utilization)
    out = []
    samplers, workers = config.cluster.samplers, config.sampler_workers
    if workers > 1 and samplers > nodes * (gpus_per_node // workers):
        out.append(
            f"a sampler's {workers} GPUs are on one node, and {nodes} nodes of {gpus_per_node} have room for "
            f"{nodes * (gpus_per_node // workers)} of {samplers} samplers: lower cluster.tensor_parallel, "
            "cluster.pipeline_parallel or cluster.samplers, or give more --nodes"
        )
    out += split_problems(
        config.cluster.tensor_parallel, config.cluster.pipeline_parallel, heads=shape.heads, kv_heads=shape.kv_heads,
        intermediate=shape.intermediate, vocab=shape.vocab, layers=shape.layers,
    )  # fmt: skip
    if gpus > nodes * gpus_per_node:
        out.append(
            f"{gpus} GPUs are asked for and there are {nodes * gpus_per_node}: lower cluster.samplers={samplers} or "
            f"cluster.learner_ranks={ranks}, or give more --nodes"
        )
    taken = sum(learner.values()) + (sum(sampler.values()) if both else 0)
    if taken > gpu.memory:
        options = learner_options(config) + ([f"a lower sampler.{share}"] if both else [])
        alike = " and as many more GPUs of samplers" if config.cluster.layout == "colocated" else ""
        options.append(f"more cluster.learner_ranks{alike}")
        out.append(
            f"a learner rank takes {taken / 1e9:.1f} GB of {gpu.memory / 1e9:g}"
            f"{' with its sampler' if both else ''}: change, in this order, {', '.join(options)}"
        )
    elif sum(sync.values()) > gpu.memory:
        out.append(
            f"a weight sync takes {sum(sync.values()) / 1e9:.1f} GB of {gpu.memory / 1e9:g}, since learner and sampler "
            "both have their weights on the GPU: change learner.offload=optimizer, cluster.layout=disaggregated, or "
            "more cluster.learner_ranks and as many more GPUs of samplers"
        )
    room = config.max_row_tokens * shape.over(config.cluster.tensor_parallel).kv_bytes(itemsize(config))
    cache = sampler["KV cache"] * config.sampler_workers
    if cache < room:
        out.append(
            f"a sampler's KV cache has {cache / 1e9:.1f} GB and one row of "
            f"{config.max_row_tokens} tokens takes {room / 1e9:.1f}: raise sampler.{share}={held:g}, or lower "
            f"{'' if given else f'sampler.max_num_seqs={s.max_num_seqs} or '}"
            f"sampling.max_tokens={config.sampling.max_tokens}"
        )
    if not both and sum(sampler.values()) > gpu.memory:
        taken = sum(sampler.values())
        out.append(f"a sampler takes {taken / 1e9:.1f} GB of {gpu.memory / 1e9:g}: lower sampler.{share}={held:g}")
    return out


def learner_options(config: Config) -> list[str]:
    """Return options that reduce the memory of a learner rank, in the order to apply them: each is valid in addition to
    those before it."""
    c, colocated = config.learner, config.cluster.layout == "colocated"
    options, stage, fewest = [], c.zero_stage, config.max_row_tokens
    # with ZeRO 3, the states cannot be offloaded for a colocated sampler, and the reference is sharded instead
    highest = 2 if colocated or c.reference_offload else 3
    if not c.gradient_checkpointing:
        options.append("learner.gradient_checkpointing=true")
    if c.tokens_per_microbatch > fewest:
        options.append(f"learner.tokens_per_microbatch={max(fewest, c.tokens_per_microbatch // 2)}")
    if stage == 0 or (config.cluster.learner_ranks > 1 and stage < highest):
        stage += 1
        options.append(f"learner.zero_stage={stage}")
    if c.offload == "none":
        options.append("learner.offload=optimizer")
    if colocated and not config.takes_turns and stage < 3:
        options.append("cluster.sleep=true")
    return options
