"""The one place for options and their defaults: a recipe (YAML) and `key=value` overrides become a frozen `Config`.

Owns the schema, its validation and the batch algebra. Only importer of omegaconf: everyone else sees plain frozen
dataclasses. Every mistake is a `UserError` that names the option, the value and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.types import UserError

REPLAYABLE = "temperature"
NOT_REPLAYABLE = (
    "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens", "logit_bias", "bad_words", "allowed_token_ids", "n", "best_of", "logits_processors",
)  # fmt: skip
"""Sampling settings that the learner cannot replay on its own logits; refused by name in `sampling`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str = MISSING
    """Folder in Hugging Face layout, or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of sampler and learner. With bfloat16 the optimizer keeps float32 master weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of the learner's forward."""
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    path: str | None = None
    """Held-out data, any form that `data.train` takes. None: no evaluation."""
    split: str = "test"
    limit: int | None = None
    """Use the first N rows only."""
    every: int = 0
    """Evaluate every N steps, besides before the first and after the last. 0: only those two."""
    samples_per_prompt: int = 1
    """k of avg@k."""
    temperature: float = 1.0
    """0 is greedy: free here, refused in training."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    max_tokens: int | None = None
    """None: `sampling.max_tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    train: str = MISSING
    """A .jsonl or .parquet file, a folder in `datasets` layout, or a hub id."""
    split: str = "train"
    """Split of a folder or hub data set; files have none."""
    style: Literal["template", "chat"] = "template"
    """`chat`: the rendered template becomes a user turn under the tokenizer's chat template."""
    template: str = "{question}"
    """Python format string over the row's columns."""
    system_prompt: str | None = None
    """First turn of a chat prompt."""
    messages_column: str | None = None
    """With `style: chat`, take the turns from this column instead of the template."""
    answer_column: str = "answer"
    """Where a reward with `gold: true` finds the gold answer."""
    gold_template: str = "{answer}"
    """How a gold answer is written as a completion when rewards are tried out."""
    max_prompt_tokens: int = 1024
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do with longer prompts. They are listed either way and never cut."""
    seed: int = 0
    """Seed of the shuffled order; independent of `run.seed`."""
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """The one record that the sampler samples by and the learner replays."""

    temperature: float = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    """Strings that end a completion; slower, since text must then be produced while sampling."""
    stop_token_ids: tuple[int, ...] = ()
    """End tokens besides the model's own."""
    seeded: bool | None = None
    """One generator per completion: the same completions whatever the batch or the number of samplers.
    None: on for CPU, off for GPU, where it costs a Python loop per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    num_samplers: int = 1
    cpus: float = 1.0
    """CPUs that Ray reserves for each sampler."""
    gpus: float = 0.0
    """GPUs for each sampler; 0 runs vLLM's CPU build. Fractions let sampler and learner share one."""
    threads: int | None = None
    """Compute threads on CPU. None: all of the machine's (sampler and learner take turns)."""
    gpu_memory_utilization: float = 0.4
    kv_cache_gib: float | None = None
    """Space for the KV cache. None: 0.25 on CPU; on GPU what `gpu_memory_utilization` leaves."""
    max_num_seqs: int = 256
    """Completions in flight at once in one sampler."""
    enforce_eager: bool = True
    prefix_caching: bool = True
    engine: dict[str, Any] = field(default_factory=dict)
    """Passed to vLLM's EngineArgs as it is, unvalidated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    ranks: int = 1
    cpus: float = 1.0
    """CPUs that Ray reserves for each rank."""
    gpus: float = 0.0
    threads: int | None = None
    """Compute threads on CPU. None: the machine's, divided by `ranks`."""
    zero_stage: int = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """`optimizer` keeps optimizer states in host memory (ZeRO 1-3), `parameters` the weights as well (ZeRO 3)."""
    reference_offload: bool = False
    """Keep the frozen reference in host memory while it is not used (ZeRO 0-2; at ZeRO 3 it is sharded)."""
    gradient_checkpointing: bool = False
    tokens_per_microbatch: int = 16384
    """Padded tokens in one forward; rows are packed up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    prompts_per_step: int = MISSING
    group_size: int = MISSING
    minibatches_per_step: int = 1
    epochs_per_step: int = 1
    std_eps: float = 1e-6
    """Added to the group's standard deviation."""
    eps_low: float = 0.2
    eps_high: float = 0.2
    """The ratio is clipped to [1 - eps_low, 1 + eps_high]."""
    kl_coef: float = 0.0
    """Coefficient of the k3 KL to the frozen reference. 0: there is no reference."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    importance_weight_cap: float = 2.0
    """Sampler/learner mismatch: exp(old - sampler) is truncated at this. 0 turns the correction off."""
    max_failed_fraction: float = 0.1
    """The run stops when more than this share of a step's rewards failed."""
    max_mismatch: float | None = None
    """The run stops when |sampler - learner| logprob exceeds this on any token. None: 1e-3 in float32; in bfloat16
    it is measured and logged only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    file: str = MISSING
    """Python file; relative paths are looked up from the working directory, then from the recipe's folder."""
    name: str | None = None
    """Function in the file. None: the file's own name."""
    weight: float = 1.0
    style: Literal["grpo", "trl", "verl"] = "grpo"
    gold: bool = False
    """Try it before the run: the gold answer must score, a corrupted one must not."""
    timeout_s: float = 30.0
    """Deadline of one call; the worker is killed when it passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    """Optimizer steps over which lr rises linearly to its value."""
    max_grad_norm: float = 1.0
    """0: no clipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    name: str | None = None
    """None: the recipe's name, with a number behind it when that folder exists."""
    dir: str = "runs"
    steps: int = MISSING
    seed: int = 0
    save_every: int = 0
    """Write a Hugging Face folder to checkpoints/ every N steps; the last step is always written to model/."""
    verify_every: int = 50
    """Repeat the start's full weight-sync check (perturb, compare, restore) every N steps. 0: only at start."""
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "grpo"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    address: str | None = None
    """A running Ray cluster. None: RAY_ADDRESS if set, else a private Ray for this run."""
    cpus: int | None = None
    """CPUs of the private Ray. None: the machine's."""
    gpus: int | None = None
    """GPUs of the private Ray. None: the machine's."""
    reward_workers: int | None = None
    """Processes that score completions. None: one per CPU of this machine, at most 8."""
    start_timeout_s: float = 600.0
    """Deadline for placing and loading the engines."""
    step_timeout_s: float = 3600.0
    """Deadline of any one wait inside a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def on_gpu(self) -> bool:
        return self.learner.gpus > 0

    @property
    def sampling_is_seeded(self) -> bool:
        return not self.on_gpu if self.sampling.seeded is None else self.sampling.seeded

    @property
    def optimizer_steps_per_step(self) -> int:
        return self.algorithm.minibatches_per_step * self.algorithm.epochs_per_step

    @property
    def max_row_tokens(self) -> int:
        """Longest row that a forward may see: prompt and completion, of training or evaluation."""
        completion = max(self.sampling.max_tokens, self.data.eval.max_tokens or 0)
        return self.data.max_prompt_tokens + completion


def load(recipe: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read `recipe`, apply `section.option=value` overrides, check everything that needs no other file.

    Raises UserError naming the file or option at fault.
    """
    path = Path(recipe)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"recipe {path} does not exist{hint}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # yaml's error classes are many; each becomes the same sentence
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} must be a mapping of sections: {', '.join(_names(Config))}")
    for override in overrides:
        tree = _override(tree, override)
    _check_keys(OmegaConf.to_container(tree), Config, "", str(path))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        option = str(getattr(error, "full_key", None) or "")
        reason = str(error).split("\n")[0]
        if "Missing mandatory" in reason or "MissingMandatoryValue" in type(error).__name__:
            raise UserError(f"{path}: {option} is required and not set") from error
        raise UserError(f"{path}: {option}: {reason}") from error
    assert isinstance(config, Config)
    _validate(config)
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` of it gives the same config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _override(tree: DictConfig, text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.\[\]]+", key):
        raise UserError(f"override {text!r} is not of the form section.option=value")
    bracketed = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)
    raw = text.partition("=")[2]
    try:
        value = raw if _is_text(key) else OmegaConf.from_dotlist([f"value={raw}"])["value"]
        if raw == "null":
            value = None
        OmegaConf.update(tree, bracketed, value, force_add=True)
    except Exception as error:  # a bad list index or an unparsable value, in omegaconf's or yaml's own words
        raise UserError(f"override {text!r}: {' '.join(str(error).split())}") from error
    return tree


