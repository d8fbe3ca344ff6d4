"""The sections algorithm, optimizer and critic: what is optimized, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from omegaconf import MISSING

from grpo.config.declare import Bound, OnlyWith, OnResume, OnSubmit
from grpo.objective.compatibility import Advantage, Aggregation, Estimator, Gradient, PolicyLoss

REFERENCE = OnlyWith("algorithm.kl_coef", reason="without a reference (algorithm.kl_coef is 0)")
CLIP = OnlyWith("loss", "ppo_clip", "gspo", "cispo", "gmpo")
WEIGHTS = OnlyWith("importance_level", "token", "sequence")


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
