"""The training loop. One turn has eight steps, in the order of this file:

    1 data        cursor -> P prompts, tokenized before the run
    2 sample      samplers -> P*G completions: ids, logprobs, finish reason, policy version
    3 rewards     worker processes -> Scored | Failed, while other groups are still sampled
    4 advantages  rewards of the scored members of each group -> advantages
    5 batching    rows -> minibatches of microbatches per learner rank; the token axis is shifted there, once
    6 step        learner: reference and old logprobs, loss, backward, optimizer; returns numbers, never [B,T]
    7 sync        learner -> samplers directly, verified; policy_version + 1
    8 record      metrics, samples, checkpoint

The driver waits for the samplers (2), the reward workers (3) and the learner (6, 7). A sampler and the learner never
work at the same time, so on one machine each can use all of it.

This file accesses no engine: it uses `Loop`, whose parts are protocols. Tests pass parts that really learn.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grpo.batching import Credit, advantages_of, members_needed, rank_steps, training_rows
from grpo.config import Config
from grpo.data import sample_seed
from grpo.evaluation.metrics import eval_metrics, eval_names, evaluation_line
from grpo.evaluation.statistics import Evaluation, evaluate_groups
from grpo.metrics.guards import MismatchError, NonFiniteError, count_skipped, guard_mismatch
from grpo.metrics.health import Health
from grpo.metrics.step import (
    Learned,
    Sampled,
    full_check_line,
    full_check_metrics,
    refuse_unknown_best,
    step_metrics,
    throughput,
    timings,
)
from grpo.objective.kl import adapted_coefficient
from grpo.objective.spread import has_spread
from grpo.rollout.collect import (
    Collected,
    SamplerGroup,
    Scorer,
    collect,
    enforce_failure_budget,
    eval_seed,
    requests_of,
)
from grpo.run.folder import RunFolder, is_disk_full
from grpo.run.heartbeat import Watch, waiting
from grpo.run.progress import Progress, ProgressState
from grpo.run.samples import Trained
from grpo.run.saving import Saver
from grpo.run.timeline import Timeline
from grpo.sync.probe import Probe, make_probe
from grpo.sync.transaction import SyncResult
from grpo.types import EngineFailure, Group, Moment, Prompt, RankStep, SamplingSettings, StepResult, UserError


class EngineGroup(SamplerGroup, Protocol):
    """Samplers and learner; implemented by `grpo.cluster.engines.Engines`."""

    def step(self, steps: Sequence[RankStep]) -> StepResult: ...

    def publish(self, policy_version: int, probe: Probe, *, full_check: bool) -> Callable[[], SyncResult]:
        """Start a weight sync. Return a function that waits for its end and returns its result."""
        ...

    def save(self, folder: Path) -> None: ...


class Reporter(Protocol):
    """Output for progress; implemented by `grpo.run.console.Console`."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Components of the loop."""

    config: Config
    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    engines: EngineGroup
    scorer: Scorer
    folder: RunFolder
    reporter: Reporter
    decode: Callable[[Sequence[NDArray[np.int32]]], list[str]]
    train_settings: SamplingSettings
    eval_settings: SamplingSettings
    progress: Progress
    saver: Saver
    stopping: Callable[[], bool]
    """Returns whether the run was requested to stop."""
    health: Health
    timeline: Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a run that ended without an error."""

    finished: bool
    """False if it was stopped after `steps` steps."""
    steps: int
    before: Evaluation | None
    after: Evaluation | None


def train(loop: Loop) -> Outcome:
    """Run the remaining steps of the recipe.

    Raises the error that stopped the run. The run folder then has the data of all complete steps, and a checkpoint of
    the last one if `rescue` can write it.
    """
    config, engines, at = loop.config, loop.engines, loop.progress
    probe = make_probe(loop.prompts, longest=config.max_row_tokens - 1)
    save_s = 0.0
    loop.reporter.say("checking that the samplers use the learner's weights")
    with waiting("weights", "the full check", loop.reporter.say):
        proof = engines.publish(at.step, probe, full_check=True)()
    at.noise = proof.noise
    if checked := full_check_metrics(proof):
        loop.folder.facts["full_check"] = checked
        loop.reporter.say(full_check_line(proof))
    if at.step == 0 or config.evaluates_after(at.step):
        evaluate_once(loop)
    whole = Whole(at.state(loop.prompts), {})
    try:
        while at.step < config.run.steps:
            metrics = turn(loop, at.step + 1, probe)
            if metrics is None:
                loop.reporter.say(f"every prompt has reached algorithm.retire_reward; done after {at.step} steps")
                whole = Whole(at.state(loop.prompts), {**whole.metrics, **evaluate_once(loop)})
                break
            whole = Whole(at.state(loop.prompts), metrics)
            if config.evaluates_after(at.step) and loop.eval_prompts:
                evaluating = time.monotonic()
                with loop.timeline.span("driver", "evaluate"):
                    metrics |= eval_metrics(evaluate(loop, at.step))
                metrics |= {"time/eval_s": time.monotonic() - evaluating}
                whole = Whole(at.state(loop.prompts), metrics)
            metrics |= {"time/save_s": save_s}
            record(loop, at.step, metrics)
            saving = time.monotonic()
            loop.saver.poll()
            stopping = loop.stopping() and at.step < config.run.steps
            if stopping or (config.run.save_every and at.step % config.run.save_every == 0):
                awaited = waiting(f"step {at.step}", "the checkpoint", loop.reporter.say)
                with loop.timeline.span("driver", "save"), awaited:
                    loop.saver.save(at.step, whole.state, metrics)
            loop.timeline.write(at.step)
            if stopping:
                loop.saver.poll(wait=True)
                return Outcome(finished=False, steps=at.step, before=at.before, after=at.after)
            save_s = time.monotonic() - saving
        with waiting("end", "the model and the last checkpoint", loop.reporter.say):
            loop.saver.poll(wait=True)
            engines.save(loop.folder.path / "model")
            loop.saver.save_last(at.step, at.state(loop.prompts), whole.metrics)
    except Exception as error:
        rescue(loop, whole, error)
        raise
    return Outcome(finished=True, steps=at.step, before=at.before, after=at.after)


@dataclass(frozen=True, slots=True)
class Whole:
    """Content of a checkpoint of the last complete step, besides the learner's state."""

    state: ProgressState
    metrics: Mapping[str, float]