def _is_text(key: str) -> bool:
    """Whether an option is a string, whose override is taken as it stands: templates are seldom valid YAML."""
    kind: Any = Config
    for part in re.sub(r"\[(\d+)\]", r".\1", key).split("."):
        if part.isdigit():
            kind = RewardConfig
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
    return kind in (str, str | None)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _check_keys(node: Any, cls: type, prefix: str, source: str) -> None:
    """Every key of the tree must be an option; the error names the nearest one."""
    if not isinstance(node, dict):
        raise UserError(f"{source}: {prefix.rstrip('.') or 'the recipe'} must be a mapping, not {node!r}")
    hints = typing.get_type_hints(cls)
    for key, value in node.items():
        name = f"{prefix}{key}"
        if cls is SamplingConfig and key in NOT_REPLAYABLE:
            raise UserError(
                f"{source}: {name} cannot be used in training: the learner replays only {REPLAYABLE}, so the ratio "
                f"would be wrong; data.eval accepts top_p, top_k and min_p"
            )
        if key not in hints:
            raise UserError(f"{source}: unknown option {name}; {_nearest(str(key), cls, prefix)}")
        inner = hints[key]
        if dataclasses.is_dataclass(inner):
            _check_keys(value, typing.cast(type, inner), f"{name}.", source)
        elif key == "rewards" and cls is Config:
            if not isinstance(value, list):
                raise UserError(f"{source}: rewards must be a list of {{file, name, weight, ...}}")
            for i, item in enumerate(value):
                _check_keys(item, RewardConfig, f"rewards[{i}].", source)
        elif inner is str and not isinstance(value, str):
            raise UserError(f"{source}: {name} must be a string, not {value!r}")


