"""All options, with their types, defaults and meanings.

`grpo options` prints the text below each option. The docstring of a section states its purpose, followed by example
overrides, written as they follow `grpo train RECIPE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import MISSING

from grpo.config.declare import Bound, OnlyWith, OnResume, OnSubmit
from grpo.machine import usable_cpus
from grpo.objective.compatibility import Advantage, Aggregation, Estimator, Gradient, PolicyLoss

HELD_OUT = OnlyWith("data.eval.sets")
REFERENCE = OnlyWith("algorithm.kl_coef", reason="without a reference (algorithm.kl_coef is 0)")
CLIP = OnlyWith("loss", "ppo_clip", "gspo", "cispo", "gmpo")
WEIGHTS = OnlyWith("importance_level", "token", "sequence")
GREEDY = "greedy completions have no distribution to learn from (data.eval.temperature may be 0)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to train.

    model.path=Qwen/Qwen2.5-0.5B-Instruct
    model.path=/models/base model.dtype=float32
    """

    path: Annotated[str, OnResume.CONTENT, OnSubmit.SHARED_OR_HUB] = MISSING
    """Folder in Hugging Face layout, or a Hugging Face Hub id."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of the sampler and the learner. With bfloat16, the optimizer keeps float32 master weights."""
    float32_head: Annotated[bool, OnlyWith("dtype", "bfloat16")] = False
    """Compute the vocabulary projection (LM head) in float32, in both the sampler and the learner."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation of the learner. `auto` selects `eager` if the model caps its attention scores (Gemma 2)
    or supports nothing else; FlashAttention 3 or 2 in bfloat16 on a GPU, if it is installed; otherwise PyTorch's
    `sdpa`."""
    trust_remote_code: bool = False
    """Allow running the Python code that comes with the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """A data set; see docs/data.md."""

    path: Annotated[str, OnResume.CONTENT, OnSubmit.SHARED_OR_HUB] = MISSING
    """A .jsonl or .parquet file, a folder in `datasets` layout, or a Hugging Face Hub id. `PATH:config` selects one of
    several configs."""
    split: Annotated[str, OnResume.CONTENT] = MISSING
    """Split of a folder or hub data set; files have none."""
    name: Annotated[str | None, OnResume.CONTENT] = None
    """Name of the data set in metrics, prompt ids and `rewards[i].sets`. None: the name of the file or folder, or the
    hub id."""
    columns: Annotated[dict[str, str], OnResume.CONTENT] = field(default_factory=dict)
    """Columns to add: name -> Python format string over the columns of the row. A format string that is exactly one
    field gives the value itself, not its text."""
    between: Annotated[dict[str, list[float]], OnResume.CONTENT] = field(default_factory=dict)
    """Range filters: column -> [lowest, highest]. Rows whose number is outside this range are dropped."""
    limit: Annotated[int | None, OnResume.CONTENT, Bound(ge=1)] = None
    """Use only the first N rows that remain after all filters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSetConfig(DatasetConfig):
    """A data set to train on; see docs/data.md.

    data.train=train.jsonl
    data.train[0].limit=1000
    'data.train=[{path: easy.jsonl, weight: 3}, {path: hard.jsonl, weight: 1}]'
    """

    split: Annotated[str, OnResume.CONTENT] = "train"
    """Split of a folder or hub data set; files have none."""
    weight: Annotated[float | None, Bound(gt=0)] = None
    """Relative share of the prompts that are drawn from this data set. Set it for all data sets or for none: without
    weights, the rows of all data sets form one pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSetConfig(DatasetConfig):
    """A held-out data set; see docs/data.md.

    data.eval.sets=test.jsonl
    'data.eval.sets=[{path: test.jsonl}, {path: aime.jsonl, samples_per_prompt: 16}]'
    """

    split: Annotated[str, OnResume.CONTENT] = "test"
    """Split of a folder or hub data set; files have none."""
    samples_per_prompt: Annotated[int | None, Bound(ge=1)] = None
    """Completions sampled per prompt: the k of avg@k. None: `data.eval.samples_per_prompt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data; see docs/evaluation.md.

    data.eval.sets=test.jsonl data.eval.every=10 data.eval.samples_per_prompt=4
    data.eval.sets=test.jsonl data.eval.temperature=0
    """

    sets: list[EvalSetConfig] = field(default_factory=list)
    """Held-out data sets, or the path of a single one. Empty: no evaluation."""
    every: Annotated[int, Bound(ge=0), OnResume.FREE] = 0
    """Evaluate every N steps, in addition to before the first step and after the last. 0: only those two."""
    samples_per_prompt: Annotated[int, Bound(ge=1)] = 1
    """Completions sampled per prompt: the k of avg@k."""
    temperature: Annotated[float, Bound(ge=0)] = 1.0
    """Sampling temperature. 0 samples greedily, which is allowed in evaluation but not in training."""
    top_p: Annotated[float, Bound(gt=0, le=1)] = 1.0
    """Sample only from the most probable tokens whose cumulative probability reaches this value. 1: off."""
    top_k: Annotated[int, Bound(ge=0)] = 0
    """Sample only from the N most probable tokens. 0: off."""
    min_p: Annotated[float, Bound(ge=0, le=1)] = 0.0
    """Exclude tokens whose probability is below this fraction of the most probable token's. 0: off."""
    max_tokens: Annotated[int | None, Bound(ge=1)] = None
    """Maximum length of a completion, in tokens. None: `sampling.max_tokens`."""
    by: tuple[str, ...] = ()
    """Columns, such as level or subject, whose values also get separate evaluation results."""

    def samples_of(self, name: str) -> int:
        """Return the number of completions per prompt for the data set called `name`."""
        own = next((each.samples_per_prompt for each in self.sets if each.name == name), None)
        return own or self.samples_per_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts: the data sets, and how a row becomes a prompt; see docs/data.md.

    data.train=train.jsonl 'data.template={question} Answer:'
    data.style=chat 'data.system_prompt=Think first.' data.max_prompt_tokens=512
    """

    train: list[TrainSetConfig] = MISSING
    """Training data sets, or the path of a single one."""
    style: Literal["template", "chat"] = "template"
    """`template`: the rendered template is the prompt. `chat`: the rendered template is a user turn, formatted with the
    tokenizer's chat template."""
    template: str = "{question}"
    """Python format string over the columns of the row. It gives the prompt, or the user turn with `style: chat`."""
    system_prompt: Annotated[str | None, OnlyWith("style", "chat")] = None
    """System prompt, the first turn of a chat prompt."""
    messages_column: Annotated[str | None, OnlyWith("style", "chat")] = None
    """With `style: chat`, read the turns from this column instead of rendering the template."""
    date: Annotated[str | None, OnlyWith("style", "chat")] = None
    """Fixed date, such as 2026-01-31, for chat templates that insert today's date: otherwise the prompts would change
    from day to day."""
    answer_column: Annotated[str, OnResume.FREE] = "answer"
    """Column of the gold answer, used when rewards are tested before the run."""
    gold_template: Annotated[str, OnResume.FREE] = "{answer}"
    """Python format string that turns a gold answer into a completion, used when rewards are tested before the run."""
    max_prompt_tokens: Annotated[int, Bound(ge=1)] = 1024
    """Maximum length of a prompt, in tokens."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """Refuse the run if prompts exceed `max_prompt_tokens`, or drop these prompts. They are listed either way and never
    truncated."""
    contaminated: Annotated[Literal["report", "drop"], HELD_OUT, OnResume.CONTENT] = "report"
    """Report training prompts that overlap with an evaluation prompt, or drop them."""
    overlap_ngram: Annotated[int, Bound(ge=0), HELD_OUT, OnResume.CONTENT] = 13
    """Two prompts overlap if their texts are identical or share this many consecutive words. 0: only if identical."""
    seed: Annotated[int, Bound(ge=0, le=2**32 - 1)] = 0
    """Seed of the shuffled order of prompts; independent of `run.seed`."""
    eval: Annotated[EvalConfig, HELD_OUT] = field(default_factory=EvalConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Sampling of completions in training; the learner applies the same settings to its own logits.

    sampling.max_tokens=2048 sampling.temperature=0.8
    'sampling.stop=[</answer>]'
    """

    temperature: Annotated[float, Bound(gt=0, why=GREEDY)] = 1.0
    """Sampling temperature."""
    max_tokens: Annotated[int, Bound(ge=1)] = 1024
    """Maximum length of a completion, in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. Slower, because tokens must be decoded to text while sampling."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, in addition to the model's own end tokens."""
    seeded: bool = True
    """Use one seed per completion, so that completions do not depend on the batch or the number of samplers. If false,
    the engine draws from a generator whose state is not in the checkpoints, and a resumed run differs from an
    uninterrupted one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    """The sampler (vLLM).

    cluster.device=gpu sampler.max_num_seqs=512 sampler.gpu_memory_utilization=0.6
    sampler.engine.block_size=32
    """

    threads: Annotated[int | None, Bound(ge=1), OnlyWith("cluster.device", "cpu")] = None
    """Compute threads on CPU. None: one per CPU of the machine (sampler and learner take turns)."""
    gpu_memory_utilization: Annotated[float, Bound(gt=0, lt=1), OnlyWith("cluster.device", "gpu")] = 0.4
    """Fraction of the GPU memory that vLLM may use."""
    kv_cache_gib: Annotated[float | None, Bound(gt=0)] = None
    """Size of the KV cache, in GiB. None: 0.25 on CPU; on GPU, the memory that remains within
    `gpu_memory_utilization`."""
    max_num_seqs: Annotated[int, Bound(ge=1)] = 256
    """Maximum number of completions in flight in one sampler."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs. None: true on CPU, false on GPU."""
    prefix_caching: bool = True
    """Compute the KV cache of a prompt once for all completions of its group."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of vLLM's EngineArgs, under their vLLM names. Arguments that other options set are
    refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """The learner (DeepSpeed).

    learner.zero_stage=3 learner.offload=optimizer
    learner.gradient_checkpointing=true learner.tokens_per_microbatch=32768
    """

    threads: Annotated[int | None, Bound(ge=1)] = None
    """Compute threads of a learner rank on CPU, and of an optimizer in host memory. None: the CPUs of the machine
    divided by the number of learner ranks; on GPUs, the CPUs of the node divided by its number of GPUs."""
    zero_stage: Annotated[int, Bound(ge=0, le=3)] = 2
    """ZeRO stage. 0 shards nothing (float32 only), 1 shards optimizer states, 2 also gradients, 3 also weights."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """States to keep in host memory. `optimizer`: the optimizer states (ZeRO 1-3). `parameters`: the weights as well
    (ZeRO 3)."""
    reference_offload: Annotated[bool, REFERENCE, OnlyWith("zero_stage", 0, 1, 2)] = False
    """Keep the frozen reference model in host memory while it is not in use (ZeRO 0-2; with ZeRO 3 it is sharded)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    tokens_per_microbatch: Annotated[int, Bound(ge=1)] = 16384
    """Maximum number of tokens of one forward pass, padding included. Microbatches are filled with rows up to this
    limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureBudget:
    """Limits on the share of a step's rollouts that may fail with one kind of failure (`grpo.types.FailureKind`). None:
    only `algorithm.max_failed_fraction` applies.

    algorithm.max_failed_of.timeout=0.02
    """

    generation: Annotated[float | None, Bound(ge=0)] = None
    """The sampler returned a logprob that is not finite."""
    exception: Annotated[float | None, Bound(ge=0)] = None
    """A reward function raised an exception."""
    timeout: Annotated[float | None, Bound(ge=0)] = None
    """A reward function ran longer than its `timeout_s`."""
    not_finite: Annotated[float | None, Bound(ge=0)] = None
    """A reward function returned NaN or infinity."""
    wrong_type: Annotated[float | None, Bound(ge=0)] = None
    """A reward function returned something other than a number."""
    wrong_count: Annotated[float | None, Bound(ge=0)] = None
    """A reward function returned a number of rewards that differs from the number of completions."""
    worker_died: Annotated[float | None, Bound(ge=0)] = None
    """The process of a reward function exited, or exceeded its memory limit."""
    abstained: Annotated[float | None, Bound(ge=0)] = None
    """Every reward function abstained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """The objective. docs/objectives.md has the formula, paper and use of every choice; `grpo.objective.compatibility`
    lists the valid combinations.

    algorithm.prompts_per_step=32 algorithm.group_size=8
    algorithm.eps_high=0.28 algorithm.max_refills=4 algorithm.mask_truncated=true
    algorithm.kl_coef=0.001 algorithm.kl_gradient=k2
    """

    prompts_per_step: Annotated[int, Bound(ge=1)] = MISSING
    """Prompts sampled per step; each gives one group of completions."""
    group_size: int = MISSING
    """Completions sampled per prompt."""
    minibatches_per_step: Annotated[int, Bound(ge=1)] = 1
    """Number of minibatches that a step's rollouts are split into. Each minibatch is one optimizer step."""
    epochs_per_step: Annotated[int, Bound(ge=1)] = 1
    """Number of training passes over a step's rollouts."""

    advantage: Advantage = "group_normalized"
    """Advantage estimator: how rewards become advantages."""
    std_eps: Annotated[float, Bound(ge=0), OnlyWith("advantage", "group_normalized", "batch_normalized")] = 1e-6
    """Epsilon added to the standard deviation that advantages are divided by."""
    pass_k: Annotated[int, Bound(ge=2), OnlyWith("advantage", "pass_at_k")] = 4
    """k of `pass_at_k`."""
    gamma: Annotated[float, Bound(ge=0, le=1), OnlyWith("advantage", "reinforce_pp", "gae")] = 1.0
    """Discount factor per token of `reinforce_pp` and `gae`."""
    gae_lambda: Annotated[float, Bound(ge=0, le=1), OnlyWith("advantage", "gae")] = 1.0
    """Lambda of `gae`. With 1, the advantage is the return minus the value."""

    loss: PolicyLoss = "ppo_clip"
    """The policy loss."""
    eps_low: Annotated[float, Bound(gt=0, le=1), CLIP] = 0.2
    """The ratio is clipped at 1 - eps_low; `gmpo` clips the log ratio at -eps_low. 1: no lower bound."""
    eps_high: Annotated[float, Bound(gt=0), CLIP] = 0.2
    """The ratio is clipped at 1 + eps_high; `gmpo` clips the log ratio at eps_high."""
    dual_clip: Annotated[float | None, Bound(gt=1), OnlyWith("loss", "ppo_clip")] = None
    """Upper bound of the ratio when the advantage is negative (dual-clip PPO). None: off."""
    sapo_tau_positive: Annotated[float, Bound(gt=0), OnlyWith("loss", "sapo")] = 1.0
    """Temperature of `sapo` for tokens with a positive advantage."""
    sapo_tau_negative: Annotated[float, Bound(gt=0), OnlyWith("loss", "sapo")] = 1.05
    """Temperature of `sapo` for tokens with a negative advantage."""
    aggregation: Aggregation = "token_mean"
    """Aggregation of the losses of tokens into one loss."""
    constant_length: Annotated[int | None, Bound(ge=1), OnlyWith("aggregation", "constant_length")] = None
    """Number of tokens that the `constant_length` aggregation divides every row by. None: `sampling.max_tokens`."""
    entropy_coef: Annotated[float, Bound(ge=0)] = 0.0
    """Coefficient of the entropy bonus, which is subtracted from the loss."""
    max_kl_old: Annotated[float | None, Bound(gt=0)] = None
    """End the step before the first minibatch on which the KL from the policy at the start of the step exceeds this.
    None: off."""

    kl_coef: Annotated[float, Bound(ge=0)] = 0.0
    """Coefficient of the KL to the frozen reference model. 0: no reference model is loaded."""
    kl_place: Annotated[Literal["loss", "reward"], REFERENCE] = "loss"
    """Add the KL to the reference to the loss, or subtract it from the reward."""
    kl_estimator: Annotated[Estimator, REFERENCE] = "k3"
    """Estimator of the KL to the reference, per token."""
    kl_gradient: Annotated[Gradient, REFERENCE, OnlyWith("kl_place", "loss")] = "autodiff"
    """Gradient of the KL estimator when the KL is in the loss."""
    kl_clamp: Annotated[float | None, Bound(gt=0), REFERENCE, OnlyWith("kl_place", "loss")] = None
    """Clamp the log ratio to the reference to +- this value, in the loss. None: off."""
    kl_target: Annotated[float | None, Bound(gt=0), REFERENCE] = None
    """Target of the measured KL. `kl_coef` is adapted after every step to approach it. None: off."""
    kl_horizon: Annotated[float, Bound(gt=0), OnlyWith("kl_target")] = 10.0
    """Number of steps over which `kl_target` may change `kl_coef` by about a fifth."""
    reference_refresh_every: Annotated[int, Bound(ge=0), REFERENCE] = 0
    """Copy the policy to the reference every N steps. 0: never."""
    reference_average: Annotated[float, Bound(ge=0, lt=1), REFERENCE] = 0.0
    """Move the reference this fraction of the way to the policy after every step (moving average). 0: never."""

    importance_level: Literal["none", "token", "sequence"] = "token"
    """Importance weights that correct the mismatch between sampler and learner. `token`: each token's policy term is
    weighted by exp(old logprob - sampler logprob). `sequence`: by the product of these weights over the sequence.
    `none`: no weights."""
    importance_mode: Annotated[Literal["truncate", "mask"], WEIGHTS] = "truncate"
    """Clamp importance weights to their bounds, or set weights outside the bounds to 0."""
    importance_low: Annotated[float, Bound(ge=0, le=1), WEIGHTS] = 0.0
    """Lower bound of importance weights."""
    importance_high: Annotated[float, Bound(ge=1), WEIGHTS] = 2.0
    """Upper bound of importance weights."""
    rejection_low: Annotated[float | None, Bound(gt=0, lt=1)] = None
    """Exclude rows whose geometric mean of exp(old logprob - sampler logprob) is below this. None: off."""
    rejection_high: Annotated[float | None, Bound(gt=1)] = None
    """Exclude rows whose geometric mean of exp(old logprob - sampler logprob) is above this. None: off."""

    mask_truncated: bool = False
    """Exclude completions that were truncated at `max_tokens` from the loss and its denominators."""
    length_penalty_tokens: Annotated[int, Bound(ge=0)] = 0
    """Number of tokens before `max_tokens` over which the reward decreases linearly, by `length_penalty` at the end. 0:
    off."""
    length_penalty: Annotated[float, Bound(gt=0), OnlyWith("length_penalty_tokens")] = 1.0
    """Amount subtracted from the reward at `max_tokens`, with `length_penalty_tokens`."""
    max_refills: Annotated[int, Bound(ge=0)] = 0
    """Replace groups whose rewards are all equal by sampling more prompts, up to N times per step. 0: off."""
    retire_reward: float | None = None
    """Stop drawing a prompt once all its completions reach this reward. None: off."""

    max_failed_fraction: Annotated[float, Bound(ge=0, le=1)] = 0.1
    """Stop the run if more than this share of a step's rollouts failed, whatever the kind of failure."""
    max_failed_of: FailureBudget = FailureBudget()
    max_mismatch: Annotated[float | None, Bound(gt=0)] = None
    """Stop the run if the root mean square of a step's differences between sampler and learner logprobs exceeds this.
    None: five times the learner's rounding noise on the probe of the weight sync, divided by the sampling temperature
    if that is below 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """A reward function: your own Python function, or a built-in one (docs/graders.md).

    'rewards=[{file: math_answer}]'
    'rewards=[{file: math_answer}, {file: mine.py, name: polite, weight: 0.2}]'
    rewards[0].timeout_s=60 rewards[0].weight=0.5
    """

    file: Annotated[str, OnResume.CONTENT, OnSubmit.PACKED] = MISSING
    """Python file, or the name of a built-in reward function, such as `gsm8k`. Relative paths are resolved against the
    working directory, then against the folder of the recipe."""
    name: str | None = None
    """Name of the function in the file. None: the name of the file without its suffix."""
    weight: float = 1.0
    """Weight of this reward in the sum of all rewards."""
    style: Literal["grpo", "trl", "verl"] = "grpo"
    """Calling convention. `grpo`: f(completion, row, info); `trl`: as TRL's GRPOTrainer calls rewards; `verl`: as verl
    calls them."""
    gold: Annotated[bool | None, OnResume.FREE] = None
    """Test the reward on gold answers before the run: a gold answer must score above 0, and a corrupted one must score
    lower. None: only if the file sets `GOLD = True`."""
    timeout_s: Annotated[float, Bound(gt=0)] = 30.0
    """Deadline of one call, in seconds. A worker that exceeds it is killed."""
    memory_gib: Annotated[float, Bound(ge=0.25, why="Python itself takes as much")] = 8.0
    """Memory limit of a reward worker and the processes that it starts, in GiB. Each worker runs all rewards, so the
    largest value of all rewards applies."""
    sets: tuple[str, ...] = ()
    """Names of the data sets whose rows this reward scores; it abstains on all others. Empty: all data sets."""
    env: tuple[str, ...] = ()
    """Environment variables to pass to the reward although they look like secrets. All others that look like secrets
    are hidden from rewards."""

    @property
    def function(self) -> str:
        """Return the name of the reward function."""
        return self.name or Path(self.file).stem

    def applies_to(self, dataset: str) -> bool:
        """Return whether this reward scores the rows of `dataset`."""
        return not self.sets or dataset in self.sets


def part_names(rewards: Sequence[RewardConfig]) -> list[str]:
    """Return the names of the rewards in metrics and samples: the function name, prefixed with the file name if several
    functions have the same name."""
    functions = [reward.function for reward in rewards]
    return [
        f"{Path(reward.file).stem}.{reward.function}" if functions.count(reward.function) > 1 else reward.function
        for reward in rewards
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    optimizer.lr=3e-6 optimizer.schedule=cosine optimizer.warmup_steps=10
    """

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer algorithm."""
    lr: Annotated[float, Bound(ge=0)] = 1e-6
    """Learning rate at the peak of the schedule."""
    betas: Annotated[tuple[float, float], Bound(ge=0, lt=1), OnlyWith("name", "adamw")] = (0.9, 0.999)
    """Decay rates of AdamW's two moment estimates."""
    eps: Annotated[float, Bound(gt=0), OnlyWith("name", "adamw")] = 1e-8
    """Epsilon added to the denominator of AdamW's update."""
    weight_decay: Annotated[float, Bound(ge=0)] = 0.0
    """Weight decay. It applies to matrices only; with AdamW it is decoupled from the gradient."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of lr after the warmup; `linear` and `cosine` decay to 0."""
    warmup_steps: Annotated[int, Bound(ge=0)] = 0
    """Number of optimizer steps over which lr rises linearly to its value."""
    max_grad_norm: Annotated[float, Bound(ge=0)] = 1.0
    """Clip the gradient to this norm. 0: no clipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """The critic (value model) of `algorithm.advantage=gae`.

    algorithm.advantage=gae critic.coef=0.5 critic.optimizer.lr=1e-5
    """

    path: Annotated[str | None, OnResume.CONTENT, OnSubmit.SHARED_OR_HUB] = None
    """Folder or hub id of the initial weights; a value head initialized to zeros is added. None: `model.path`."""
    coef: Annotated[float, Bound(gt=0)] = 1.0
    """Coefficient of the value loss."""
    clip: Annotated[float | None, Bound(gt=0)] = 0.2
    """Clip values to this distance from the old values, as in the PPO code. None: off."""
    truncated: Annotated[Literal["zero", "bootstrap"], OnlyWith("algorithm.mask_truncated", False)] = "zero"
    """Value of the state after a truncated completion: 0, or the critic's estimate."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The run: length, folder, checkpoints and trackers.

    run.steps=100 run.name=first run.save_every=20 resume=auto
    run.wandb=true run.wandb_project=sums
    """

    name: str | None = None
    """Name of the run folder. None: the name of the recipe, with a number appended if that folder exists."""
    dir: Annotated[str, OnSubmit.SHARED] = "runs"
    """Folder in which run folders are created."""
    steps: Annotated[int, Bound(ge=0)] = MISSING
    """Total number of steps of the run. To extend a finished run, resume it with a larger total, which includes the
    finished steps."""
    seed: Annotated[int, Bound(ge=0, le=2**32 - 1), OnResume.SAME] = 0
    """Seed of the completions and the engines."""
    save_every: Annotated[int, Bound(ge=0)] = 0
    """Write a resumable checkpoint every N steps. 0: only when the run ends, for whatever reason. The weights of the
    last step are always written to model/ as a Hugging Face folder."""
    save_last: bool = True
    """Also write a checkpoint after the last step, so that the run can be resumed with a larger `run.steps`."""
    save_model: Annotated[bool, OnlyWith("save_every")] = False
    """Also write the model as a Hugging Face folder into every checkpoint."""
    keep_last: Annotated[int, Bound(ge=1), OnlyWith("save_every")] = 2
    """Number of most recent checkpoints to keep."""
    keep_every: Annotated[int, Bound(ge=0), OnlyWith("save_every")] = 0
    """Also keep every checkpoint whose step is a multiple of N. 0: off."""
    keep_best: Annotated[str | None, OnlyWith("save_every")] = None
    """Also keep the checkpoint with the highest value of this metric. None: off."""
    verify_every: Annotated[int, Bound(ge=0)] = 50
    """Repeat the full check of the weight sync (perturb, compare, restore) every N steps. 0: only at the start."""
    grace_s: Annotated[float, Bound(gt=0)] = 120.0
    """Time to finish and save the current step after SIGTERM, SIGUSR1 or Ctrl-C, in seconds."""
    trace: bool = False
    """Write a timeline of every step to trace/, to be viewed in Perfetto or chrome://tracing."""
    tensorboard: bool = True
    """Also write the metrics as TensorBoard events to tensorboard/ in the run folder."""
    prometheus: bool = False
    """Also export the metrics through the Prometheus exporter of the Ray cluster, as ray_grpo_<name> with the tag
    `run`."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases."""
    wandb_project: Annotated[str, OnlyWith("wandb")] = "grpo"
    """Weights & Biases project of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The cluster: Ray address, number of samplers and learner ranks, reserved resources, deadlines.

    cluster.device=gpu cluster.samplers=4 cluster.learner_ranks=4
    cluster.device=gpu cluster.layout=disaggregated cluster.samplers=2 cluster.learner_ranks=6
    """

    address: Annotated[str | None, OnSubmit.OWN_CLUSTER] = None
    """Address of a running Ray cluster. None: RAY_ADDRESS if set, otherwise a private Ray instance for this run."""
    queue: bool = False
    """Wait until a running cluster has room for all engines, instead of refusing the run."""
    cpus: Annotated[int | None, OnSubmit.OWN_CLUSTER] = None
    """CPUs of the private Ray instance. None: all CPUs of the machine."""
    gpus: Annotated[int | None, OnSubmit.OWN_CLUSTER] = None
    """GPUs of the private Ray instance. None: all GPUs of the machine."""
    device: Annotated[Literal["cpu", "gpu"], OnResume.ROUNDING] = "cpu"
    """Device of the samplers and the learner."""
    layout: Literal["colocated", "disaggregated"] = "colocated"
    """`colocated`: samplers and learner take turns on the same GPUs and pass weights through shared memory (CUDA IPC).
    `disaggregated`: samplers and learner have separate GPUs and send weights over the network (NCCL; gloo on CPU)."""
    sleep: Annotated[bool | None, OnlyWith("layout", "colocated")] = None
    """Let colocated samplers and learner release GPU memory for each other: while one works, the weights, KV cache and
    optimizer states of the other are offloaded to host memory or discarded. None: true on GPUs; false on CPU, where
    it gains nothing."""
    samplers: Annotated[int, Bound(ge=1)] = 1
    """Number of samplers. Each holds the whole model and samples its share of the completions."""
    tensor_parallel: Annotated[int, Bound(ge=1), OnResume.ROUNDING] = 1
    """Tensor parallelism: number of GPUs (on CPU: processes) that each layer of a sampler is split over."""
    pipeline_parallel: Annotated[int, Bound(ge=1)] = 1
    """Pipeline parallelism: number of groups of `tensor_parallel` GPUs that the layers of a sampler are distributed
    over."""
    learner_ranks: Annotated[int, Bound(ge=1), OnResume.ROUNDING] = 1
    """Number of data-parallel ranks of the learner, one GPU each."""
    sampler_cpus: Annotated[float, Bound(ge=0)] = 1.0
    """CPUs that Ray reserves for each sampler."""
    learner_cpus: Annotated[float, Bound(ge=0)] = 1.0
    """CPUs that Ray reserves for each learner rank."""
    reward_workers: Annotated[int | None, Bound(ge=1)] = None
    """Number of processes that score completions. None: one per CPU of this machine, at most 8."""
    reward_nodes: Annotated[int, Bound(ge=0)] = 0
    """Number of nodes to spread the reward workers over, with one CPU reserved per worker. 0: all run on the driver's
    node."""
    max_replacements: Annotated[int, Bound(ge=0)] = 3
    """Maximum number of dead samplers to replace. The count starts over when all engines are restarted."""
    max_restarts: Annotated[int, Bound(ge=0)] = 2
    """Maximum number of times to restart the engines from the last checkpoint when a learner rank dies or hangs."""
    start_timeout_s: Annotated[float, Bound(ge=1)] = 600.0
    """Deadline for placing and loading the engines, in seconds."""
    step_timeout_s: Annotated[float, Bound(ge=1)] = 3600.0
    """Deadline of each single wait within a step, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampler: Annotated[SamplerConfig, OnResume.FREE] = field(default_factory=SamplerConfig)
    learner: Annotated[LearnerConfig, OnResume.ROUNDING] = field(default_factory=LearnerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: Annotated[CriticConfig, OnlyWith("algorithm.advantage", "gae")] = field(default_factory=CriticConfig)
    run: Annotated[RunConfig, OnResume.FREE] = field(default_factory=RunConfig)
    cluster: Annotated[ClusterConfig, OnResume.FREE] = field(default_factory=ClusterConfig)

    @property
    def on_gpu(self) -> bool:
        return self.cluster.device == "gpu"

    @property
    def sampler_workers(self) -> int:
        """Return the number of processes of one sampler; on GPUs, each has one GPU."""
        return self.cluster.tensor_parallel * self.cluster.pipeline_parallel

    @property
    def gpus_used(self) -> int:
        """Return the number of GPUs of the whole run."""
        c = self.cluster
        if not self.on_gpu:
            return 0
        return c.learner_ranks + (c.samplers * self.sampler_workers if c.layout == "disaggregated" else 0)

    @property
    def takes_turns(self) -> bool:
        """Return whether samplers and learner release GPU memory for each other (`cluster.sleep`)."""
        if self.cluster.sleep is None:
            return self.on_gpu and self.cluster.layout == "colocated"
        return self.cluster.sleep

    @property
    def enforce_eager(self) -> bool:
        """Return whether vLLM runs without CUDA graphs."""
        return not self.on_gpu if self.sampler.enforce_eager is None else self.sampler.enforce_eager

    @property
    def optimizer_steps_per_step(self) -> int:
        return self.algorithm.minibatches_per_step * self.algorithm.epochs_per_step

    @property
    def reward_workers(self) -> int:
        return self.cluster.reward_workers or min(8, usable_cpus())

    def rewards_on(self, node: int) -> int:
        """Return the number of reward workers on the `node`-th of `cluster.reward_nodes`.

        Workers that cannot be divided evenly go to the first nodes, one more each.
        """
        each, more = divmod(self.reward_workers, self.cluster.reward_nodes)
        return each + (node < more)

    @property
    def max_row_tokens(self) -> int:
        """Return the maximum length of a row (prompt plus completion) in training or evaluation, in tokens."""
        completion = max(self.sampling.max_tokens, self.data.eval.max_tokens or 0)
        return self.data.max_prompt_tokens + completion