def rescue(loop: Loop, whole: Whole, error: Exception) -> None:
    """Write a checkpoint of the last complete step before `error` ends the run, so that no complete step is lost.

    None is written before the first step, after the learner has begun the step that failed, when the learner is lost,
    or when the disk is full. A pending checkpoint is finished unless ranks of the learner may still wait for each
    other. A failure to write is reported in addition to `error`, which remains the reason.
    """
    at = loop.progress
    idle = at.learned == at.step or isinstance(error, MismatchError | NonFiniteError)
    if not idle or (isinstance(error, EngineFailure) and not error.learner_answers):
        return
    try:
        loop.saver.poll(wait=True)
        if at.step == 0 or at.learned != at.step or (is_disk_full(error) and not isinstance(error, UserError)):
            return
        if loop.folder.facts["steps"] < at.step:  # the evaluation after the step failed
            record(loop, at.step, whole.metrics)
        loop.saver.save(at.step, whole.state, whole.metrics)
        loop.saver.poll(wait=True)
    except Exception as second:  # noqa: BLE001 - reported in addition to the first failure
        loop.reporter.say(f"also, the state after step {at.step} could not be saved: {second}")


def evaluate_once(loop: Loop) -> dict[str, float]:
    """Evaluate the current weights and return the metrics. Return no metrics if they have been evaluated before, or if
    there are no evaluation prompts."""
    at = loop.progress
    if not loop.eval_prompts or at.evaluated == at.step:
        return {}
    metrics = eval_metrics(evaluate(loop, at.step))
    loop.folder.log_metrics(at.step, metrics)
    return metrics


