"""Every option: its type, its default and what it means.

`grpo options` prints the text below each option. A section's docstring has what it is for, then lines of options as
examples, as they are written behind `grpo train RECIPE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from grpo.machine import usable_cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model that is trained.

    model.path=Qwen/Qwen2.5-0.5B-Instruct
    model.path=/models/base model.dtype=float32
    """

    path: str = MISSING
    """Folder in Hugging Face layout, or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of sampler and learner. With bfloat16 the optimizer keeps float32 master weights."""
    float32_head: bool = False
    """Compute the vocabulary projection in float32, in sampler and learner."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention of the learner's forward. `auto`: `eager` where the model caps its attention scores (Gemma 2) or has no
    other; FlashAttention 3 or 2 in bfloat16 on a GPU where it is installed; else PyTorch's own (`sdpa`)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """One data set; docs/data.md."""

    path: str = MISSING
    """A .jsonl or .parquet file, a folder in `datasets` layout, or a hub id; `PATH:config` where there are several."""
    split: str = MISSING
    """Split of a folder or hub data set; files have none."""
    name: str | None = None
    """What it is called in metrics, prompt ids and `rewards[i].sets`. None: the file's or folder's name, or the hub
    id."""
    columns: dict[str, str] = field(default_factory=dict)
    """New column: Python format string over the row's own. Exactly one field gives the value itself."""
    between: dict[str, list[float]] = field(default_factory=dict)
    """Column: [lowest, highest]. Rows whose number lies elsewhere are left out."""
    limit: int | None = None
    """Use the first N of the rows that every filter has left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSetConfig(DatasetConfig):
    """A data set to train on; docs/data.md.

    data.train=train.jsonl
    data.train[0].limit=1000
    'data.train=[{path: easy.jsonl, weight: 3}, {path: hard.jsonl, weight: 1}]'
    """

    split: str = "train"
    """Split of a folder or hub data set; files have none."""
    weight: float | None = None
    """Share of the prompts that are drawn from it, relative to the other sets'. All or none: without weights the rows
    of all sets are one pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSetConfig(DatasetConfig):
    """A held-out data set; docs/data.md.

    data.eval.sets=test.jsonl
    'data.eval.sets=[{path: test.jsonl}, {path: aime.jsonl, samples_per_prompt: 16}]'
    """

    split: str = "test"
    """Split of a folder or hub data set; files have none."""
    samples_per_prompt: int | None = None
    """k of avg@k. None: `data.eval.samples_per_prompt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data; docs/evaluation.md.

    data.eval.sets=test.jsonl data.eval.every=10 data.eval.samples_per_prompt=4
    data.eval.sets=test.jsonl data.eval.temperature=0
    """

    sets: list[EvalSetConfig] = field(default_factory=list)
    """Held-out data sets, or the path of one. None: no evaluation."""
    every: int = 0
    """Evaluate every N steps, besides before the first and after the last. 0: only those two."""
    samples_per_prompt: int = 1
    """k of avg@k."""
    temperature: float = 1.0
    """Sampling temperature. 0 is greedy: free here, refused in training."""
    top_p: float = 1.0
    """Sample from the most probable tokens that together have this share of the probability. 1: off."""
    top_k: int = 0
    """Sample from the N most probable tokens. 0: off."""
    min_p: float = 0.0
    """Leave out tokens less probable than this share of the most probable one. 0: off."""
    max_tokens: int | None = None
    """Longest completion, in tokens. None: `sampling.max_tokens`."""
    by: tuple[str, ...] = ()
    """Columns such as level or subject: the numbers are given for each of their values, too."""

    def samples_of(self, name: str) -> int:
        """Completions of each prompt of the data set called `name`."""
        own = next((each.samples_per_prompt for each in self.sets if each.name == name), None)
        return own or self.samples_per_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts: the data sets, and how a row becomes a prompt; docs/data.md.

    data.train=train.jsonl 'data.template={question} Answer:'
    data.style=chat 'data.system_prompt=Think first.' data.max_prompt_tokens=512
    """

    train: list[TrainSetConfig] = MISSING
    """Data sets, or the path of one."""
    style: Literal["template", "chat"] = "template"
    """`template`: the rendered template is the prompt. `chat`: it becomes a user turn under the tokenizer's chat
    template."""
    template: str = "{question}"
    """Python format string over the row's columns, which gives the prompt or its user turn."""
    system_prompt: str | None = None
    """First turn of a chat prompt."""
    messages_column: str | None = None
    """With `style: chat`, take the turns from this column instead of the template."""
    date: str | None = None
    """Day, as 2026-01-31, for a chat template that writes today's: it would make other prompts tomorrow."""
    answer_column: str = "answer"
    """Where the gold answer is found when rewards are tried out."""
    gold_template: str = "{answer}"
    """How a gold answer is written as a completion when rewards are tried out."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do with longer prompts. They are listed either way and never cut."""
    contaminated: Literal["report", "drop"] = "report"
    """What to do with training prompts that overlap with an evaluation prompt."""
    overlap_ngram: int = 13
    """Prompts overlap when they are the same text or share this many words in a row. 0: only the same text."""
    seed: int = 0
    """Seed of the shuffled order; independent of `run.seed`."""
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How completions are sampled in training; the learner replays the same settings.

    sampling.max_tokens=2048 sampling.temperature=0.8
    'sampling.stop=[</answer>]'
    """

    temperature: float = 1.0
    """Sampling temperature, above 0."""
    max_tokens: int = 1024
    """Longest completion, in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; slower, since text must then be produced while sampling."""
    stop_token_ids: tuple[int, ...] = ()
    """End tokens besides the model's own."""
    seeded: bool = True
    """One seed per completion: the same completions whatever the batch or the number of samplers. Without seeds the
    engine draws from a generator that no checkpoint keeps, and a resumed run goes on otherwise than a straight one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    """vLLM, which samples.

    cluster.device=gpu sampler.max_num_seqs=512 sampler.gpu_memory_utilization=0.6
    sampler.engine.block_size=32
    """

    threads: int | None = None
    """Compute threads on CPU. None: all of the machine's (sampler and learner take turns)."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU's memory that vLLM may take."""
    kv_cache_gib: float | None = None
    """Space for the KV cache. None: 0.25 on CPU; on GPU what `gpu_memory_utilization` leaves."""
    max_num_seqs: int = 256
    """Completions in flight at once in one sampler."""
    enforce_eager: bool | None = None
    """Do without CUDA graphs. None: only on CPU, where there are none."""
    prefix_caching: bool = True
    """Compute the prompt once for all completions of a group."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's EngineArgs, by its own names; what other options set is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """DeepSpeed, which learns.

    learner.zero_stage=3 learner.offload=optimizer
    learner.gradient_checkpointing=true learner.tokens_per_microbatch=32768
    """

    threads: int | None = None
    """Compute threads of a rank on CPU, and of an optimizer in host memory. None: the machine's, divided by the
    learner's ranks; on a GPU the node's, divided by its GPUs."""
    zero_stage: int = 2
    """0 keeps everything on every rank (float32 only), 1 shards optimizer states, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """`optimizer` keeps optimizer states in host memory (ZeRO 1-3), `parameters` the weights as well (ZeRO 3)."""
    reference_offload: bool = False
    """Keep the frozen reference in host memory while it is not used (ZeRO 0-2; at ZeRO 3 it is sharded)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    tokens_per_microbatch: int = 16384
    """Padded tokens in one forward; rows are packed up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureBudget:
    """Shares of a step's rollouts that may fail by one kind (`grpo.types.FailureKind`). None: only the sum counts.

    algorithm.max_failed_of.timeout=0.02
    """

    generation: float | None = None
    """The sampler gave a logprob that is not finite."""
    exception: float | None = None
    """A reward function raised an exception."""
    timeout: float | None = None
    """A reward function ran longer than its `timeout_s`."""
    not_finite: float | None = None
    """A reward function returned NaN or infinity."""
    wrong_type: float | None = None
    """A reward function returned what is no number."""
    wrong_count: float | None = None
    """A reward function returned more or fewer rewards than completions."""
    worker_died: float | None = None
    """A reward function ended its process, or used too much memory."""
    abstained: float | None = None
    """Every reward function abstained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """The objective; docs/objectives.md has the formula, paper and use of every choice, and what goes together is in
    `grpo.objective.legal`.

    algorithm.prompts_per_step=32 algorithm.group_size=8
    algorithm.eps_high=0.28 algorithm.max_refills=4 algorithm.mask_truncated=true
    algorithm.kl_coef=0.001 algorithm.kl_gradient=k2
    """

    prompts_per_step: int = MISSING
    """Prompts sampled in a step, one group each."""
    group_size: int = MISSING
    """Completions of each prompt."""
    minibatches_per_step: int = 1
    """Parts that a step's rollouts are split into, with one optimizer step each."""
    epochs_per_step: int = 1
    """How often a step's rollouts are trained on."""

    advantage: Literal[
        "group_normalized", "group_centered", "leave_one_out", "batch_normalized", "optimal_baseline", "pass_at_k",
        "reinforce_pp", "reinforce_pp_baseline", "gae",
    ] = "group_normalized"  # fmt: skip
    """How rewards become advantages."""
    std_eps: float = 1e-6
    """Added to the standard deviation that advantages are divided by."""
    pass_k: int = 4
    """k of `pass_at_k`."""
    gamma: float = 1.0
    """Discount per token of `reinforce_pp` and `gae`."""
    gae_lambda: float = 1.0
    """Lambda of `gae`. 1: the return minus the value."""

    loss: Literal["ppo_clip", "gspo", "cispo", "sapo", "gmpo", "reinforce"] = "ppo_clip"
    """The policy loss."""
    eps_low: float = 0.2
    """The ratio is clipped at 1 - eps_low; `gmpo` clips the log ratio at -eps_low. 1: no lower bound."""
    eps_high: float = 0.2
    """The ratio is clipped at 1 + eps_high; `gmpo` clips the log ratio at eps_high."""
    dual_clip: float | None = None
    """With a negative advantage the ratio counts no further than this; above 1. None: off."""
    sapo_tau_positive: float = 1.0
    """Temperature of `sapo` where the advantage is positive."""
    sapo_tau_negative: float = 1.05
    """Temperature of `sapo` where the advantage is negative."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean"] = "token_mean"
    """How the losses of tokens are averaged."""
    constant_length: int | None = None
    """Tokens that `constant_length` divides every row by. None: `sampling.max_tokens`."""
    entropy_coef: float = 0.0
    """The loss falls by this times the entropy."""
    max_kl_old: float | None = None
    """The step ends before the minibatch at which the KL from the step's start exceeds this. None: off."""

    kl_coef: float = 0.0
    """Coefficient of the KL to the frozen reference. 0: there is no reference."""
    kl_place: Literal["loss", "reward"] = "loss"
    """Put the KL to the reference into the loss, or into the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL to the reference, per token."""
    kl_gradient: Literal["autodiff", "k2", "ratio_weighted"] = "autodiff"
    """Gradient of the KL estimator in the loss."""
    kl_clamp: float | None = None
    """The log ratio to the reference is held within +- this, in the loss. None: off."""
    kl_target: float | None = None
    """Adapt `kl_coef` after every step so that the measured KL goes towards this. None: off."""
    kl_horizon: float = 10.0
    """Steps in which `kl_coef` may change by a fifth."""
    reference_refresh_every: int = 0
    """Copy the policy to the reference every N steps. 0: never."""
    reference_average: float = 0.0
    """After every step the reference moves this share of the way to the policy. 0: never."""

    importance_level: Literal["none", "token", "sequence"] = "token"
    """Weight the policy term by exp(old - sampler), the mismatch of the token or of its sequence."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """Clamp these weights to their bounds, or set them to 0 beyond."""
    importance_low: float = 0.0
    """Lower bound of these weights."""
    importance_high: float = 2.0
    """Upper bound of these weights."""
    rejection_low: float | None = None
    """Leave out rows whose geometric mean of exp(old - sampler) lies below this. None: off."""
    rejection_high: float | None = None
    """Leave out rows whose geometric mean of exp(old - sampler) lies above this. None: off."""

    mask_truncated: bool = False
    """Leave out completions that ran out of `max_tokens`: they are in no loss and no denominator."""
    length_penalty_tokens: int = 0
    """Within this many tokens of `max_tokens` the reward falls linearly, by `length_penalty` at the end. 0: off."""
    length_penalty: float = 1.0
    """What the reward has lost at `max_tokens`, with `length_penalty_tokens`."""
    max_refills: int = 0
    """Replace groups without spread by sampling further prompts, up to N times a step. 0: off."""
    retire_reward: float | None = None
    """A prompt whose completions all reach this reward is not drawn again. None: off."""

    max_failed_fraction: float = 0.1
    """The run stops when more than this share of a step's rollouts failed, by whatever kind."""
    max_failed_of: FailureBudget = FailureBudget()
    max_mismatch: float | None = None
    """The run stops when the root mean square of a step's sampler minus learner logprobs exceeds this. None: five times
    the learner's rounding noise on the probe of the weight sync, divided by a temperature below 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """A reward function: a Python function of the user, or one of reward_fns/; docs/graders.md.

    'rewards=[{file: reward_fns/math_answer.py}]'
    'rewards=[{file: reward_fns/math_answer.py}, {file: mine.py, name: polite, weight: 0.2}]'
    rewards[0].timeout_s=60 rewards[0].weight=0.5
    """

    file: str = MISSING
    """Python file; relative paths are looked up from the working directory, then from the recipe's folder."""
    name: str | None = None
    """Function in the file. None: the file's own name."""
    weight: float = 1.0
    """Factor of its value in the sum of all rewards."""
    style: Literal["grpo", "trl", "verl"] = "grpo"
    """How it is called: f(completion, row, info) of this package, as TRL's GRPOTrainer calls it, or as verl does."""
    gold: bool | None = None
    """Try it before the run: the gold answer must score, a corrupted one must not. None: where the file says
    `GOLD = True`."""
    timeout_s: float = 30.0
    """Deadline of one call; the worker is killed when it passes."""
    memory_gib: float = 8.0
    """Memory that it and what it starts may use; of several rewards the largest counts, as a worker runs all."""
    sets: tuple[str, ...] = ()
    """Names of the data sets whose rows it scores; on others it abstains. Empty: all."""
    env: tuple[str, ...] = ()
    """Environment variables that it needs although they look like secrets, which are otherwise kept from rewards."""

    @property
    def function(self) -> str:
        """The function's name."""
        return self.name or Path(self.file).stem

    def applies_to(self, dataset: str) -> bool:
        """Whether it scores the rows of this data set."""
        return not self.sets or dataset in self.sets


