"""Validation rules between options; what concerns one option is declared beside it in `grpo.config.schema`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from grpo.config.rules import inert, need, validate_declared
from grpo.config.schema import Config, part_names
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
    validate_declared(c)
    _validate_objective(c)
    _validate_kl(c)
    _validate_corrections(c)
    _validate_batch(c)
    _validate_engines(c)
    _validate_rewards(c)
    _validate_run(c)
    validate_data(c)


def _validate_objective(c: Config) -> None:
    a = c.algorithm
    least = a.pass_k if a.advantage == "pass_at_k" else 2 if a.advantage in compatibility.NEEDS_GROUPS else 1
    need(
        a.group_size >= least,
        f"algorithm.group_size must be at least {least} with algorithm.advantage={a.advantage}, not {a.group_size}",
    )
    allowed = compatibility.LEGAL_AGGREGATIONS[a.loss]
    need(
        a.aggregation in allowed,
        f"algorithm.aggregation={a.aggregation} cannot be combined with algorithm.loss={a.loss}, whose terms are the "
        f"same at every token of a row; it takes {' or '.join(allowed)}",
    )
    if c.optimizer_steps_per_step == 1:
        inert(c, "algorithm.max_kl_old", "with one optimizer step per step")
    by = f"advantage={a.advantage}" if a.advantage in compatibility.WHITENED else f"kl_place={a.kl_place}"
    need(
        a.loss != "gmpo" or (a.advantage not in compatibility.WHITENED and a.kl_place == "loss"),
        f"algorithm.loss=gmpo has one advantage per row, and algorithm.{by} gives each token its own; nearest: "
        "algorithm.loss=gspo",
    )


def _validate_kl(c: Config) -> None:
    a = c.algorithm
    if a.kl_place == "reward":
        need(
            a.kl_estimator in compatibility.REWARD_KL,
            f"algorithm.kl_estimator={a.kl_estimator} in the reward loses nearly all of the KL's gradient; take "
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
        "algorithm.reference_refresh_every and algorithm.reference_average both change the reference; choose one",
    )
    need(
        a.reference_average == 0 or c.model.dtype == "float32",
        "algorithm.reference_average needs model.dtype=float32: in bfloat16, small changes are rounded away; use "
        "algorithm.reference_refresh_every",
    )


def _validate_corrections(c: Config) -> None:
    """Validate mismatch correction, length penalty, dynamic sampling, and the failure and mismatch limits."""
    a = c.algorithm
    buffer = a.length_penalty_tokens
    need(
        buffer <= c.sampling.max_tokens,
        f"algorithm.length_penalty_tokens={buffer} must lie between 0 and sampling.max_tokens={c.sampling.max_tokens}",
    )
    need(
        not (buffer and a.mask_truncated),
        "algorithm.mask_truncated excludes the completions that algorithm.length_penalty_tokens would penalize most; "
        "choose one",
    )
    need(
        a.max_refills == 0 or a.advantage in compatibility.NEEDS_GROUPS,
        f"algorithm.max_refills replaces groups without spread, which algorithm.advantage={a.advantage} can learn from",
    )
    fraction = a.max_failed_fraction
    for kind, bound in dataclasses.asdict(a.max_failed_of).items():
        need(
            bound is None or bound < fraction,
            f"algorithm.max_failed_of.{kind}={bound} must be below algorithm.max_failed_fraction="
            f"{fraction:g}, which limits the sum of all kinds",
        )


def _validate_engines(c: Config) -> None:
    stage, offload = c.learner.zero_stage, c.learner.offload
    need(
        offload == "none" or (offload == "optimizer" and stage >= 1) or stage == 3,
        f"learner.offload={offload} needs learner.zero_stage={'3' if offload == 'parameters' else '1, 2 or 3'}",
    )
    need(
        stage > 0 or c.model.dtype == "float32",
        "learner.zero_stage=0 cannot accumulate bfloat16 gradients in float32 (DeepSpeed has no such optimizer); "
        "nearest: learner.zero_stage=1, which needs no more memory on one rank",
    )
    for name in c.sampler.engine:
        need(
            name not in ENGINE_ARGUMENTS_TAKEN,
            f"sampler.engine.{name} is set by other options of the recipe and cannot be given here",
        )
    need(
        not c.takes_turns or stage in (1, 2),
        f"learner.zero_stage={stage}: DeepSpeed offloads states for a colocated sampler at stages 1 and 2 "
        "only (at 3 those of its own FusedAdam); nearest: cluster.sleep=false, which keeps both in memory",
    )
    need(
        not c.takes_turns or stage != 1 or c.model.dtype == "float32" or offload == "optimizer",
        "learner.zero_stage=1 with bfloat16: DeepSpeed's optimizer for it cannot offload its states for a "
        "colocated sampler; nearest: learner.zero_stage=2",
    )
    if c.on_gpu:
        _validate_gpus(c)
        need(
            not c.model.attention.startswith("flash") or c.model.dtype == "bfloat16",
            f"model.attention={c.model.attention} computes in bfloat16 only; nearest: model.attention=sdpa",
        )
        need(
            c.learner.threads is None or offload != "none",
            f"learner.threads={c.learner.threads} has no effect on a GPU without learner.offload=optimizer or "
            "parameters; leave it out",
        )
    else:
        need(
            not c.model.attention.startswith("flash"),
            f"model.attention={c.model.attention} runs on GPUs only; nearest on CPU: model.attention=sdpa",
        )


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
    need(len(c.rewards) > 0, "rewards is empty: give at least one {file: my_reward.py}")
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
    nodes = c.cluster.reward_nodes
    need(
        nodes <= c.reward_workers,
        f"cluster.reward_nodes={nodes} have no more than cluster.reward_workers={c.reward_workers} workers among them; "
        f"nearest: cluster.reward_nodes={c.reward_workers}",
    )


def _validate_run(c: Config) -> None:
    if c.cluster.address is not None:
        refuse_own_ray(c)
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
        need(c.run.name.isprintable(), f"run.name={c.run.name!r} must be printable, because it is the name of a folder")
    for option, text in (("run.dir", c.run.dir), ("run.name", c.run.name or "")):
        variable = re.search(r"\$(\w+)", text)
        need(
            variable is None,
            f"{option}={text} has {variable and variable[0]}, which is not replaced here; write it in the recipe as "
            f"${{oc.env:{variable and variable[1]}}}, or let the shell replace it",
        )


def refuse_own_ray(c: Config) -> None:
    """Raise UserError for options of a private Ray instance, when the run uses a running cluster."""
    for name in ("cluster.cpus", "cluster.gpus"):
        inert(c, name, "on a cluster that runs already")


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