def turn(loop: Loop, step: int, probe: Probe) -> dict[str, float] | None:
    """Run steps 1 to 7, after which the samplers have the weights of policy version `step`. Return the metrics, or None
    if no prompt is left to sample."""
    config, at = loop.config, loop.progress
    started = time.monotonic()
    with loop.timeline.span("driver", "sample and score"):
        sampled = sample_step(loop, step)
    if not sampled.groups and not sampled.unused:
        return None
    learned = learn(loop, sampled, step)
    at.skipped = count_skipped(learned.result, step, at.skipped, run=loop.folder.path, say=loop.reporter.say)
    guard_mismatch(learned.result, config, at.noise)
    synced = time.monotonic()
    every = config.run.verify_every
    sync_ended = loop.timeline.begin("learner", "weight sync")
    syncing = loop.engines.publish(step, probe, full_check=bool(every) and step % every == 0)
    metrics = step_metrics(config, at.step, at.cursor, sampled, learned)  # while the weights are transferred
    if config.algorithm.kl_coef > 0:
        metrics |= {"policy/kl_coef": at.kl_coef}
        at.kl_coef = next_kl_coef(at.kl_coef, learned.result.kl_ref.value, config)
    if config.algorithm.retire_reward is not None:
        at.retired |= solved(loop, sampled.sampled_groups)
        metrics["progress/retired_prompts"] = float(len(at.retired))
    with waiting(f"step {step}", "the weight sync", loop.reporter.say):
        sync = syncing()
    sync_ended()
    at.noise = sync.noise
    metrics |= timings(sampled, learned, sync, started, synced, time.monotonic())
    metrics |= throughput(config, learned.credit.minibatches, sync.nbytes, metrics)
    at.step = step
    at.tokens += int(metrics["tokens/sampled"])
    at.rollouts += sum(len(group.rollouts) for group in sampled.sampled_groups)
    return metrics | {"progress/tokens": float(at.tokens), "progress/rollouts": float(at.rollouts)}


def record(loop: Loop, step: int, metrics: Mapping[str, float]) -> None:
    """Log and show the metrics of a step, with health warnings."""
    loop.folder.log_metrics(step, metrics)
    loop.folder.facts["steps"] = step
    refuse_unknown_best(loop.config.run.keep_best, [*metrics, *eval_names(loop.config)])
    loop.reporter.step(step, metrics)
    for line in loop.health.see(step, metrics):
        loop.reporter.say(line)
    loop.folder.facts["warnings"] = loop.health.warnings()


def sample_step(loop: Loop, step: int) -> Sampled:
    """Sample and score the groups of prompts_per_step prompts. With `max_refills`, groups without spread or with too
    few scored members are replaced by groups of the next prompts (dynamic sampling; DAPO, arXiv 2503.14476 sec. 3.2),
    until the step is full or the refills are used up."""
    a, at = loop.config.algorithm, loop.progress
    wanted = min(a.prompts_per_step, len(loop.prompts) - len(at.retired))
    kept: list[Group] = []
    unused: list[Group] = []
    sample_s = reward_s = 0.0
    attempt, moment = 0, moment_of(loop, step)
    while len(kept) < wanted and attempt <= a.max_refills:
        prompts = [loop.prompts[i] for i in at.cursor.draw(wanted - len(kept), at.retired)]
        collected = rollouts_of(loop, prompts, moment, attempt)
        for group in collected.groups:
            rewards = group.rewards
            teaches = not a.max_refills or (len(rewards) >= members_needed(a) and has_spread(rewards))
            (kept if teaches else unused).append(group)
        sample_s, reward_s = sample_s + collected.sample_s, reward_s + collected.reward_s
        attempt += 1
    return Sampled(groups=tuple(kept), unused=tuple(unused), attempts=attempt, sample_s=sample_s, reward_s=reward_s)


def learn(loop: Loop, sampled: Sampled, step: int) -> Learned:
    """Compute advantages, make batches and run the learner's step. The samples are written even if it fails."""
    config, at = loop.config, loop.progress
    started = time.monotonic()
    result: StepResult | None = None
    credit: Credit | None = None
    try:
        enforce_failure_budget(sampled.sampled_groups, config.algorithm)
        credit = training_rows(sampled.groups, sampled.unused, config, at.step)
        steps = rank_steps(
            credit.minibatches,
            ranks=config.cluster.learner_ranks,
            tokens_per_microbatch=config.learner.tokens_per_microbatch,
            aggregation=config.algorithm.aggregation,
            constant_length=config.algorithm.constant_length or config.sampling.max_tokens,
            epochs=config.algorithm.epochs_per_step,
            kl_coef=at.kl_coef,
        )
        batched = time.monotonic()
        loop.folder.raise_failed()  # before the update: the state can still be saved
        at.learned = step
        awaited = waiting(f"step {step}", "the learner's update", loop.reporter.say)
        with loop.timeline.span("learner", "update"), awaited:
            result = loop.engines.step(steps)
    finally:  # also for a failed step: its completions help to find the cause
        trained = Trained(
            logprob_sums=result.learner_logprob_sums if result else {},
            advantages=advantages_of(credit, config) if credit else {},
        )
        loop.folder.write_samples(f"step-{step:06d}", step, sampled.sampled_groups, trained)
    return Learned(credit=credit, result=result, batch_s=batched - started, update_s=time.monotonic() - batched)


