"""Sample and score as one stream: a group goes to the reward workers as soon as its last completion has arrived.

Training steps and evaluations both use it, with different settings and seeds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grpo.config import AlgorithmConfig, Config
from grpo.data import sample_seed
from grpo.rewards.counts import Counted
from grpo.rewards.groups import RewardItem
from grpo.types import (
    Completion,
    Failed,
    FailureKind,
    Group,
    Moment,
    Prompt,
    RewardOutage,
    Rollout,
    SampledBlock,
    SampleRequest,
    SamplingSettings,
    Scored,
    UserError,
)

PASSING: tuple[FailureKind, ...] = ("generation", "exception", "timeout", "worker_died")
"""Kinds of failure that a retry may fix; the others depend on what a reward function has returned."""


def may_pass(outcome: Scored | Failed) -> bool:
    """Return whether the outcome is a failure that a retry may fix."""
    return isinstance(outcome, Failed) and outcome.kind in PASSING


class SamplerGroup(Protocol):
    """Source of completions; implemented by `grpo.cluster.engines.Engines`."""

    def sample(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> Iterator[SampledBlock]: ...

    def outstanding(self) -> dict[str, int]:
        """Return sampler name -> number of completions of the last `sample` that it has not yet returned."""
        ...


class Scorer(Protocol):
    """Source of rewards; implemented by `grpo.rewards.pool.RewardPool`."""

    def submit(self, items: Sequence[RewardItem]) -> Future[list[Scored | Failed]]: ...

    def counts(self) -> Counted:
        """Return the counts of scored completions so far, and the slowest call in flight."""
        ...


class Observer(Protocol):
    """Receiver of the progress of `collect`; implemented by `grpo.run.heartbeat.Watch`."""

    def sampled(self, completions: int) -> None:
        """Count completions that have arrived."""
        ...

    def submitted(self, completions: int) -> Callable[[], None]:
        """Count completions that are submitted for scoring. The returned function is called when they are scored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The groups of one call, in the order of its prompts."""

    groups: tuple[Group, ...]
    sample_s: float
    """Seconds until the last completion arrived."""
    reward_s: float
    """Seconds from then until the last reward arrived: the time of scoring that sampling did not hide."""


def collect(
    prompts: Sequence[Prompt],
    requests: Sequence[SampleRequest],
    *,
    sampler: SamplerGroup,
    scorer: Scorer,
    settings: SamplingSettings,
    decode: Callable[[Sequence[NDArray[np.int32]]], list[str]],
    moment: Moment,
    reward_timeout_s: float,
    observer: Observer,
    when_scored: Callable[[Group], object] = lambda group: None,
) -> Collected:
    """Sample the requested completions of every prompt and score each.

    Args:
        requests: of the prompts, in order, see `requests_of`.
        settings: passed to the sampler unchanged.
        decode: lists of token ids -> texts, special tokens skipped.
        moment: position in the run, passed to the reward functions.
        reward_timeout_s: deadline in seconds for each group's rewards, once all completions have arrived.
        observer: receives the progress.
        when_scored: called with each group as soon as its scores are available.
    """
    started = time.monotonic()
    completions: list[dict[int, Completion]] = [{} for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    scores: list[Future[list[Scored | Failed]] | None] = [None for _ in prompts]
    groups: dict[int, Group] = {}

    def take(p: int, future: Future[list[Scored | Failed]]) -> None:
        outcomes = rewards_of(future, prompts[p], reward_timeout_s)
        groups[p] = make_group(prompts[p], completions[p], texts[p], outcomes)
        when_scored(groups[p])

    for block in sampler.sample(requests, settings):
        observer.sampled(len(block.lengths))
        complete: list[int] = []
        for p, i, completion in completions_of(block, requests):
            completions[p][i] = completion
            if len(completions[p]) == len(requests[p].seeds):
                complete.append(p)
        own = [[completions[p][i] for i in range(len(requests[p].seeds))] for p in complete]
        decoded = iter(decode([completion.token_ids for group in own for completion in group]))
        for p, group in zip(complete, own, strict=True):
            texts[p] = [next(decoded) for _ in group]
            items = reward_items(prompts[p], group, texts[p], moment)
            whole = [item for item, completion in zip(items, group, strict=True) if is_whole(completion)]
            scores[p] = submit(whole, scorer, observer)
        for p, future in enumerate(scores):
            if future is not None and p not in groups and future.done():
                take(p, future)
    sampled = time.monotonic()
    missing = [prompts[p].prompt_id for p, future in enumerate(scores) if future is None]
    if missing:
        raise RuntimeError(f"the samplers returned too few completions for {len(missing)} prompts: {missing[:3]}")
    for p, future in enumerate(scores):
        if future is not None and p not in groups:
            take(p, future)
    ordered = tuple(groups[p] for p in range(len(prompts)))
    return Collected(groups=ordered, sample_s=sampled - started, reward_s=time.monotonic() - sampled)


def requests_of(
    prompts: Sequence[Prompt], samples_per_prompt: int, seed_of: Callable[[Prompt, int], int | None]
) -> list[SampleRequest]:
    """Return one request per prompt for the samplers."""
    return [
        SampleRequest(
            index=p,
            token_ids=prompt.token_ids,
            seeds=tuple(seed_of(prompt, i) for i in range(samples_per_prompt)),
        )
        for p, prompt in enumerate(prompts)
    ]


def submit(items: Sequence[RewardItem], scorer: Scorer, observer: Observer) -> Future[list[Scored | Failed]]:
    """Submit `items` for scoring, and report it to the observer."""
    scored = observer.submitted(len(items))
    future = scorer.submit(items)
    future.add_done_callback(lambda _: scored())
    return future


def is_whole(completion: Completion) -> bool:
    """Return whether the generation has succeeded: the engine has ended it by itself, with a finite logprob for each
    token."""
    return completion.finish_reason != "aborted" and bool(np.isfinite(completion.sampler_logprobs).all())


def rewards_of(future: Future[list[Scored | Failed]], prompt: Prompt, timeout_s: float) -> list[Scored | Failed]:
    """Return the outcomes of a group. Raises RewardOutage naming the prompt if they miss the deadline."""
    try:
        return future.result(timeout=timeout_s)
    except TimeoutError as error:
        raise RewardOutage(
            f"waited {timeout_s:g} s (cluster.step_timeout_s) for the reward workers to score prompt {prompt.prompt_id}"
        ) from error


def completions_of(block: SampledBlock, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, int, Completion]]:
    """Yield (request, sample index, completion) for each completion in `block`; arrays are views into its columns."""
    start = 0
    columns = (block.index, block.sample_index, block.lengths, block.truncated, block.aborted)
    for p, i, length, truncated, aborted in zip(*(column.tolist() for column in columns), strict=True):
        end = start + length
        yield (
            p,
            i,
            Completion(
                token_ids=block.token_ids[start:end],
                sampler_logprobs=block.sampler_logprobs[start:end],
                sampled_mask=np.ones(length, dtype=np.bool_),
                policy_versions=block.policy_versions[start:end],
                finish_reason="aborted" if aborted else "length" if truncated else "stop",
                seed=requests[p].seeds[i],
            ),
        )
        start = end


def reward_items(
    prompt: Prompt, completions: Sequence[Completion], texts: Sequence[str], moment: Moment
) -> list[RewardItem]:
    """Return the inputs of the reward functions for the completions of a group."""
    return [
        RewardItem(
            completion=text,
            row=prompt.row,
            messages=prompt.messages,
            info={
                "token_count": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "prompt": prompt.text,
                "step": moment.step,
            },
            dataset=prompt.dataset,
            completion_ids=completion.token_ids,
            moment=moment,
        )
        for completion, text in zip(completions, texts, strict=True)
    ]


def make_group(
    prompt: Prompt, completions: dict[int, Completion], texts: Sequence[str], outcomes: Sequence[Scored | Failed]
) -> Group:
    """Return the group of a prompt. `outcomes`: of the completions for which `is_whole` holds, in order."""
    scored = iter(outcomes)
    lost = Failed(kind="generation", detail="the sampler gave no finite logprob for every token")
    return Group(
        prompt=prompt,
        rollouts=tuple(
            Rollout(
                prompt=prompt,
                completion=completions[i],
                text=text,
                outcome=next(scored) if is_whole(completions[i]) else lost,
            )
            for i, text in enumerate(texts)
        ),
    )


def enforce_failure_budget(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """Raise UserError when too many rollouts failed, in total or of one kind: they have no reward and cannot be trained
    on. The message shows the first failure of each kind with its input.

    The error is a RewardOutage if more than half of the counted failures are of PASSING kinds.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    failed: dict[str, list[str]] = {}
    for r in rollouts:
        if isinstance(r.outcome, Failed):
            said = f"{r.outcome.detail} (prompt {r.prompt.prompt_id}, completion {r.text[:80]!r})"
            failed.setdefault(r.outcome.kind, []).append(said)
    counts = {"": sum(map(len, failed.values()))} | {kind: len(every) for kind, every in failed.items()}
    bounds = {"": ("algorithm.max_failed_fraction", algorithm.max_failed_fraction)} | {
        kind: (f"algorithm.max_failed_of.{kind}", bound)
        for kind, bound in dataclasses.asdict(algorithm.max_failed_of).items()
    }
    for kind, (option, bound) in bounds.items():
        if bound is not None and counts.get(kind, 0) > bound * len(rollouts):
            option = f"max_failed_of.{kind}" if kind else "max_failed_fraction"
            shown = [f"{k} ({len(every)}): {every[0]}" for k, every in failed.items() if kind in ("", k)]
            passing = sum(counts.get(k, 0) for k in ((kind,) if kind else failed) if k in PASSING)
            raise (RewardOutage if 2 * passing > counts[kind] else UserError)(
                f"{counts[kind]} of {len(rollouts)} rollouts failed{f' by {kind}' if kind else ''}, more than "
                f"algorithm.{option}={bound:g} allows; the first of each kind: {'; '.join(shown)}"
            )


def eval_seed(config: Config, prompt: Prompt, index: int) -> int | None:
    """Return the seed of one completion of an evaluation, the same in all evaluations; None if not seeded."""
    return sample_seed(config.run.seed, -1, prompt.prompt_id, index) if config.sampling.seeded else None