def part_names(rewards: Sequence[RewardConfig]) -> list[str]:
    """What the rewards are called in metrics and samples: the function's name, with the file's name before it where
    two functions are called the same."""
    functions = [reward.function for reward in rewards]
    return [
        f"{Path(reward.file).stem}.{reward.function}" if functions.count(reward.function) > 1 else reward.function
        for reward in rewards
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    optimizer.lr=3e-6 optimizer.schedule=cosine optimizer.warmup_steps=10
    """

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    lr: float = 1e-6
    """Learning rate; the highest one of the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two averages."""
    eps: float = 1e-8
    """Added to the denominator of AdamW's step."""
    weight_decay: float = 0.0
    """Weight decay, of matrices alone; AdamW's is decoupled from the gradient."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of lr after the warmup; `linear` and `cosine` end at 0."""
    warmup_steps: int = 0
    """Optimizer steps over which lr rises linearly to its value."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm. 0: no clipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """The value model of `algorithm.advantage=gae`.

    algorithm.advantage=gae critic.coef=0.5 critic.optimizer.lr=1e-5
    """

    path: str | None = None
    """Folder or hub id of its weights; a head of zeros is put on. None: `model.path`."""
    coef: float = 1.0
    """Factor of the value loss."""
    clip: float | None = 0.2
    """Values are clipped to this distance from their old ones, as in PPO's code. None: off."""
    truncated: Literal["zero", "bootstrap"] = "zero"
    """Value of the state behind a truncated completion: 0, or the critic's estimate."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The run: its length, its folder, what it keeps and where it reports.

    run.steps=100 run.name=first run.save_every=20 resume=auto
    run.wandb=true run.wandb_project=sums
    """

    name: str | None = None
    """Name of the run's folder. None: the recipe's name, with a number behind it when that folder exists."""
    dir: str = "runs"
    """The folder that holds the runs' folders."""
    steps: int = MISSING
    """Steps of the run. Of a finished run that is resumed: all of them, the finished ones too."""
    seed: int = 0
    """Seed of the completions and of the engines."""
    save_every: int = 0
    """Write a checkpoint every N steps, from which the run can be resumed. 0: only at the end, of whatever kind it is.
    The last step's weights are always written to model/ as a Hugging Face folder."""
    save_last: bool = True
    """Write a checkpoint after the last step, too, from which a longer run (`run.steps`) can go on."""
    save_model: bool = False
    """Put a Hugging Face folder into every checkpoint, too."""
    keep_last: int = 2
    """Keep the last N checkpoints."""
    keep_every: int = 0
    """Keep the checkpoints of every N-th step, too. 0: none of these."""
    keep_best: str | None = None
    """Keep the checkpoint with the highest value of this metric, too."""
    verify_every: int = 50
    """Repeat the start's full weight-sync check (perturb, compare, restore) every N steps. 0: only at start."""
    grace_s: float = 120.0
    """After SIGTERM, SIGUSR1 or Ctrl-C, the step under way has this long to be finished and saved."""
    trace: bool = False
    """Write a timeline of every step to trace/, for Perfetto or chrome://tracing."""
    tensorboard: bool = True
    """Write the metrics to tensorboard/ in the run's folder, too."""
    prometheus: bool = False
    """Hand the metrics to the exporter of the Ray cluster, as ray_grpo_<name> with the tag `run`."""
    wandb: bool = False
    """Send the metrics to Weights & Biases, too."""
    wandb_project: str = "grpo"
    """Project of the run there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Machines: which Ray, how many samplers and learner ranks, what is reserved, how long is waited.

    cluster.device=gpu cluster.samplers=4 cluster.learner_ranks=4
    cluster.device=gpu cluster.layout=disaggregated cluster.samplers=2 cluster.learner_ranks=6
    """

    address: str | None = None
    """A running Ray cluster. None: RAY_ADDRESS if set, else a private Ray for this run."""
    queue: bool = False
    """Wait until a running cluster has room for all engines, where the run would else be refused."""
    cpus: int | None = None
    """CPUs of the private Ray. None: the machine's."""
    gpus: int | None = None
    """GPUs of the private Ray. None: the machine's."""
    device: Literal["cpu", "gpu"] = "cpu"
    """What samplers and learner compute on."""
    layout: Literal["colocated", "disaggregated"] = "colocated"
    """`colocated`: samplers and learner take turns on the same GPUs, weights change hands where they are.
    `disaggregated`: each has its own, weights go over the network (NCCL, on CPU gloo)."""
    sleep: bool | None = None
    """Colocated samplers and learner leave each other the memory of the GPU: while one works, the other's weights, KV
    cache and optimizer states are in host memory or gone. None: on GPUs; on CPU there is nothing to gain."""
    samplers: int = 1
    """Samplers; each holds the whole model and samples its share of the completions."""
    tensor_parallel: int = 1
    """GPUs (on CPU: processes) that every layer of one sampler is split over."""
    pipeline_parallel: int = 1
    """Groups of them that the layers of one sampler are dealt out to."""
    learner_ranks: int = 1
    """Data-parallel ranks of the learner, a GPU each."""
    sampler_cpus: float = 1.0
    """CPUs that Ray reserves for each sampler."""
    learner_cpus: float = 1.0
    """CPUs that Ray reserves for each rank of the learner."""
    reward_workers: int | None = None
    """Processes that score completions. None: one per CPU of this machine, at most 8."""
    reward_nodes: int = 0
    """Nodes that these are spread over, a CPU reserved for each of them. 0: all are beside the driver."""
    max_replacements: int = 3
    """How many samplers that died may be replaced; counted anew when all engines are started again."""
    max_restarts: int = 2
    """How often the engines may be started again from the last checkpoint when a learner rank dies or hangs."""
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
    critic: CriticConfig = field(default_factory=CriticConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def on_gpu(self) -> bool:
        return self.cluster.device == "gpu"

    @property
    def sampler_workers(self) -> int:
        """Processes of one sampler, on GPUs a GPU each."""
        return self.cluster.tensor_parallel * self.cluster.pipeline_parallel

    @property
    def gpus_used(self) -> int:
        """GPUs of the whole run."""
        c = self.cluster
        if not self.on_gpu:
            return 0
        return c.learner_ranks + (c.samplers * self.sampler_workers if c.layout == "disaggregated" else 0)

    @property
    def takes_turns(self) -> bool:
        """Whether samplers and learner leave each other the memory."""
        if self.cluster.sleep is None:
            return self.on_gpu and self.cluster.layout == "colocated"
        return self.cluster.sleep

    @property
    def enforce_eager(self) -> bool:
        """Whether vLLM runs without CUDA graphs."""
        return not self.on_gpu if self.sampler.enforce_eager is None else self.sampler.enforce_eager

    @property
    def optimizer_steps_per_step(self) -> int:
        return self.algorithm.minibatches_per_step * self.algorithm.epochs_per_step

    @property
    def reward_workers(self) -> int:
        return self.cluster.reward_workers or min(8, usable_cpus())

    def rewards_on(self, node: int) -> int:
        """Reward workers on the `node`-th of `cluster.reward_nodes`; the first ones have one more where they must."""
        each, more = divmod(self.reward_workers, self.cluster.reward_nodes)
        return each + (node < more)

    @property
    def max_row_tokens(self) -> int:
        """Longest row that a forward may see: prompt and completion, of training or evaluation."""
        completion = max(self.sampling.max_tokens, self.data.eval.max_tokens or 0)
        return self.data.max_prompt_tokens + completion
