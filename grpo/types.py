"""The records that cross boundaries: frozen, slotted, keyword-only, complete when they are made.

Dimension letters used here and in every docstring of the package:
    P prompts of a step    G completions of a prompt (group_size)    R = P*G rollouts
    L tokens of a prompt   C tokens of a completion                  S = L+C tokens of a row
    B rows of a microbatch T = max(S)-1 target positions, right-padded

The token axis is shifted once, in `grpo.batching`: every [B,T] tensor is aligned to the *target* token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # `grpo --help` and a misspelt option need not wait for torch
    import torch

FinishReason = Literal["stop", "length"]
"""Why the engine ended a completion: it sampled an end token or stop string, or ran out of `max_tokens`."""

FailureKind = Literal[
    "generation", "exception", "timeout", "not_finite", "wrong_type", "wrong_count", "worker_died", "abstained"
]
"""What went wrong with a rollout. `generation`: the sampler gave no finite logprob for each token, so that nothing was
scored; the others are of rewards. `abstained`: every part returned None."""


DONE, OURS, USERS, RESUMABLE = 0, 1, 2, 75
"""Exit codes: as asked; our fault, or what nobody foresaw; the user's mistake; stopped, and can be gone on with."""
NOT_FOLLOWED = 130
"""Exit code where nobody looks on any more, after Ctrl-C or as a pipe's reader has gone, and what is looked at goes on:
not 75, at which schedulers submit again."""


class UserError(Exception):
    """The user's mistake (exit code 2): one sentence naming the file, line or option and the nearest right value."""


class RewardOutage(UserError):
    """Rewards failed in a way that may pass, as where a judge's server is away. After good steps the run can be resumed
    (exit code 75)."""


class EngineFailure(RuntimeError):
    """An actor failed or did not answer in time: says who, what was awaited, and what it last wrote."""

    def __init__(self, text: str, *, learner_answers: bool = False) -> None:
        """`learner_answers`: what failed was a sampler or a call to one, and every rank of the learner is alive."""
        super().__init__(text)
        self.learner_answers = learner_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the data set, tokenized once."""

    prompt_id: str
    """`<data set>:<row index>:<content hash>`; stable over runs, distinct for duplicate rows."""
    token_ids: tuple[int, ...]
    """[L] ids given to the sampler, special tokens included."""
    text: str
    """What `token_ids` were made from; a view for reward functions and the samples file."""
    row: Mapping[str, Any]
    """The row as it was read, with the columns that the recipe adds."""
    messages: Sequence[Mapping[str, str]] | None
    """The chat turns when the prompt is conversational, else None."""
    dataset: str
    """Name of its data set."""
    where: str
    """Its row's place, for messages: `file.jsonl:17` (line, from 1) or `name[16]` (index, from 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Completions to sample of one prompt."""

    index: int
    """Identifies the prompt within one call to the samplers."""
    token_ids: tuple[int, ...]
    """[L] prompt ids."""
    seeds: tuple[int | None, ...]
    """[G] seed of each completion's own generator, or None where sampling is not seeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBlock:
    """Finished completions in columns, the form in which they travel: N completions, K tokens in all."""

    index: NDArray[np.int32]
    """[N] of the request."""
    sample_index: NDArray[np.int32]
    """[N] position within the request's seeds."""
    lengths: NDArray[np.int32]
    """[N] tokens of each; they follow each other in the [K] columns."""
    token_ids: NDArray[np.int32]
    """[K]"""
    sampler_logprobs: NDArray[np.float32]
    """[K]; NaN behind the last token of a request that the engine gave up."""
    policy_versions: NDArray[np.int32]
    """[K]"""
    truncated: NDArray[np.bool_]
    """[N] finish reason "length" rather than "stop"."""


