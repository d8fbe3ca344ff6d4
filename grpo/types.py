"""Records passed between modules: frozen, slotted, keyword-only, complete when created.

Dimension letters in all docstrings of the package:
    P prompts of a step    G completions of a prompt (group_size)    R = P*G rollouts
    L tokens of a prompt   C tokens of a completion                  S = L+C tokens of a row
    B rows of a microbatch T = max(S)-1 target positions, right-padded
    N trained tokens of a microbatch, row after row (`grpo.learner.prepare`)

The token axis is shifted once, in `grpo.batching`: every [B,T] tensor is aligned to the *target* token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # so that `grpo --help` and option errors do not import torch
    import torch

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value of JSON or YAML."""
Unchecked: TypeAlias = object
"""A value from outside, of a type that has to be checked before use."""

FinishReason = Literal["stop", "length", "aborted"]
"""Reason why the engine ended a completion: an end token or stop string was sampled, `max_tokens` was reached, or
neither: its generation has failed."""

FailureKind = Literal[
    "generation", "exception", "timeout", "not_finite", "wrong_type", "wrong_count", "worker_died", "abstained"
]
"""Kind of failure of a rollout. `generation`: the sampler did not give a finite logprob for each token, so the rollout
was not scored. The other kinds are failures of rewards. `abstained`: all parts returned None."""


class ExitCode(IntEnum):
    """Exit codes of the commands."""

    DONE = 0
    """The command has done its work."""
    INTERNAL = 1
    """Any other error. The message names the part that failed, and the run folder has the traceback."""
    USAGE = 2
    """A mistake of the user. One sentence names the file, line or option and the nearest valid value.
    In `grpo plan`: the recipe does not fit."""
    RESUMABLE = 75
    """The run was stopped (by a signal, a full disk or an outage) and can be resumed: repeat the command with
    `resume=auto`."""
    DETACHED = 130
    """The output is no longer read (Ctrl-C, or a closed pipe), and the submitted job continues. The code is not 75,
    because a scheduler would then submit the run a second time."""


class UserError(Exception):
    """Error of the user (exit code 2): one sentence naming the file, line or option and the nearest valid value."""


class RewardOutage(UserError):
    """Rewards failed in a way that may be temporary, such as an unavailable judge server. A run with newly saved steps
    can be resumed (exit code 75)."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended a training or an evaluation. The message names the folder and says how to resume."""


