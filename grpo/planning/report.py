"""`grpo plan`: report the plan of a recipe, and propose a faster layout of its GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal

from grpo.config import Config, validate, values, written
from grpo.planning.estimate import Estimate, Lengths, estimate
from grpo.planning.memory import Parts
from grpo.planning.shapes import Gpu, Shape, shape_of
from grpo.types import UserError

Layout = tuple[Literal["colocated", "disaggregated"], int, int]
"""(`cluster.layout`, number of samplers, number of learner ranks)."""
LEARNING = ("old logprobs", "reference", "values", "update", "exchange", "host optimizer")
"""Parts of a step in which the learner works."""
WORTH = 0.9
"""A layout is proposed if it takes less than this fraction of the hours of the recipe."""


def quicker(
    config: Config, shape: Shape, gpu: Gpu, lengths: Lengths, *, nodes: int, gpus_per_node: int
) -> tuple[list[str], Estimate] | None:
    """Return the options of the fastest layout on the same number of GPUs, with its plan; None if the recipe's own
    layout is about as good.

    The candidates are colocated layouts and disaggregated ones in every proportion, with 1, 2, 4 or 8 GPUs per sampler.
    """

    def planned(other: Config) -> Estimate:
        return estimate(other, shape, gpu, lengths, nodes=nodes, gpus_per_node=gpus_per_node)

    own = planned(config)
    plans = [(other, plan) for other in layouts(config, gpus_per_node) if not (plan := planned(other)).problems]
    if not plans:
        return None
    other, plan = min(plans, key=lambda pair: (pair[1].hours, len(changes(config, pair[0]))))
    return (changes(config, other), plan) if own.problems or plan.hours < WORTH * own.hours else None


def layouts(config: Config, gpus_per_node: int) -> Iterator[Config]:
    """Yield the recipe in every valid layout on the same number of GPUs."""
    gpus, c = config.gpus_used, config.cluster
    for parallel in (parallel for parallel in (1, 2, 4, 8) if parallel <= min(gpus, gpus_per_node)):
        apart: list[Layout] = [("disaggregated", n, gpus - n * parallel) for n in range(1, -(-gpus // parallel))]
        together: list[Layout] = [("colocated", gpus // parallel, gpus)] if gpus % parallel == 0 else []
        for layout, samplers, ranks in (*together, *apart):
            cluster = replace(
                c, layout=layout, samplers=samplers, tensor_parallel=parallel, pipeline_parallel=1,
                learner_ranks=ranks, sleep=c.sleep if layout == "colocated" else None,
            )  # fmt: skip
            for stage, seqs in product(
                sorted({config.learner.zero_stage, 2, 3}), in_flight(config, samplers, parallel)
            ):
                offload = config.learner.reference_offload and stage < 3
                other = replace(
                    config, cluster=cluster, sampler=replace(config.sampler, max_num_seqs=seqs),
                    learner=replace(config.learner, zero_stage=stage, reference_offload=offload),
                )  # fmt: skip
                try:
                    validate(other)
                except UserError:
                    continue
                yield other


def in_flight(config: Config, samplers: int, parallel: int) -> list[int]:
    """Return candidate values of `sampler.max_num_seqs`: as many per GPU as in the recipe, and all of a sampler's
    completions of a step."""
    as_now = max(1, round(config.sampler.max_num_seqs / config.sampler_workers * parallel))
    of_step = -(-config.algorithm.prompts_per_step * config.algorithm.group_size // samplers)
    return sorted({as_now, max(as_now, of_step)})


def changes(config: Config, other: Config) -> list[str]:
    """Return the options in which `other` differs, as `option=value`."""
    found = []
    for section in ("cluster", "learner", "sampler"):
        old = dict(values(getattr(config, section), f"{section}."))
        new = values(getattr(other, section), f"{section}.")
        found += [f"{name}={written(value)}" for name, value in new if value != old[name]]
    return found


def samplers_of(config: Config) -> str:
    count, workers = config.cluster.samplers, config.sampler_workers
    return f"{count} samplers" + (f" of {workers} GPUs" if workers > 1 else "")


def assumed_lengths(config: Config, prompt: float | None, completion: float | None) -> Lengths:
    """Return the given lengths. The defaults are 150 tokens for the prompt and a third of `sampling.max_tokens` for the
    completion.

    Raises UserError if they exceed the limits of the recipe.
    """
    limits = (("--prompt-tokens", prompt, config.data.max_prompt_tokens, "data.max_prompt_tokens"),
              ("--completion-tokens", completion, config.sampling.max_tokens, "sampling.max_tokens"))  # fmt: skip
    for name, value, limit, option in limits:
        if value is not None and not 1 <= value <= limit:
            raise UserError(f"{name} {value:g} must lie between 1 and {option}={limit}")
    return Lengths(
        prompt=prompt or min(150, config.data.max_prompt_tokens),
        completion=completion or max(1.0, config.sampling.max_tokens / 3),
        longest=config.sampling.max_tokens,
    )


def report(
    plan: Estimate, config: Config, shape: Shape, lengths: Lengths, *, gpu: tuple[str, Gpu], nodes: int, per_node: int
) -> list[str]:
    """Return the lines of the table that `grpo plan` prints."""

    def line(name: str, parts: Parts, unit: float, total: str) -> str:
        shown = ", ".join(f"{what} {value / unit:.1f}" for what, value in parts.items() if value / unit >= 0.05)
        return f"{name:10} {total} = {shown}"

    memory = gpu[1].memory / 1e9
    step = sum(plan.seconds.values())
    of = f"GB of {memory:g}"
    lines = [
        f"gpus       {plan.gpus} of {nodes} x {per_node} {gpu[0]}: {samplers_of(config)}, "
        f"{config.cluster.learner_ranks} learner ranks, {config.cluster.layout}"
        f"{', in turns' if config.takes_turns else ''}",
        f"model      {config.model.path}: {shape.parameters / 1e9:.2f} B parameters in {config.model.dtype}",
        f"assumed    prompts of {lengths.prompt:.0f} tokens, completions of {lengths.completion:.0f}, the longest "
        f"{lengths.longest:.0f}; no evaluation, no refills",
        line("learner", plan.learner, 1e9, f"{sum(plan.learner.values()) / 1e9:.1f} {of} a rank"),
        line("sampler", plan.sampler, 1e9, f"{sum(plan.sampler.values()) / 1e9:.1f} {of}"),
        *([line("sync", plan.sync, 1e9, f"{sum(plan.sync.values()) / 1e9:.1f} {of}")] if plan.sync else []),
        f"           {plan.at_once:.0f} completions of that length at once in a KV cache; at most "
        f"{config.sampler.max_num_seqs} by sampler.max_num_seqs",
        line("step", plan.seconds, 1, f"{step:.1f} s"),
        f"run        {config.run.steps} steps: {plan.hours:.2g} hours; {who_works(plan, config)}",
    ]
    if any(plan.host.values()):
        host = line("host", plan.host, 1e9, f"{sum(plan.host.values()) / 1e9:.1f} GB of host memory a rank")
        lines.insert(4, host)
    lines += [f"no         {problem}" for problem in plan.problems] or ["fits       memory and GPUs are sufficient"]
    return lines


def who_works(plan: Estimate, config: Config) -> str:
    """Describe the fractions of a step in which samplers and learner work."""
    step = sum(plan.seconds.values())
    learning = sum(plan.seconds[part] for part in LEARNING) / step
    idle = "in turn on the same GPUs" if config.cluster.layout == "colocated" else "and wait for each other"
    return f"samplers work {plan.seconds['sampling'] / step:.0%} of it, the learner {learning:.0%}, {idle}"


def plan_lines(
    config: Config, *, gpu: tuple[str, Gpu], nodes: int, gpus_per_node: int, prompt: float | None,
    completion: float | None,
) -> tuple[str, bool]:  # fmt: skip
    """Return (the table of `grpo plan`, whether the recipe fits).

    Raises UserError for a recipe that cannot be planned.
    """
    if not config.on_gpu:
        raise UserError("the recipe runs on CPUs; a plan is for GPUs: cluster.device=gpu")
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    shape, lengths = shape_of(config.model.path), assumed_lengths(config, prompt, completion)
    plan = estimate(config, shape, gpu[1], lengths, nodes=nodes, gpus_per_node=gpus_per_node)
    lines = report(plan, config, shape, lengths, gpu=gpu, nodes=nodes, per_node=gpus_per_node)
    found = quicker(config, shape, gpu[1], lengths, nodes=nodes, gpus_per_node=gpus_per_node)
    if found is not None:
        options, other = found
        against = "which fits" if plan.problems else f"{other.hours / plan.hours:.0%} of these"
        lines.append(f"better     {' '.join(options)}: {other.hours:.2g} hours on the same number of GPUs, {against}")
    return "\n".join(lines), not plan.problems