def _nearest(key: str, cls: type, prefix: str) -> str:
    """`did you mean ...?`, looking in this section first and then in all of them."""
    here = difflib.get_close_matches(key, _names(cls), n=1, cutoff=0.5)
    if here:
        return f"did you mean {prefix}{here[0]}?"
    everywhere = {
        option: f"{section}.{option}"
        for section, kind in typing.get_type_hints(Config).items()
        if dataclasses.is_dataclass(kind)
        for option in _names(typing.cast(type, kind))
    }
    far = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.6)
    if far:
        return f"did you mean {everywhere[far[0]]}?"
    return f"{prefix.rstrip('.') or 'a recipe'} has {', '.join(_names(cls))}"


def _validate(c: Config) -> None:
    def need(ok: bool, sentence: str) -> None:
        if not ok:
            raise UserError(sentence)

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
    _validate_batch(c, need)
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
    need(len(c.rewards) > 0, "rewards is empty: give at least one {file: reward_fns/x.py}")
    for i, reward in enumerate(c.rewards):
        need(reward.timeout_s > 0, f"rewards[{i}].timeout_s must be above 0, not {reward.timeout_s}")
    names = [reward.name or Path(reward.file).stem for reward in c.rewards]
    for name in names:
        need(names.count(name) == 1, f"rewards: two parts are called {name}; give one of them another function name")
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


def _validate_batch(c: Config, need: typing.Callable[[bool, str], None]) -> None:
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


def options_text() -> str:
    """Every option with its type and default, a line each."""
    lines = []
    for section, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            lines += _option_lines(typing.cast(type, kind), f"{section}.")
        else:
            lines += _option_lines(RewardConfig, "rewards[i].")
    return "\n".join(lines)


def _option_lines(cls: type, prefix: str) -> list[str]:
    lines = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            lines += _option_lines(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
            continue
        default = {} if f.default is dataclasses.MISSING else f.default
        shown = "required" if default == MISSING else repr(default)
        lines.append(f"{prefix}{f.name} = {shown}   ({str(f.type).replace('typing.', '')})")
    return lines