def solved(loop: Loop, groups: Sequence[Group]) -> set[int]:
    """Return the indices of the prompts whose completions all reach `retire_reward`."""
    bar = loop.config.algorithm.retire_reward
    assert bar is not None
    done = {g.prompt.prompt_id for g in groups if g.rewards and min(g.rewards) >= bar and not g.failed}
    return {i for i, prompt in enumerate(loop.prompts) if prompt.prompt_id in done}


def next_kl_coef(kl_coef: float, kl_ref: float | None, config: Config) -> float:
    """Return the KL coefficient of the next step: unchanged, or adapted towards `kl_target`. `kl_ref`: the measured KL
    to the reference, None without any token."""
    a = config.algorithm
    if a.kl_target is None or kl_ref is None:
        return kl_coef
    return adapted_coefficient(kl_coef, kl_ref, target=a.kl_target, horizon=a.kl_horizon)


def moment_of(loop: Loop, step: int) -> Moment:
    """Return the position in the run before prompts are drawn, for completions of `step`."""
    at, updates = loop.progress, loop.config.optimizer_steps_per_step
    total = loop.config.run.steps * updates
    return Moment(step=step, global_step=at.step * updates, max_steps=total, epoch=at.cursor.epochs)


def rollouts_of(loop: Loop, prompts: Sequence[Prompt], moment: Moment, attempt: int) -> Collected:
    """Sample and score the groups of a training step."""
    config = loop.config

    def seed_of(prompt: Prompt, index: int) -> int | None:
        if not config.sampling.seeded:
            return None
        return sample_seed(config.run.seed, moment.step, prompt.prompt_id, index, attempt)

    return sample_and_score(
        loop, f"step {moment.step}", prompts, loop.train_settings, config.algorithm.group_size, seed_of, moment
    )


def sample_and_score(
    loop: Loop, what: str, prompts: Sequence[Prompt], settings: SamplingSettings, samples_per_prompt: int,
    seed_of: Callable[[Prompt, int], int | None], moment: Moment,
) -> Collected:  # fmt: skip
    """Sample and score groups, with a heartbeat named `what` while the driver waits for them."""
    completions, say = len(prompts) * samples_per_prompt, loop.reporter.say
    requests = requests_of(prompts, samples_per_prompt, seed_of)
    engines, scorer, timeline = loop.engines, loop.scorer, loop.timeline
    with Watch(what, completions, sampler=engines, scorer=scorer, timeline=timeline, say=say) as watch:
        return collect(
            prompts, requests, sampler=engines, scorer=scorer, settings=settings, decode=loop.decode, moment=moment,
            reward_timeout_s=loop.config.cluster.step_timeout_s, observer=watch,
        )  # fmt: skip


def evaluate(loop: Loop, step: int) -> Evaluation:
    """Evaluate on the held-out prompts with the sampling settings of the evaluation, and write all completions.

    Raises UserError when too many completions fail.
    """
    config = loop.config
    groups: dict[str, tuple[Group, ...]] = {}
    seed_of = functools.partial(eval_seed, config)
    for name in dict.fromkeys(prompt.dataset for prompt in loop.eval_prompts):
        prompts = [prompt for prompt in loop.eval_prompts if prompt.dataset == name]
        each = config.data.eval.samples_of(name)
        what, moment = f"step {step}, evaluation on {name}", moment_of(loop, step)
        groups[name] = sample_and_score(loop, what, prompts, loop.eval_settings, each, seed_of, moment).groups
    every = [group for some in groups.values() for group in some]
    loop.folder.write_samples(f"eval-{step:06d}", step, every)
    enforce_failure_budget(every, config.algorithm)
    evaluation = evaluate_groups(groups, config.data.eval.by)
    at = loop.progress
    at.evaluated = step
    if step == 0:
        at.before = evaluation
    else:
        at.after = evaluation
    loop.folder.facts |= at.accuracies()
    loop.reporter.say(f"step {step}: {evaluation_line(evaluation, config)}")
    return evaluation
