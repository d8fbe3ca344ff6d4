"""What must hold between options: ranges, the batch algebra, and no option without effect."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from grpo.config.schema import Config, EvalConfig
from grpo.types import UserError


def validate(c: Config) -> None:
    """Raises UserError at the first option that cannot be, with the nearest value that can."""
    _validate_ranges(c)
    _validate_objective(c)
    _validate_batch(c)
    _validate_engines(c)
    _validate_rewards(c)
    _validate_data(c)


def need(ok: bool, sentence: str) -> None:
    """Raises UserError with `sentence` unless `ok`."""
    if not ok:
        raise UserError(sentence)


def _validate_ranges(c: Config) -> None:
    positive = {
        "algorithm.prompts_per_step": c.algorithm.prompts_per_step,
        "algorithm.minibatches_per_step": c.algorithm.minibatches_per_step,
        "algorithm.epochs_per_step": c.algorithm.epochs_per_step,
        "sampling.max_tokens": c.sampling.max_tokens,
        "sampler.num_samplers": c.sampler.num_samplers,
        "sampler.max_num_seqs": c.sampler.max_num_seqs,
        "learner.ranks": c.learner.ranks,
        "learner.tokens_per_microbatch": c.learner.tokens_per_microbatch,
        "data.max_prompt_tokens": c.data.max_prompt_tokens,
        "data.eval.samples_per_prompt": c.data.eval.samples_per_prompt,
        "cluster.start_timeout_s": c.cluster.start_timeout_s,
        "cluster.step_timeout_s": c.cluster.step_timeout_s,
    }
    for name, value in positive.items():
        need(value >= 1, f"{name} must be at least 1, not {value}")
    for name, optional in {
        "sampler.threads": c.sampler.threads,
        "learner.threads": c.learner.threads,
        "cluster.reward_workers": c.cluster.reward_workers,
        "data.eval.limit": c.data.eval.limit,
        "data.eval.max_tokens": c.data.eval.max_tokens,
    }.items():
        need(optional is None or optional >= 1, f"{name} must be at least 1, not {optional}")
    not_negative = {
        "run.steps": c.run.steps,
        "run.seed": c.run.seed,
        "run.save_every": c.run.save_every,
        "run.verify_every": c.run.verify_every,
        "data.eval.every": c.data.eval.every,
        "data.eval.temperature": c.data.eval.temperature,
        "data.eval.top_k": c.data.eval.top_k,
        "algorithm.kl_coef": c.algorithm.kl_coef,
        "algorithm.std_eps": c.algorithm.std_eps,
        "optimizer.lr": c.optimizer.lr,
        "optimizer.warmup_steps": c.optimizer.warmup_steps,
        "optimizer.max_grad_norm": c.optimizer.max_grad_norm,
        "optimizer.weight_decay": c.optimizer.weight_decay,
        "sampler.gpus": c.sampler.gpus,
        "learner.gpus": c.learner.gpus,
    }
    for name, number in not_negative.items():
        need(number >= 0, f"{name} must not be negative, not {number}")


def _validate_objective(c: Config) -> None:
    need(
        c.sampling.temperature > 0,
        f"sampling.temperature must be above 0 in training, not {c.sampling.temperature}: greedy completions have no "
        "distribution to learn from (data.eval.temperature may be 0)",
    )
    need(c.algorithm.group_size >= 2, f"algorithm.group_size must be at least 2, not {c.algorithm.group_size}")
    need(0 < c.algorithm.eps_low < 1, f"algorithm.eps_low must lie between 0 and 1, not {c.algorithm.eps_low}")
    need(c.algorithm.eps_high > 0, f"algorithm.eps_high must be above 0, not {c.algorithm.eps_high}")
    cap = c.algorithm.importance_weight_cap
    need(cap == 0 or cap >= 1, f"algorithm.importance_weight_cap must be 0 (off) or at least 1, not {cap}")
    fraction = c.algorithm.max_failed_fraction
    need(0 <= fraction <= 1, f"algorithm.max_failed_fraction must lie between 0 and 1, not {fraction}")


def _validate_engines(c: Config) -> None:
    stage, offload = c.learner.zero_stage, c.learner.offload
    need(stage in (0, 1, 2, 3), f"learner.zero_stage must be 0, 1, 2 or 3, not {stage}")
    need(
        offload == "none" or (offload == "optimizer" and stage >= 1) or stage == 3,
        f"learner.offload={offload} needs learner.zero_stage={'3' if offload == 'parameters' else '1, 2 or 3'}",
    )
    need(
        not c.learner.reference_offload or (c.algorithm.kl_coef > 0 and stage < 3),
        "learner.reference_offload has no effect: "
        + ("there is no reference when algorithm.kl_coef is 0" if stage < 3 else "at ZeRO 3 the reference is sharded"),
    )
    need(
        (c.sampler.gpus > 0) == (c.learner.gpus > 0),
        f"sampler.gpus={c.sampler.gpus} and learner.gpus={c.learner.gpus}: both run on GPUs or both on CPUs",
    )
    need(0 < c.sampler.gpu_memory_utilization < 1, "sampler.gpu_memory_utilization must lie between 0 and 1")


def _validate_rewards(c: Config) -> None:
    need(len(c.rewards) > 0, "rewards is empty: give at least one {file: reward_fns/x.py}")
    for i, reward in enumerate(c.rewards):
        need(reward.timeout_s > 0, f"rewards[{i}].timeout_s must be above 0, not {reward.timeout_s}")
    names = [reward.name or Path(reward.file).stem for reward in c.rewards]
    for name in names:
        need(names.count(name) == 1, f"rewards: two parts are called {name}; give one of them another function name")


def _validate_data(c: Config) -> None:
    need(
        c.data.messages_column is None or c.data.style == "chat",
        "data.messages_column has no effect with data.style=template; set data.style=chat",
    )
    need(
        c.data.system_prompt is None or (c.data.style == "chat" and c.data.messages_column is None),
        "data.system_prompt has no effect without data.style=chat or when data.messages_column gives the turns",
    )
    if c.data.eval.path is None:
        plain = EvalConfig()
        for f in dataclasses.fields(EvalConfig):
            need(
                getattr(c.data.eval, f.name) == getattr(plain, f.name),
                f"data.eval.{f.name} has no effect without data.eval.path",
            )


def _validate_batch(c: Config) -> None:
    prompts, minibatches = c.algorithm.prompts_per_step, c.algorithm.minibatches_per_step
    legal = [n for n in range(1, prompts + 1) if prompts % n == 0]
    need(
        prompts % minibatches == 0,
        f"algorithm.minibatches_per_step={minibatches} does not divide algorithm.prompts_per_step={prompts}; "
        f"nearest that does: {min(legal, key=lambda n: abs(n - minibatches))}",
    )
    need(
        c.max_row_tokens <= c.learner.tokens_per_microbatch,
        f"learner.tokens_per_microbatch={c.learner.tokens_per_microbatch} cannot hold one row of "
        f"{c.max_row_tokens} tokens (data.max_prompt_tokens + max_tokens); set it to {c.max_row_tokens} or more",
    )
