"""All options, with their types, defaults and meanings; those of the data and of the algorithm are in files of their
own.

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
from grpo.config.schema_algorithm import REFERENCE, AlgorithmConfig, CriticConfig, OptimizerConfig
from grpo.config.schema_data import DataConfig
from grpo.machine import usable_cpus

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
    memory_gib: Annotated[float, Bound(ge=0.25, why="Python itself needs that much")] = 8.0
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


TOKEN_COLUMNS_LIMIT = 1 << 16
"""Completion tokens of a step up to which values per token are written by default."""


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
    token_columns: bool | None = None
    """Write the learner's logprob, advantage, entropy and importance weight of every trained token to tokens/, for
    `grpo view`: at most 16 bytes per token. None: if a step has at most 65,536 completion tokens
    (`algorithm.prompts_per_step` x `algorithm.group_size` x `sampling.max_tokens`)."""
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

    def evaluates_after(self, step: int) -> bool:
        """Return whether to evaluate after `step`: the last one, and every `data.eval.every` steps."""
        every = self.data.eval.every
        return step == self.run.steps or (every > 0 and step % every == 0)

    @property
    def token_columns(self) -> bool:
        """Return whether the learner writes its values per token."""
        if self.run.token_columns is not None:
            return self.run.token_columns
        completions = self.algorithm.prompts_per_step * self.algorithm.group_size
        return completions * self.sampling.max_tokens <= TOKEN_COLUMNS_LIMIT

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