class EngineFailure(RuntimeError):
    """An actor failed or missed a deadline. The message names the actor, the awaited call and its last output."""

    def __init__(self, text: str, *, learner_answers: bool = False) -> None:
        """`learner_answers`: a sampler or a call to a sampler failed, and all learner ranks are alive."""
        super().__init__(text)
        self.learner_answers = learner_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the data set, tokenized once."""

    prompt_id: str
    """`<data set>:<row index>:<content hash>`; stable across runs, distinct for duplicate rows."""
    token_ids: tuple[int, ...]
    """[L] ids given to the sampler, special tokens included."""
    text: str
    """Text that `token_ids` were made from; a view for reward functions and the samples file."""
    row: Mapping[str, Unchecked]
    """The row as read, with the columns that the recipe adds."""
    messages: Sequence[Mapping[str, str]] | None
    """The chat turns when the prompt is conversational, else None."""
    dataset: str
    """Name of its data set."""
    where: str
    """Location of its row, for messages: `file.jsonl:17` (line, from 1) or `name[16]` (index, from 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Request for the completions of one prompt."""

    index: int
    """Identifies the prompt within one call to the samplers."""
    token_ids: tuple[int, ...]
    """[L] prompt ids."""
    seeds: tuple[int | None, ...]
    """[G] seed of each completion's generator; None if sampling is not seeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBlock:
    """Finished completions in columns, the form in which they are transferred: N completions, K tokens in total."""

    index: NDArray[np.int32]
    """[N] index of the request."""
    sample_index: NDArray[np.int32]
    """[N] position within the request's seeds."""
    lengths: NDArray[np.int32]
    """[N] number of tokens of each completion; completions are concatenated in the [K] columns."""
    token_ids: NDArray[np.int32]
    """[K]"""
    sampler_logprobs: NDArray[np.float32]
    """[K]"""
    policy_versions: NDArray[np.int32]
    """[K]"""
    truncated: NDArray[np.bool_]
    """[N] true for finish reason "length"."""
    aborted: NDArray[np.bool_]
    """[N] true for finish reason "aborted". Such a completion may have no tokens."""


def only(block: SampledBlock, wanted: Sequence[bool]) -> SampledBlock:
    """Return a block of the completions for which `wanted` [N] is true."""
    if all(wanted):
        return block
    rows = np.asarray(wanted, dtype=np.bool_)
    tokens = np.repeat(rows, block.lengths)
    return SampledBlock(
        index=block.index[rows],
        sample_index=block.sample_index[rows],
        lengths=block.lengths[rows],
        token_ids=block.token_ids[tokens],
        sampler_logprobs=block.sampler_logprobs[tokens],
        policy_versions=block.policy_versions[tokens],
        truncated=block.truncated[rows],
        aborted=block.aborted[rows],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """All settings sent to vLLM; settings that are not here are off."""

    temperature: float
    max_tokens: int
    end_token_ids: tuple[int, ...]
    """The model's end tokens and `sampling.stop_token_ids`. A sampled one ends the completion and stays in it."""
    stop: tuple[str, ...]
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion, exactly as the engine reported it."""

    token_ids: NDArray[np.int32]
    """[C] sampled ids; an end token that ended the completion is the last id and is trained on."""
    sampler_logprobs: NDArray[np.float32]
    """[C] natural-log probability of each sampled token under the distribution it was sampled from."""
    sampled_mask: NDArray[np.bool_]
    """[C] true where the policy sampled the token. All are true as long as no tool adds tokens."""
    policy_versions: NDArray[np.int32]
    """[C] version of the weights that sampled each token."""
    finish_reason: FinishReason
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Position in the run when completions are sampled. The defaults apply to a model outside of a run."""

    step: int = 0
    """Step that they are sampled for; for an evaluation, the last step before it."""
    global_step: int = 0
    """Optimizer steps of the completed steps: 0 while the first step is sampled."""
    max_steps: int = 0
    """Optimizer steps of the whole run."""
    epoch: float = 0.0
    """Number of passes over the data before this step's prompts were drawn."""

    def trainer_state(self) -> dict[str, float]:
        """Return the values that TRL's reward functions read from `trainer_state`."""
        return {"global_step": self.global_step, "max_steps": self.max_steps, "epoch": self.epoch}


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """Values that reward functions have logged for a completion, besides its reward."""

    columns: Mapping[str, str | float | bool | None] = field(default_factory=dict)
    """`<reward>/<column>` -> its value, for the samples file."""
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """`<reward>/metric/<name>` -> (sum, count) of the values. Values of a whole group are at its first completion."""


NOTHING_LOGGED = Logged()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A successful reward."""

    value: float
    """Weighted sum of the parts; finite."""
    parts: Mapping[str, float]
    """Unweighted value of each part that did not abstain, for logging."""
    logged: Logged = NOTHING_LOGGED


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A failed reward. It has no value, so it cannot enter a statistic."""

    kind: FailureKind
    detail: str
    """One line: the reward function and the error."""
    logged: Logged = NOTHING_LOGGED
    """Values logged by functions that did not fail as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt, one of its completions and the outcome of scoring it."""

    prompt: Prompt
    completion: Completion
    text: str
    """The decoded completion without special tokens, as the reward functions read it."""
    outcome: Scored | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> list[float]:
        """Return the rewards of the scored rollouts."""
        return [r.outcome.value for r in self.rollouts if isinstance(r.outcome, Scored)]

    @property
    def failed(self) -> list[Rollout]:
        """Return the rollouts that have no reward."""
        return [r for r in self.rollouts if isinstance(r.outcome, Failed)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One microbatch of one learner rank. It may have filler rows of weight zero: they use all parameters and add 0."""

    input_ids: torch.Tensor
    """[B,T] int64; right-padded with 0, which causal attention hides from all real positions."""
    target_ids: torch.Tensor
    """[B,T] int64; `target_ids[:, t]` follows `input_ids[:, t]`."""
    completion_mask: torch.Tensor
    """[B,T] bool; true where the target is a sampled token of the completion."""
    advantages: torch.Tensor
    """[B,T] float32; 0 off the mask. Reward-only advantages; the learner computes token-level ones from `rewards`."""
    rewards: torch.Tensor
    """[B] float32; reward of the row's completion, for token-level advantages."""
    has_spread: torch.Tensor
    """[B] bool; false if the row's group has no spread and so no advantage."""
    truncated: torch.Tensor
    """[B] bool; true if the completion reached `max_tokens`."""
    sampler_logprobs: torch.Tensor
    """[B,T] float32; 0 off the mask."""
    token_weights: torch.Tensor
    """[B,T] float32; mask x aggregation / denominator of the whole optimizer step; 0 off the mask."""
    rollout_index: torch.Tensor
    """[B] int64; position of the row in the step's list of rollouts, -1 for a filler row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """Work of one learner rank in one driver step."""

    minibatches: tuple[tuple[Batch, ...], ...]
    """[optimizer steps of an epoch][microbatches]; the same shape on every rank."""
    epochs: int
    """Number of passes over the minibatches."""
    kl_coef: float
    """Coefficient of the KL to the reference in this step."""

    @property
    def multiple_updates(self) -> bool:
        """Return true if weights change before the last minibatch is used: then old logprobs are computed first."""
        return len(self.minibatches) * self.epochs > 1


@dataclass(slots=True)
class Mean:
    """A mean as its sum and count, so that parts of it can be added up before they are divided."""

    total: float = 0.0
    count: float = 0.0

    def add(self, total: float, count: float) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float | None:
        """Return the mean; None if nothing was counted."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of one driver step of the learner: sums and counts over all ranks, never means."""

    optimizer_steps: int
    """Optimizer steps taken since the start of the run."""
    skipped_updates: int
    """Updates of this step, of the policy or the critic, that were not finite and moved no weight."""
    metrics: Mapping[str, tuple[float, float]]
    """name -> (sum, count); the logged value is sum / count."""
    maxima: Mapping[str, float]
    """name -> maximum over tokens and ranks."""
    minima: Mapping[str, float]
    """name -> minimum over tokens and ranks."""
    mismatch_square: Mean
    """Squared difference between sampler and learner logprobs, over tokens."""
    kl_ref: Mean
    """KL to the frozen reference, over tokens."""
    learner_logprob_sums: Mapping[int, float]
    """rollout index -> sum of learner logprobs over its completion, at the start of the step."""
    mismatch_counts: NDArray[np.int64]
    """Number of tokens by |learner - sampler| logprob, in the bins of `grpo.metrics.measures.MISMATCH_EDGES`."""
