"""Validation rules: ranges, the batch algebra, and no option without effect."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from grpo.config.rules import inert, need
from grpo.config.schema import (
    AlgorithmConfig,
    ClusterConfig,
    Config,
    CriticConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    part_names,
)
from grpo.config.validate_data import validate_data
from grpo.objective import compatibility

ENGINE_ARGUMENTS_TAKEN = frozenset(
    (
        "model", "tokenizer", "skip_tokenizer_init", "trust_remote_code", "dtype", "seed", "max_model_len",
        "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching", "enable_chunked_prefill",
        "async_scheduling", "kv_cache_memory_bytes",
        "gpu_memory_utilization", "distributed_executor_backend", "disable_log_stats", "generation_config",
        "override_generation_config", "hf_overrides", "load_format", "logprobs_mode", "logits_processors",
        "weight_transfer_config", "tensor_parallel_size", "pipeline_parallel_size", "worker_extension_cls",
        "enable_sleep_mode",
    )
)  # fmt: skip
"""Arguments that `sampler.engine` may not set: other options set them, or the learner could not replay them."""


def validate(c: Config) -> None:
    """Raise UserError for the first invalid option, with the nearest valid value."""
    _validate_numbers(c)
    _validate_ranges(c)
    _validate_objective(c)
    _validate_optimizer(c.optimizer, "optimizer.")
    _validate_optimizer(c.critic.optimizer, "critic.optimizer.")
    need(c.critic.coef > 0, f"critic.coef must be above 0, not {c.critic.coef}")
    need(c.critic.clip is None or c.critic.clip > 0, f"critic.clip must be above 0, not {c.critic.clip}")
    _validate_batch(c)
    _validate_engines(c)
    _validate_rewards(c)
    validate_data(c)


def _validate_numbers(c: Config) -> None:
    """Raise UserError for a NaN or infinity, which could pass the comparisons of the other rules, or a NUL character,
    which is invalid in paths."""

    def walk(name: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                walk(f"{name}.{f.name}", getattr(value, f.name))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(f"{name}[{i}]", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        elif isinstance(value, str):
            need("\0" not in value, f"{name.removeprefix('.')} must not hold a NUL character, as {value!r:.80} does")
        elif isinstance(value, float):
            need(math.isfinite(value), f"{name.removeprefix('.')} must be a finite number, not {value}")

    walk("", c)


def _validate_ranges(c: Config) -> None:
    positive = {
        "algorithm.prompts_per_step": c.algorithm.prompts_per_step,
        "algorithm.minibatches_per_step": c.algorithm.minibatches_per_step,
        "algorithm.epochs_per_step": c.algorithm.epochs_per_step,
        "sampling.max_tokens": c.sampling.max_tokens,
        "cluster.samplers": c.cluster.samplers,
        "cluster.tensor_parallel": c.cluster.tensor_parallel,
        "cluster.pipeline_parallel": c.cluster.pipeline_parallel,
        "sampler.max_num_seqs": c.sampler.max_num_seqs,
        "cluster.learner_ranks": c.cluster.learner_ranks,
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
        "data.eval.max_tokens": c.data.eval.max_tokens,
    }.items():
        need(optional is None or optional >= 1, f"{name} must be at least 1, not {optional}")
    not_negative = {
        "run.steps": c.run.steps,
        "run.seed": c.run.seed,
        "run.save_every": c.run.save_every,
        "run.keep_every": c.run.keep_every,
        "cluster.max_replacements": c.cluster.max_replacements,
        "cluster.max_restarts": c.cluster.max_restarts,
        "run.verify_every": c.run.verify_every,
        "data.eval.every": c.data.eval.every,
        "data.eval.temperature": c.data.eval.temperature,
        "data.eval.top_k": c.data.eval.top_k,
        "data.seed": c.data.seed,
        "data.overlap_ngram": c.data.overlap_ngram,
        "algorithm.kl_coef": c.algorithm.kl_coef,
        "algorithm.entropy_coef": c.algorithm.entropy_coef,
        "algorithm.reference_refresh_every": c.algorithm.reference_refresh_every,
        "algorithm.std_eps": c.algorithm.std_eps,
        "cluster.sampler_cpus": c.cluster.sampler_cpus,
        "cluster.learner_cpus": c.cluster.learner_cpus,
    }
    for name, number in not_negative.items():
        need(number >= 0, f"{name} must not be negative, not {number}")
    for name, seed in {"run.seed": c.run.seed, "data.seed": c.data.seed}.items():
        need(seed < 2**32, f"{name} must be below 2**32 = {2**32}, not {seed}")
    for name, share in {"data.eval.top_p": c.data.eval.top_p, "data.eval.min_p": c.data.eval.min_p}.items():
        need(0 <= share <= 1, f"{name} must lie between 0 and 1, not {share}")
    need(c.data.eval.top_p > 0, "data.eval.top_p must be above 0; 1 turns it off")
    kv = c.sampler.kv_cache_gib
    need(kv is None or kv > 0, f"sampler.kv_cache_gib must be above 0, not {kv}")


def _validate_objective(c: Config) -> None:
    a = c.algorithm
    need(
        c.sampling.temperature > 0,
        f"sampling.temperature must be above 0 in training, not {c.sampling.temperature}: greedy completions have no "
        "distribution to learn from (data.eval.temperature may be 0)",
    )
    least = a.pass_k if a.advantage == "pass_at_k" else 2 if a.advantage in compatibility.NEEDS_GROUPS else 1
    need(
        a.group_size >= least,
        f"algorithm.group_size must be at least {least} with algorithm.advantage={a.advantage}, not {a.group_size}",
    )
    need(a.pass_k >= 2, f"algorithm.pass_k must be at least 2, not {a.pass_k}")
    for name in ("gamma", "gae_lambda"):
        need(0 <= getattr(a, name) <= 1, f"algorithm.{name} must lie between 0 and 1, not {getattr(a, name)}")
    need(0 < a.eps_low <= 1, f"algorithm.eps_low must be above 0 and at most 1, not {a.eps_low}")
    need(a.eps_high > 0, f"algorithm.eps_high must be above 0, not {a.eps_high}")
    need(a.dual_clip is None or a.dual_clip > 1, f"algorithm.dual_clip must be above 1, not {a.dual_clip}")
    for name in ("sapo_tau_positive", "sapo_tau_negative"):
        need(getattr(a, name) > 0, f"algorithm.{name} must be above 0, not {getattr(a, name)}")
    allowed = compatibility.LEGAL_AGGREGATIONS[a.loss]
    need(
        a.aggregation in allowed,
        f"algorithm.aggregation={a.aggregation} does not go with algorithm.loss={a.loss}, whose terms are the same at "
        f"every token of a row; it takes {' or '.join(allowed)}",
    )
    for table, choice, chooser in (
        (compatibility.LOSSES_USING_OPTION, a.loss, "loss"),
        (compatibility.ADVANTAGES_USING_OPTION, a.advantage, "advantage"),
    ):
        for name, users in table.items():
            if choice not in users:
                inert(a, AlgorithmConfig(), (name,), "algorithm.", f"with algorithm.{chooser}={choice}")
    if a.aggregation != "constant_length":
        inert(a, AlgorithmConfig(), ("constant_length",), "algorithm.", f"with algorithm.aggregation={a.aggregation}")
    if c.optimizer_steps_per_step == 1:
        inert(a, AlgorithmConfig(), ("max_kl_old",), "algorithm.", "with one optimizer step per step")
    if a.advantage != "gae":
        need(c.critic == CriticConfig(), "critic has no effect without algorithm.advantage=gae; leave the section out")
    need(
        not (a.mask_truncated and c.critic.truncated == "bootstrap"),
        "critic.truncated=bootstrap has no effect with algorithm.mask_truncated=true, which leaves no truncated row",
    )
    per_token = a.advantage in compatibility.WHITENED or (a.kl_coef > 0 and a.kl_place == "reward")
    need(
        a.loss != "gmpo" or not per_token,
        "algorithm.loss=gmpo has one advantage for a row, and "
        + (
            f"algorithm.advantage={a.advantage}"
            if a.advantage in compatibility.WHITENED
            else "algorithm.kl_place=reward"
        )
        + " gives each token its own; nearest: algorithm.loss=gspo",
    )
    need(
        not (c.model.float32_head and c.model.dtype == "float32"),
        "model.float32_head=true has no effect with model.dtype=float32; leave it out",
    )
    _validate_kl(c)
    _validate_corrections(c)


def _validate_kl(c: Config) -> None:
    a = c.algorithm
    need(a.kl_target is None or a.kl_target > 0, f"algorithm.kl_target must be above 0, not {a.kl_target}")
    need(a.kl_clamp is None or a.kl_clamp > 0, f"algorithm.kl_clamp must be above 0, not {a.kl_clamp}")
    need(a.kl_horizon > 0, f"algorithm.kl_horizon must be above 0, not {a.kl_horizon}")
    need(a.max_kl_old is None or a.max_kl_old > 0, f"algorithm.max_kl_old must be above 0, not {a.max_kl_old}")
    need(
        0 <= a.reference_average < 1, f"algorithm.reference_average must be at least 0 and below 1, not "
        f"{a.reference_average}",
    )  # fmt: skip
    plain, without = AlgorithmConfig(), "without a reference (algorithm.kl_coef is 0)"
    if a.kl_coef == 0:
        names = ("kl_place", "kl_estimator", "kl_gradient", "kl_clamp", "kl_target", "reference_refresh_every")
        inert(a, plain, (*names, "reference_average"), "algorithm.", without)
    if a.kl_target is None:
        inert(a, plain, ("kl_horizon",), "algorithm.", "without algorithm.kl_target")
    if a.kl_place == "reward":
        inert(a, plain, ("kl_gradient", "kl_clamp"), "algorithm.", "with algorithm.kl_place=reward")
        need(
            a.kl_estimator in compatibility.REWARD_KL,
            f"algorithm.kl_estimator={a.kl_estimator} in the reward has next to nothing of the KL's gradient; take "
            "algorithm.kl_estimator=k1",
        )
    elif a.kl_coef > 0:
        why = compatibility.ILLEGAL_KL.get((a.kl_estimator, a.kl_gradient))
        need(
            why is None,
            f"algorithm.kl_estimator={a.kl_estimator} with algorithm.kl_gradient={a.kl_gradient} in the loss: {why}",
        )
    need(
        a.reference_refresh_every == 0 or a.reference_refresh_every < c.run.steps,
        f"algorithm.reference_refresh_every={a.reference_refresh_every} has no effect in run.steps={c.run.steps} steps",
    )
    need(
        not (a.reference_refresh_every and a.reference_average),
        "algorithm.reference_refresh_every and algorithm.reference_average both move the reference; choose one",
    )
    need(
        a.reference_average == 0 or c.model.dtype == "float32",
        "algorithm.reference_average needs model.dtype=float32: in bfloat16 small moves round to none; take "
        "algorithm.reference_refresh_every",
    )


def _validate_corrections(c: Config) -> None:
    """Validate mismatch correction, length penalty, dynamic sampling, and the failure and mismatch limits."""
    a, plain = c.algorithm, AlgorithmConfig()
    if a.importance_level == "none":
        names = ("importance_mode", "importance_low", "importance_high")
        inert(a, plain, names, "algorithm.", "with algorithm.importance_level=none")
    need(
        0 <= a.importance_low <= 1 <= a.importance_high,
        f"algorithm.importance_low={a.importance_low} and algorithm.importance_high={a.importance_high} must lie on "
        "either side of 1, the weight of equal policies",
    )
    low, high = a.rejection_low, a.rejection_high
    need(
        (low is None or 0 < low < 1) and (high is None or high > 1),
        f"algorithm.rejection_low={low} and algorithm.rejection_high={high} must lie on either side of 1",
    )
    buffer = a.length_penalty_tokens
    need(
        0 <= buffer <= c.sampling.max_tokens,
        f"algorithm.length_penalty_tokens={buffer} must lie between 0 and sampling.max_tokens={c.sampling.max_tokens}",
    )
    need(a.length_penalty > 0, f"algorithm.length_penalty must be above 0, not {a.length_penalty}")
    if buffer == 0:
        inert(a, plain, ("length_penalty",), "algorithm.", "without algorithm.length_penalty_tokens")
    need(
        not (buffer and a.mask_truncated),
        "algorithm.mask_truncated leaves out the completions that algorithm.length_penalty_tokens would punish most; "
        "choose one",
    )
    need(a.max_refills >= 0, f"algorithm.max_refills must not be negative, not {a.max_refills}")
    need(
        a.max_refills == 0 or a.advantage in compatibility.NEEDS_GROUPS,
        f"algorithm.max_refills replaces groups without spread, which algorithm.advantage={a.advantage} can learn from",
    )
    fraction = a.max_failed_fraction
    need(0 <= fraction <= 1, f"algorithm.max_failed_fraction must lie between 0 and 1, not {fraction}")
    for kind, bound in dataclasses.asdict(a.max_failed_of).items():
        need(
            bound is None or 0 <= bound < fraction,
            f"algorithm.max_failed_of.{kind}={bound} must not be negative, and below algorithm.max_failed_fraction="
            f"{fraction:g}, which bounds all kinds together",
        )
    need(a.constant_length is None or a.constant_length > 0, "algorithm.constant_length must be above 0")
    need(a.max_mismatch is None or a.max_mismatch > 0, f"algorithm.max_mismatch must be above 0, not {a.max_mismatch}")


def _validate_optimizer(o: OptimizerConfig, prefix: str) -> None:
    need(o.lr >= 0, f"{prefix}lr must not be negative, not {o.lr}")
    need(o.warmup_steps >= 0, f"{prefix}warmup_steps must not be negative, not {o.warmup_steps}")
    need(o.max_grad_norm >= 0, f"{prefix}max_grad_norm must not be negative, not {o.max_grad_norm}")
    need(o.weight_decay >= 0, f"{prefix}weight_decay must not be negative, not {o.weight_decay}")
    need(o.eps > 0, f"{prefix}eps must be above 0, not {o.eps}")
    need(len(o.betas) == 2, f"{prefix}betas must be two numbers, not {list(o.betas)}")
    for i, beta in enumerate(o.betas):
        need(0 <= beta < 1, f"{prefix}betas[{i}] must be at least 0 and below 1, not {beta}")
    if o.name == "sgd":
        inert(o, OptimizerConfig(), ("betas", "eps"), prefix, f"with {prefix}name=sgd")


def _validate_engines(c: Config) -> None:
    stage, offload = c.learner.zero_stage, c.learner.offload
    need(stage in (0, 1, 2, 3), f"learner.zero_stage must be 0, 1, 2 or 3, not {stage}")
    need(
        offload == "none" or (offload == "optimizer" and stage >= 1) or stage == 3,
        f"learner.offload={offload} needs learner.zero_stage={'3' if offload == 'parameters' else '1, 2 or 3'}",
    )
    need(
        stage > 0 or c.model.dtype == "float32",
        "learner.zero_stage=0 cannot accumulate bfloat16 gradients in float32 (DeepSpeed has no such optimizer); "
        "nearest: learner.zero_stage=1, which on one rank takes no more memory",
    )
    need(
        not c.learner.reference_offload or (c.algorithm.kl_coef > 0 and stage < 3),
        "learner.reference_offload has no effect: "
        + ("there is no reference when algorithm.kl_coef is 0" if stage < 3 else "at ZeRO 3 the reference is sharded"),
    )
    need(0 < c.sampler.gpu_memory_utilization < 1, "sampler.gpu_memory_utilization must lie between 0 and 1")
    for name in c.sampler.engine:
        need(
            name not in ENGINE_ARGUMENTS_TAKEN,
            f"sampler.engine.{name} is set by other options of the recipe and cannot be given here",
        )
    need(
        not c.takes_turns or stage in (1, 2),
        f"learner.zero_stage={stage}: DeepSpeed moves states out of the way of a colocated sampler at stages 1 and 2 "
        "only (at 3 those of its own FusedAdam); nearest: cluster.sleep=false, which keeps both in memory",
    )
    need(
        not c.takes_turns or stage != 1 or c.model.dtype == "float32" or offload == "optimizer",
        "learner.zero_stage=1 with bfloat16: DeepSpeed's optimizer for it cannot move its states out of the way of a "
        "colocated sampler; nearest: learner.zero_stage=2",
    )
    need(
        c.cluster.sleep is None or c.cluster.layout == "colocated",
        "cluster.sleep has no effect with cluster.layout=disaggregated; leave it out",
    )
    if c.on_gpu:
        _validate_gpus(c)
        need(
            not c.model.attention.startswith("flash") or c.model.dtype == "bfloat16",
            f"model.attention={c.model.attention} computes in bfloat16 only; nearest: model.attention=sdpa",
        )
        inert(c.sampler, SamplerConfig(), ("threads",), "sampler.", "on a GPU")
        need(
            c.learner.threads is None or offload != "none",
            f"learner.threads={c.learner.threads} has no effect on a GPU but with learner.offload=optimizer or "
            "parameters; leave it out",
        )
    else:
        need(
            not c.model.attention.startswith("flash"),
            f"model.attention={c.model.attention} runs on GPUs only; nearest on CPU: model.attention=sdpa",
        )
        inert(c.sampler, SamplerConfig(), ("gpu_memory_utilization",), "sampler.", "on CPU")


def _validate_gpus(c: Config) -> None:
    """Raise UserError unless colocated sampler workers and learner ranks match one to one."""
    workers = c.cluster.samplers * c.sampler_workers
    need(
        c.cluster.layout == "disaggregated" or workers == c.cluster.learner_ranks,
        f"cluster.layout=colocated puts a learner rank on every GPU of a sampler: {c.cluster.samplers} samplers x "
        f"{c.cluster.tensor_parallel} tensor_parallel x {c.cluster.pipeline_parallel} pipeline_parallel are {workers} "
        f"GPUs, cluster.learner_ranks={c.cluster.learner_ranks}; nearest: cluster.learner_ranks={workers}, or "
        "cluster.layout=disaggregated",
    )


def _validate_rewards(c: Config) -> None:
    need(len(c.rewards) > 0, "rewards is empty: give at least one {file: reward_fns/x.py}")
    for i, reward in enumerate(c.rewards):
        need(reward.timeout_s > 0, f"rewards[{i}].timeout_s must be above 0, not {reward.timeout_s}")
        need(
            reward.memory_gib >= 0.25,
            f"rewards[{i}].memory_gib={reward.memory_gib:g} is less than Python takes; nearest: 0.25",
        )
    need(
        any(reward.weight for reward in c.rewards),
        "rewards[0].weight: no reward has a weight other than 0, so nothing would be learned; nearest: 1.0",
    )
    names = part_names(c.rewards)
    for name in names:
        twice = [i for i, other in enumerate(names) if other == name]
        need(
            len(twice) == 1,
            f"rewards[{twice[0]}] and rewards[{twice[-1]}] are both {name}: the same function twice, or files of the "
            "same name with functions of the same name; rename one",
        )
    if not c.run.wandb:
        inert(c.run, RunConfig(), ("wandb_project",), "run.", "without run.wandb=true")
    nodes = c.cluster.reward_nodes
    need(nodes >= 0, f"cluster.reward_nodes must not be negative, not {nodes}")
    need(
        nodes <= c.reward_workers,
        f"cluster.reward_nodes={nodes} have no more than cluster.reward_workers={c.reward_workers} workers among them; "
        f"nearest: cluster.reward_nodes={c.reward_workers}",
    )
    if c.cluster.address is not None:
        refuse_own_ray(c)
    need(c.run.grace_s > 0, f"run.grace_s must be above 0, not {c.run.grace_s}")
    need(c.run.keep_last >= 1, f"run.keep_last must be at least 1, not {c.run.keep_last}")
    if c.run.save_every == 0:
        names_of_saving = ("save_model", "keep_last", "keep_every", "keep_best")
        inert(c.run, RunConfig(), names_of_saving, "run.", "without run.save_every")
    if (c.run.keep_best or "").startswith("eval/"):
        every = c.data.eval.every
        need(
            bool(c.data.eval.sets) and every > 0 and c.run.save_every % every == 0,
            f"run.keep_best={c.run.keep_best} needs an evaluation whenever a checkpoint is written: data.eval.sets, "
            f"and data.eval.every={c.run.save_every} (the value of run.save_every) or a divisor of it, not {every}",
        )
    if c.run.name is not None:
        need(
            c.run.name not in ("", ".", "..") and "/" not in c.run.name and "\0" not in c.run.name,
            f"run.name={c.run.name} must be the name of a folder inside run.dir, without slashes; "
            f"nearest: run.name={Path(c.run.name).name or 'run'}",
        )
        need(c.run.name.isprintable(), f"run.name={c.run.name!r} must be printable: it is a folder's name")
    for option, text in (("run.dir", c.run.dir), ("run.name", c.run.name or "")):
        variable = re.search(r"\$(\w+)", text)
        need(
            variable is None,
            f"{option}={text} has {variable and variable[0]}, which is not replaced here; write it in the recipe as "
            f"${{oc.env:{variable and variable[1]}}}, or let the shell replace it",
        )


def refuse_own_ray(c: Config) -> None:
    """Raise UserError for options of a private Ray instance, when the run uses a running cluster."""
    inert(c.cluster, ClusterConfig(), ("cpus", "gpus"), "cluster.", "on a cluster that runs already")


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