def only(block: SampledBlock, wanted: Sequence[bool]) -> SampledBlock:
    """The completions of a block where `wanted` [N] is true."""
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
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """Every setting sent to vLLM; what is not here is off."""

    temperature: float
    max_tokens: int
    end_token_ids: tuple[int, ...]
    """The model's end tokens and `sampling.stop_token_ids`; a sampled one is kept and ends the completion."""
    stop: tuple[str, ...]
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion, exactly as the engine reported it."""

    token_ids: NDArray[np.int32]
    """[C] sampled ids; the end token that stopped it is the last one and is trained."""
    sampler_logprobs: NDArray[np.float32]
    """[C] natural-log probability of each sampled token under the distribution it was sampled from."""
    sampled_mask: NDArray[np.bool_]
    """[C] true where the policy sampled the token; all true until tools write tokens of their own."""
    policy_versions: NDArray[np.int32]
    """[C] weight publication that each token was sampled under."""
    finish_reason: FinishReason
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where a run stands when completions are sampled. The defaults are of a model outside of a run."""

    step: int = 0
    """The step that they are sampled for; of an evaluation, the last one before it."""
    global_step: int = 0
    """Optimizer steps that belong to the steps done: 0 while the first step is sampled."""
    max_steps: int = 0
    """Optimizer steps of the whole run."""
    epoch: float = 0.0
    """How often the data had been gone through before this step's prompts were drawn."""

    def trainer_state(self) -> dict[str, float]:
        """Return what TRL's reward functions read as `trainer_state`."""
        return {"global_step": self.global_step, "max_steps": self.max_steps, "epoch": self.epoch}


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What reward functions have logged of a completion besides its reward."""

    columns: Mapping[str, str | float | bool | None] = field(default_factory=dict)
    """`<reward>/<column>` -> its value, for the samples file."""
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """`<reward>/metric/<name>` -> (sum, count) of the values. Those of a whole group are at its first completion."""


NOTHING_LOGGED = Logged()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A reward that exists."""

    value: float
    """Weighted sum of the parts; finite."""
    parts: Mapping[str, float]
    """Unweighted value of each part that did not abstain, for logging."""
    logged: Logged = NOTHING_LOGGED


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A reward that does not exist. It has no number, so it can enter no statistic."""

    kind: FailureKind
    detail: str
    """One line: which reward function, what happened."""
    logged: Logged = NOTHING_LOGGED
    """By functions that did not fail as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt, one completion of it and the outcome of scoring it."""

    prompt: Prompt
    completion: Completion
    text: str
    """The completion decoded, special tokens skipped: what the reward function saw."""
    outcome: Scored | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One microbatch of one learner rank. Rows of weight zero may fill it: they touch every parameter, and add 0."""

    input_ids: torch.Tensor
    """[B,T] int64; right-padded with 0, which causal attention keeps from every real position."""
    target_ids: torch.Tensor
    """[B,T] int64; `target_ids[:, t]` follows `input_ids[:, t]`."""
    completion_mask: torch.Tensor
    """[B,T] bool; true where the target is a sampled token of the completion."""
    advantages: torch.Tensor
    """[B,T] float32; 0 off the mask. Of the reward-only family; the learner makes token-level ones from `rewards`."""
    rewards: torch.Tensor
    """[B] float32; what the row's completion is worth in a token-level advantage."""
    has_spread: torch.Tensor
    """[B] bool; false where the row's group has no spread and so no advantage."""
    truncated: torch.Tensor
    """[B] bool; the completion ran out of `max_tokens`."""
    sampler_logprobs: torch.Tensor
    """[B,T] float32; 0 off the mask."""
    token_weights: torch.Tensor
    """[B,T] float32; mask x aggregation / denominator of the whole optimizer step; 0 off the mask."""
    rollout_index: torch.Tensor
    """[B] int64; position of the row in the step's list of rollouts, -1 for a filler row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """What one learner rank does in one driver step."""

    minibatches: tuple[tuple[Batch, ...], ...]
    """[optimizer steps][microbatches]; the same shape on every rank. Epochs are unrolled."""
    kl_coef: float
    """Coefficient of the KL to the reference in this step."""
    multiple_updates: bool
    """Whether weights move before the last minibatch is used, so that old logprobs must be computed first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the learner reports of one driver step: sums and counts over all ranks, never means."""

    optimizer_steps: int
    """Optimizer steps taken since the start of the run."""
    metrics: Mapping[str, tuple[float, float]]
    """name -> (sum, count); the logged value is sum / count."""
    extremes: Mapping[str, float]
    """name -> maximum over tokens."""
    learner_logprob_sums: Mapping[int, float]
    """rollout index -> sum of learner logprobs over its completion, at the start of the step."""
    mismatch_counts: NDArray[np.int64]
    """Tokens by |learner - sampler| logprob, between `grpo.metrics.MISMATCH_EDGES`."""
