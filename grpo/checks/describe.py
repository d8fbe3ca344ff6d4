"""The plan of a run in words."""

from __future__ import annotations

from collections.abc import Sequence

from grpo import data
from grpo.config import Config


def describe(config: Config, train: Sequence[data.PromptSet], held_out: Sequence[data.PromptSet]) -> list[str]:
    """Return the lines of the plan: data, batch algebra, objective, engines, warnings."""
    prompts = [prompt for dataset in train for prompt in dataset.prompts]
    eval_prompts = [prompt for dataset in held_out for prompt in dataset.prompts]
    a = config.algorithm
    rollouts = a.prompts_per_step * a.group_size
    updates = config.optimizer_steps_per_step
    longest = max(len(prompt.token_ids) for prompt in prompts)
    drawn = config.run.steps * a.prompts_per_step
    ratio = (
        "one update per batch: the ratio is exactly 1 and clipping inactive"
        if updates == 1
        else f"ratio clipped to [{1 - a.eps_low:g}, {1 + a.eps_high:g}]"
    )
    lines = [
        f"model      {config.model.path} in {config.model.dtype}",
        f"data       {len(prompts)} prompts, longest {longest} tokens; {drawn / len(prompts):.2f} epochs in "
        f"{config.run.steps} steps",
        *mix(config, train, drawn),
        f"step       {a.prompts_per_step} prompts x {a.group_size} completions = {rollouts} rollouts -> "
        f"{a.minibatches_per_step} minibatches x {a.epochs_per_step} epochs = {updates} optimizer steps",
        f"objective  {a.advantage}, {a.loss}, {a.aggregation}; {ratio}; {anchor(config)}; temperature "
        f"{config.sampling.temperature:g}",
        f"optimizer  {config.optimizer.name}, learning rate {config.optimizer.lr:g}, {config.optimizer.schedule}"
        + (f" after {config.optimizer.warmup_steps} steps of warmup" if config.optimizer.warmup_steps else ""),
        f"engines    {config.cluster.samplers} samplers, {config.cluster.learner_ranks} learner ranks at ZeRO "
        f"{config.learner.zero_stage}, microbatches of up to {config.learner.tokens_per_microbatch} tokens",
    ]
    if (warmup := config.optimizer.warmup_steps) >= config.run.steps * updates:
        lines.append(
            f"warning    optimizer.warmup_steps={warmup} of {config.run.steps * updates} optimizer steps: the learning "
            f"rate never reaches {config.optimizer.lr:g}"
        )
    if eval_prompts:
        k = config.data.eval.samples_per_prompt
        lines.append(f"eval       {len(eval_prompts)} held-out prompts, avg@{k}")
    for option, some in (("data.train", prompts), ("data.eval.sets", eval_prompts)):
        doubles = len(some) - len({prompt.token_ids for prompt in some})
        if doubles:
            lines.append(f"warning    {doubles} of {len(some)} prompts of {option} occur more than once")
    return lines + [note for dataset in (*train, *held_out) for note in dataset.notes]


def mix(config: Config, train: Sequence[data.PromptSet], drawn: int) -> list[str]:
    """Return a line for each data set, if there are several: its number of prompts and how often they are drawn."""
    if len(train) == 1:
        return []
    weights = [of.weight for of in config.data.train if of.weight is not None]
    if not weights:
        return [f"set        {dataset.name}: {len(dataset.prompts)} prompts, in one pool" for dataset in train]
    shares = [weight / sum(weights) for weight in weights]
    return [
        f"set        {dataset.name}: {len(dataset.prompts)} prompts, {share:.1%} of those drawn: "
        f"{drawn * share / len(dataset.prompts):.2f} epochs"
        for dataset, share in zip(train, shares, strict=True)
    ]


def anchor(config: Config) -> str:
    """Describe the KL to the reference in words."""
    a = config.algorithm
    if a.kl_coef == 0:
        return "no reference"
    how = f" with the gradient {a.kl_gradient}" if a.kl_place == "loss" else ""
    return f"{a.kl_coef:g} x {a.kl_estimator} to the reference in the {a.kl_place}{how}"
