"""The loop with parts that really learn: a table policy that samples, trains and keeps versions, without any engine."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo import config as module
from grpo.batching import rank_steps, training_rows
from grpo.config import Config, RewardConfig
from grpo.driver import Loop, train
from grpo.evaluation.metrics import eval_names
from grpo.evaluation.statistics import interval
from grpo.files import FileRecord, seal
from grpo.learner.step import run_step
from grpo.learner.tally import merge
from grpo.metrics.guards import MismatchError, NonFiniteError, guard_mismatch
from grpo.metrics.health import Health
from grpo.metrics.measures import mismatch_counts
from grpo.metrics.step import Learned, Sampled, refuse_unknown_best, throughput, timings
from grpo.rewards.counts import Counted
from grpo.run import heartbeat
from grpo.run.checkpoints import list_checkpoints, read
from grpo.run.compare import read_rows
from grpo.run.folder import RunFolder, reopen
from grpo.run.progress import Progress
from grpo.run.results import metric_lines, numbers
from grpo.run.samples import Trained
from grpo.run.saving import Saver
from grpo.run.timeline import Timeline
from grpo.sync.probe import Spread
from grpo.types import (
    Batch,
    Completion,
    EngineFailure,
    Failed,
    FailureKind,
    Group,
    Mean,
    Prompt,
    RewardOutage,
    Rollout,
    SampledBlock,
    SampleRequest,
    Scored,
    StepResult,
    UserError,
)

VOCABULARY, END = 5, 0


class TablePolicy:
    """Next-token table by the previous token: sampler and learner at once, each with its own copy of the weights."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        self.config = config
        self.kl_coefs: list[float] = []
        self.learner = torch.nn.Embedding(VOCABULARY, VOCABULARY)
        torch.nn.init.normal_(self.learner.weight, std=0.1)
        self.sampler = self.learner.weight.detach().clone()
        self.reference = self.sampler.clone()
        self.version = -1
        self.optimizer = torch.optim.SGD(self.learner.parameters(), lr=3.0)
        self.calls: list[str] = []

    def sample(self, requests: Sequence[SampleRequest], settings: Any) -> Iterator[SampledBlock]:
        self.calls.append("sample")
        every = [(request, i, seed) for request in requests for i, seed in enumerate(request.seeds)]
        for request, i, seed in reversed(every):  # completions come in any order
            generator = torch.Generator().manual_seed((seed or 0) % 2**31)
            tokens, logprobs, last = [], [], request.token_ids[-1]
            while len(tokens) < settings.max_tokens and (not tokens or tokens[-1] != END):
                row = torch.log_softmax(self.sampler[last], -1)
                last = int(torch.multinomial(row.exp(), 1, generator=generator))
                tokens.append(last)
                logprobs.append(float(row[last]))
            yield SampledBlock(
                index=np.asarray([request.index]),
                sample_index=np.asarray([i]),
                lengths=np.asarray([len(tokens)]),
                token_ids=np.asarray(tokens, dtype=np.int32),
                sampler_logprobs=np.asarray(logprobs, dtype=np.float32),
                policy_versions=np.full(len(tokens), self.version, dtype=np.int32),
                truncated=np.asarray([tokens[-1] != END]),
                aborted=np.asarray([False]),
            )

    def outstanding(self) -> dict[str, int]:
        return {}

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        every = torch.log_softmax(self.learner(batch.input_ids), -1)
        return every.gather(-1, batch.target_ids[..., None])[..., 0], -(every.exp() * every).sum(-1)

    def ref_logprobs(self, batch: Batch) -> torch.Tensor:
        every = torch.log_softmax(self.reference[batch.input_ids], -1)
        return every.gather(-1, batch.target_ids[..., None])[..., 0]

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("there is no critic")

    def backward(self, model: str, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def optimizer_step(self, model: str) -> float:
        norm = self.learner.weight.grad.norm().item()
        if np.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def all_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def set_aside(self, minibatch: Sequence[Any], prepared: Sequence[Any], kl_coef: float) -> None:
        self.calls.append("set aside")

    def step(self, steps: Sequence[Any]) -> StepResult:
        self.calls.append("step")
        self.kl_coefs.append(steps[0].kl_coef)
        tally = run_step(steps[0], self, self.config.algorithm, self.config.critic, torch.device("cpu"))
        return merge([tally], optimizer_steps=1)

    def publish(self, policy_version: int, probe: Any, *, full_check: bool) -> Any:
        self.calls.append("publish")
        self.sampler, self.version = self.learner.weight.detach().clone(), policy_version
        apart = Spread(rms=0.0, q90=0.0)
        return lambda: SimpleNamespace(
            seconds=0.0, nbytes=0, probe=apart, noise=Spread(rms=1e-6, q90=1e-6), movement_errors=()
        )

    def save(self, folder: Path) -> None:
        self.calls.append("save")
        folder.mkdir(parents=True)

    def capture(self, folder: Path) -> dict[str, Any]:
        self.calls.append("capture")
        save_file({"weight": self.learner.weight.detach()}, folder / "rank-0.safetensors")
        self._written = seal(folder / "rank-0.safetensors")
        return {"ranks": 1}

    needs = 0

    def state_bytes(self) -> int:
        return self.needs

    def captured(self, *, wait: bool) -> dict[str, FileRecord] | None:
        return {"rank-0.safetensors": self._written} if wait else None

    def restore(self, folder: Path) -> None:
        with torch.no_grad():
            self.learner.weight.copy_(load_file(folder / "learner" / "rank-0.safetensors")["weight"])


class CountTwos:
    """Reward: share of token 2 in the completion; every `fail_every`-th rollout fails."""

    def __init__(self, fail_every: int = 0) -> None:
        self.fail_every, self.seen = fail_every, 0

    def submit(self, items: Sequence[Any]) -> Future[list[Scored | Failed]]:
        outcomes: list[Scored | Failed] = []
        for item in items:
            self.seen += 1
            if self.fail_every and self.seen % self.fail_every == 0:
                outcomes.append(Failed(kind="exception", detail="planted"))
                continue
            value = item.completion.count("2") / max(1, len(item.completion))
            outcomes.append(Scored(value=value, parts={"twos": value}))
        future: Future[list[Scored | Failed]] = Future()
        future.set_result(outcomes)
        return future

    def counts(self) -> Counted:
        return Counted(scored=self.seen)


class Scripted:
    """Reward of the n-th completion that is scored, by a function of n."""

    def __init__(self, reward: Callable[[int], float], parts: Mapping[str, float] | None = None) -> None:
        self.reward, self.parts, self.seen = reward, parts, 0

    def submit(self, items: Sequence[Any]) -> Future[list[Scored | Failed]]:
        outcomes: list[Scored | Failed] = []
        for _ in items:
            value = self.reward(self.seen)
            outcomes.append(Scored(value=value, parts=self.parts or {"scripted": value}))
            self.seen += 1
        future: Future[list[Scored | Failed]] = Future()
        future.set_result(outcomes)
        return future

    def counts(self) -> Counted:
        return Counted(scored=self.seen)


class Silent:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.said: list[str] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def say(self, text: str) -> None:
        self.said.append(text)


def make_config(tmp_path: Path, *overrides: str) -> Config:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {path: x, dtype: float32}\ndata: {train: x, max_prompt_tokens: 4}\nsampling: {max_tokens: 6}\n"
        "algorithm: {prompts_per_step: 4, group_size: 8}\nrewards: [{file: twos.py}]\n"
        "run: {steps: 25, tensorboard: false}\n"
    )
    return module.load(recipe, overrides)


def make_loop(
    tmp_path: Path,
    config: Config,
    scorer: CountTwos | Scripted | None = None,
    reopened: int | None = None,
    datasets: Mapping[str, int] = MappingProxyType({"d": 12}),
) -> tuple[Loop, TablePolicy]:
    names = [name for name, size in datasets.items() for _ in range(size)]
    prompts = [
        Prompt(
            prompt_id=f"{name}:{i}:h", token_ids=(1, i % 4 + 1), text=str(i), row={"start": i % 2}, messages=None,
            dataset=name, where=f"{name}[{i}]",
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    policy = TablePolicy(config)
    settings = SimpleNamespace(max_tokens=6)
    if reopened is None:
        (tmp_path / "run").mkdir()
    folder, reporter = RunFolder(tmp_path / "run", config, step=reopened or 0), Silent()
    loop = Loop(
        config=config, prompts=prompts, eval_prompts=prompts[:3] if config.data.eval.sets else [], engines=policy,
        scorer=scorer or CountTwos(), folder=folder, reporter=reporter,
        decode=lambda lists: ["".join(str(t) for t in ids) for ids in lists], train_settings=settings,
        eval_settings=settings, progress=Progress.start(config, prompts),
        saver=Saver(config, folder.path, engines=policy, fingerprints=dict, flush=lambda: None, say=reporter.say),
        stopping=lambda: False, timeline=Timeline(tmp_path / "run" / "trace" if config.run.trace else None),
        health=Health(config, map(numbers, metric_lines(folder.path / "metrics.jsonl"))),
    )  # fmt: skip
    return loop, policy


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_completions_have_the_same_seeds_on_every_device(tmp_path: Path) -> None:
    """Of steps and of evaluations: without them, a resumed run would be another one."""

    def seeds(device: str) -> list[int | None]:
        folder = tmp_path / device
        folder.mkdir()
        found: list[int | None] = []
        loop, policy = make_loop(
            folder, make_config(folder, "run.steps=1", "data.eval.sets=x", f"cluster.device={device}")
        )
        sample = policy.sample

        def recorded(requests: Sequence[SampleRequest], settings: Any) -> Iterator[SampledBlock]:
            found.extend(seed for request in requests for seed in request.seeds)
            return sample(requests, settings)

        policy.sample = recorded  # type: ignore[method-assign]
        train(loop)
        loop.folder.close()
        return found

    on_cpu = seeds("cpu")
    assert len(on_cpu) == 3 + 4 * 8 + 3  # three prompts before and after the step
    assert None not in on_cpu
    assert seeds("gpu") == on_cpu


class Patient(CountTwos):
    """Scores once something has been said since the last step."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def submit(self, items: Sequence[Any]) -> Future[list[Scored | Failed]]:
        count, deadline = len(self.said), time.monotonic() + 60
        while len(self.said) == count and time.monotonic() < deadline:
            time.sleep(0.005)
        return super().submit(items)


def test_a_long_wait_for_completions_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.01)
    scorer = Patient([])
    loop, _ = make_loop(tmp_path, make_config(tmp_path, "run.steps=1", "data.eval.sets=x"), scorer)
    scorer.said = loop.reporter.said  # type: ignore[attr-defined]
    train(loop)
    loop.folder.close()
    waits = [text.partition(":")[0] for text in scorer.said if "sampling, " in text or "scoring, " in text]
    assert [*dict.fromkeys(waits)] == ["step 0, evaluation on d", "step 1", "step 1, evaluation on d"]


def test_it_learns_and_records_every_step(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path))
    outcome = train(loop)
    loop.folder.close()
    metrics = lines(tmp_path)
    assert [line["step"] for line in metrics] == list(range(1, 26))
    assert metrics[-1]["reward/mean"] > metrics[0]["reward/mean"] + 0.3
    assert all(line["mismatch/max"] < 1e-6 for line in metrics)
    assert all(line["policy/clip_fraction"] == 0 for line in metrics)  # one update per batch
    assert all(line["staleness/max"] == 0 for line in metrics)
    assert not any("kl_ref" in name or "kl_coef" in name for name in metrics[0])  # there is no reference
    assert outcome.steps == 25
    assert policy.calls[:4] == ["publish", "sample", "step", "publish"]
    assert policy.calls[-2:] == ["save", "capture"]


@pytest.mark.parametrize(
    ("errors", "groups"),
    [((0.001, 0.0042, 0.003), "worst of 3 groups of parameters"), ((0.0042,), "one group of parameters")],
)
def test_a_full_check_at_the_start_is_said_and_kept(errors: tuple[float, ...], groups: str, tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=1"))
    publish = policy.publish

    def proved(version: int, probe: Any, *, full_check: bool) -> Any:
        sync = publish(version, probe, full_check=full_check)()
        found = {"movement_errors": errors, "full_check_s": 12.34} if full_check else {}
        return lambda: SimpleNamespace(**{**vars(sync), **found})

    policy.publish = proved  # type: ignore[method-assign]
    train(loop)
    loop.folder.close()
    said = loop.reporter.said  # type: ignore[attr-defined]
    assert said[1] == (
        "weights: the samplers follow the learner: under perturbed weights their logprobs differ by 0.0042 of its "
        f"movement ({groups}; full check, 12.3 s)"
    )
    assert loop.folder.facts["full_check"] == {"sync/movement_error": 0.0042, "time/full_check_s": 12.34}
    assert "sync/movement_error" not in lines(tmp_path)[0]  # the step had none


def test_a_long_wait_for_the_learner_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call waits until it has been said that it is awaited."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.01)
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=2", "run.save_every=1"))
    said: list[str] = loop.reporter.said  # type: ignore[attr-defined]

    def patient(plain: Callable[..., Any], awaited: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count, deadline = len(said), time.monotonic() + 60
            while not any(awaited in text for text in said[count:]) and time.monotonic() < deadline:
                time.sleep(0.005)
            assert time.monotonic() < deadline, awaited
            return plain(*arguments, **named)

        return call

    publish = policy.publish

    def published(version: int, probe: Any, *, full_check: bool) -> Any:
        awaited = (
            "weights: waiting for the full check; " if full_check else f"step {version}: waiting for the weight sync; "
        )
        return patient(publish(version, probe, full_check=full_check), awaited)

    policy.publish = published  # type: ignore[method-assign]
    policy.step = patient(policy.step, ": waiting for the learner's update; ")  # type: ignore[method-assign]
    policy.capture = patient(policy.capture, ": waiting for the checkpoint; ")  # type: ignore[method-assign]
    policy.save = patient(policy.save, "end: waiting for the model and the last checkpoint; ")  # type: ignore[method-assign]
    train(loop)
    loop.folder.close()


class Listens(CountTwos):
    """Keeps what it is asked to score, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def submit(self, items: Sequence[Any]) -> Future[list[Scored | Failed]]:
        self.asked += items
        return super().submit(items)


def test_rewards_hear_where_the_run_stands_and_what_was_sampled(tmp_path: Path) -> None:
    """Twelve prompts, four a step, two updates a step: as TRL counts, before the step's own updates and prompts."""
    updates = ["algorithm.minibatches_per_step=2", "data.eval.sets=x", "data.eval.every=2"]
    scorer = Listens()
    loop, _ = make_loop(tmp_path, make_config(tmp_path, "run.steps=4", *updates), scorer)
    train(loop)
    loop.folder.close()
    seen = dict.fromkeys((item.info["step"], item.moment) for item in scorer.asked)
    assert [(step, m.global_step, m.max_steps, m.epoch) for step, m in seen] == [
        (0, 0, 8, 0.0),
        (1, 0, 8, 0.0), (2, 2, 8, 4 / 12), (2, 4, 8, 8 / 12),
        (3, 4, 8, 8 / 12), (4, 6, 8, 1.0), (4, 8, 8, 1 + 4 / 12),
    ]  # fmt: skip
    for item in scorer.asked:
        assert "".join(map(str, item.completion_ids)) == item.completion
        assert len(item.completion_ids) == item.info["token_count"]


def test_the_samples_file_recomputes_the_metrics(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, make_config(tmp_path, "run.steps=2"))
    train(loop)
    loop.folder.close()
    for number, line in enumerate(lines(tmp_path), 1):
        table = pq.read_table(tmp_path / "run" / "samples" / f"step-{number:06d}.parquet").to_pandas()
        assert len(table) == 32
        assert table.reward.mean() == pytest.approx(line["reward/mean"])
        assert table.completion_token_ids.map(len).mean() == pytest.approx(line["completion/tokens_mean"])
        assert (table.policy_version == number - 1).all()
        assert table.seed.is_unique
        assert np.allclose(table.sampler_logprob_sum, table.learner_logprob_sum, atol=1e-4)
        assert np.allclose(table.sampler_logprobs.map(sum), table.sampler_logprob_sum, atol=1e-4)


def test_checkpoints_and_evaluation_fall_due(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=5", "run.save_every=2", "data.eval.sets=x", "data.eval.every=2")
    config = dataclasses.replace(config, rewards=[dataclasses.replace(config.rewards[0], name="twos")])
    loop, _ = make_loop(tmp_path, config)
    outcome = train(loop)
    loop.folder.close()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert [line["step"] for line in lines(tmp_path) if "eval/accuracy" in line] == [0, 2, 4, 5]
    assert outcome.before is not None
    assert outcome.after is not None
    intervals = [interval(list(found.sets["d"].per_prompt.values())) for found in (outcome.before, outcome.after)]
    assert loop.folder.facts == {
        "steps": 5, "accuracy_before": outcome.before.accuracy, "accuracy_after": outcome.after.accuracy,
        "accuracy_before_interval": [intervals[0].low, intervals[0].high],
        "accuracy_after_interval": [intervals[1].low, intervals[1].high],
        "accuracy_after_step": 5, "warnings": [],
    }  # fmt: skip


def test_room_for_the_first_checkpoint_is_looked_for_before_it_is_captured(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=2", "run.save_every=1"))
    policy.needs = 2**60
    with pytest.raises(OSError, match="a checkpoint takes") as raised:
        train(loop)
    loop.folder.close()
    assert raised.value.errno == errno.ENOSPC
    assert "capture" not in policy.calls
    assert len(lines(tmp_path)) == 1  # the step itself is whole


def test_a_best_by_no_metric_is_named_after_the_first_step(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, make_config(tmp_path, "run.save_every=2", "run.keep_best=reward/maen"))
    with pytest.raises(
        UserError, match=r"run.keep_best=reward/maen is not a metric of this run; did you mean reward/mean"
    ):
        train(loop)
    loop.folder.close()
    assert len(lines(tmp_path)) == 1
    known = make_config(tmp_path, "run.save_every=2", "run.keep_best=reward/mean")
    refuse_unknown_best(known.run.keep_best, {"reward/mean": 1.0})
    of_sets = ["data.eval.sets=[{path: x, name: a}, {path: y, name: b}]", "data.eval.every=2"]
    known = make_config(tmp_path, *of_sets, "run.save_every=2", "run.keep_best=eval/accuracy/b")
    refuse_unknown_best(known.run.keep_best, eval_names(known))


def test_failed_rewards_are_counted_and_never_trained_on(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, make_config(tmp_path, "run.steps=1"), CountTwos(fail_every=11))
    train(loop)
    loop.folder.close()
    [line] = lines(tmp_path)
    assert line["reward/failed_exception"] == 2
    table = pq.read_table(tmp_path / "run" / "samples" / "step-000001.parquet").to_pandas()
    failed = table[table.failed.notna()]
    assert failed.reward.isna().all()
    assert failed.learner_logprob_sum.isna().all()  # in no training row


def test_too_many_failures_stop_the_run_and_show_the_first(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path), CountTwos(fail_every=4))
    with pytest.raises(
        UserError, match=r"8 of 32 rollouts failed, .*max_failed_fraction=0.1 .*exception \(8\): planted"
    ):
        train(loop)
    loop.folder.close()
    assert "step" not in policy.calls
    table = pq.read_table(tmp_path / "run" / "samples" / "step-000001.parquet").to_pandas()
    assert len(table) == 32  # the step that stopped the run is the one to look at
    assert (table.failed == "exception").sum() == 8
    assert loop.folder.facts["steps"] == 0


def test_one_kind_of_failure_may_have_a_budget_of_its_own(tmp_path: Path) -> None:
    options = ["algorithm.max_failed_fraction=0.5", "algorithm.max_failed_of.timeout=0.0"]
    loop, _ = make_loop(tmp_path, make_config(tmp_path, *options, "run.steps=2"), CountTwos(fail_every=4))
    train(loop)  # a quarter by exception, and none by timeout
    loop.folder.close()
    options.append("algorithm.max_failed_of.exception=0.2")
    (tmp_path / "b").mkdir()
    loop, _ = make_loop(tmp_path / "b", make_config(tmp_path, *options), CountTwos(fail_every=4))
    with pytest.raises(UserError, match=r"8 of 32 rollouts failed by exception, .*max_failed_of.exception=0.2 allows"):
        train(loop)
    loop.folder.close()


class Faulty(TablePolicy):
    """Gives up a twentieth of its generations in their middle."""

    def sample(self, requests: Sequence[SampleRequest], settings: Any) -> Iterator[SampledBlock]:
        for block in super().sample(requests, settings):
            if (int(block.index[0]) * 8 + int(block.sample_index[0])) % 20 == 3:
                logprobs = np.append(block.sampler_logprobs[:-1], np.float32("nan"))
                block = dataclasses.replace(block, sampler_logprobs=logprobs)
            yield block


class Aborting(TablePolicy):
    """Gives up the first completion of each prompt before its first token, and the second one after it."""

    def sample(self, requests: Sequence[SampleRequest], settings: Any) -> Iterator[SampledBlock]:
        for block in super().sample(requests, settings):
            kept = int(block.sample_index[0])
            if kept < 2:
                block = SampledBlock(
                    index=block.index, sample_index=block.sample_index, lengths=np.asarray([kept]),
                    token_ids=block.token_ids[:kept], sampler_logprobs=block.sampler_logprobs[:kept],
                    policy_versions=block.policy_versions[:kept], truncated=np.asarray([False]),
                    aborted=np.asarray([True]),
                )  # fmt: skip
            yield block


def test_a_generation_that_was_given_up_is_a_failure_with_the_tokens_that_it_has(tmp_path: Path) -> None:
    options = ["run.steps=1", "algorithm.prompts_per_step=2", "algorithm.max_failed_fraction=0.5"]
    config = make_config(tmp_path, *options)
    loop, _ = make_loop(tmp_path, config)
    train(dataclasses.replace(loop, engines=Aborting(config)))
    loop.folder.close()
    file = tmp_path / "run" / "samples" / "step-000001.parquet"
    table = pq.read_table(file).to_pylist()
    for row in table:
        length, given_up = len(row["completion_token_ids"]), row["sample_index"] < 2
        assert length == (row["sample_index"] if given_up else length) == len(row["sampler_logprobs"])
        assert (row["finish_reason"] == "aborted") == (row["failed"] == "generation") == given_up
        assert row["policy_version"] == (None if length == 0 else 0)
        assert np.isfinite(row["sampler_logprobs"]).all()
    [line] = lines(tmp_path)
    assert line["reward/failed_generation"] == 4
    assert line["completion/tokens_min"] == 0
    assert line["tokens/sampled"] == sum(len(row["completion_token_ids"]) for row in table)
    assert line["completion/truncated_fraction"] == sum(row["finish_reason"] == "length" for row in table) / len(table)
    assert [row.tokens for row in read_rows(file)] == [len(row["completion_token_ids"]) for row in table]


@pytest.mark.parametrize("advantage", ["group_normalized", "leave_one_out", "batch_normalized", "reinforce_pp"])
def test_survivors_learn_as_if_the_failed_had_never_been(advantage: str, tmp_path: Path) -> None:
    """A tenth of the rewards and a twentieth of the generations fail; one step with them, and one without."""
    options = ["run.steps=1", "algorithm.prompts_per_step=10", "algorithm.max_failed_fraction=0.5"]
    config = make_config(tmp_path, *options, f"algorithm.advantage={advantage}")
    loop, _ = make_loop(tmp_path, config, CountTwos(fail_every=10))
    policy = Faulty(config)
    loop = dataclasses.replace(loop, engines=policy)
    kept: list[Group] = []
    write = loop.folder.write_samples

    def seen(name: str, number: int, groups: Sequence[Group], trained: Trained) -> None:
        kept.extend(groups)
        write(name, number, groups, trained)

    loop.folder.write_samples = seen  # type: ignore[method-assign]
    train(loop)
    loop.folder.close()
    [line] = lines(tmp_path)
    assert line["reward/failed_generation"] == 4
    assert line["reward/failed_exception"] == 7  # of the 76 that were scored
    without = [
        dataclasses.replace(group, rollouts=tuple(r for r in group.rollouts if isinstance(r.outcome, Scored)))
        for group in kept
    ]
    assert sum(len(group.rollouts) for group in without) == 80 - 4 - 7
    credit = training_rows(without, [], config, 0)
    other = TablePolicy(config)
    other.step(
        rank_steps(
            credit.minibatches, ranks=1, tokens_per_microbatch=config.learner.tokens_per_microbatch,
            aggregation=config.algorithm.aggregation, constant_length=6, epochs=1, kl_coef=0.0,
        )
    )  # fmt: skip
    assert torch.equal(policy.learner.weight, other.learner.weight)
    assert not torch.equal(policy.learner.weight, TablePolicy(config).learner.weight)


def publish_other_weights(policy: TablePolicy, version: int) -> None:
    """Let the sampler get other weights than the learner's as those of `version`."""
    publish = policy.publish

    def published(policy_version: int, probe: Any, *, full_check: bool) -> Any:
        done = publish(policy_version, probe, full_check=full_check)
        if policy_version == version:
            policy.sampler += torch.randn(policy.sampler.shape)
        return done

    policy.publish = published  # type: ignore[method-assign]


def test_the_samples_of_a_step_with_a_mismatch_are_kept(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path))
    publish_other_weights(policy, 2)
    with pytest.raises(MismatchError):
        train(loop)
    loop.folder.close()
    table = pq.read_table(tmp_path / "run" / "samples" / "step-000003.parquet").to_pandas()
    assert abs(table.sampler_logprob_sum - table.learner_logprob_sum).max() > 1e-3
    assert loop.folder.facts["steps"] == 2
    assert len(lines(tmp_path)) == 2


def test_groups_without_spread_are_replaced_until_the_step_is_full(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=1", "algorithm.max_refills=3", "algorithm.group_size=2")
    scorer = Scripted(lambda n: 1.0 if n < 6 else float(n % 2))  # the first three groups are dull
    loop, policy = make_loop(tmp_path, config, scorer)
    train(loop)
    loop.folder.close()
    [line] = lines(tmp_path)
    assert line["refill/attempts"] == 1
    assert line["refill/replaced_groups"] == 3
    assert line["refill/missing_groups"] == 0
    assert line["group/count"] == 7  # all that was sampled is in the metrics
    assert policy.calls.count("sample") == 2
    table = pq.read_table(tmp_path / "run" / "samples" / "step-000001.parquet").to_pandas()
    assert len(table) == 14
    assert table.learner_logprob_sum.isna().sum() == 6
    assert line["gradient/no_spread"] > 0
    columns = [v for k, v in line.items() if k.startswith("gradient/") and k != "gradient/sampled"]
    assert sum(columns) == line["gradient/sampled"] == line["tokens/sampled"]


def test_refills_are_bounded_and_what_is_missing_is_said(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=1", "algorithm.max_refills=2", "algorithm.group_size=2")
    loop, policy = make_loop(tmp_path, config, Scripted(lambda n: float(n == 0)))  # one group only ever differs
    train(loop)
    loop.folder.close()
    [line] = lines(tmp_path)
    assert line["refill/attempts"] == 2
    assert line["refill/missing_groups"] == 3
    assert policy.calls.count("sample") == 3


def test_a_step_with_nothing_to_learn_moves_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=2", "algorithm.max_refills=1")
    loop, policy = make_loop(tmp_path, config, Scripted(lambda n: 1.0))
    before = policy.learner.weight.detach().clone()
    train(loop)
    loop.folder.close()
    assert torch.equal(policy.learner.weight, before)
    assert [line["refill/missing_groups"] for line in lines(tmp_path)] == [4, 4]


def test_solved_prompts_are_not_drawn_again_and_the_run_ends_when_none_is_left(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.retire_reward=1.0")
    loop, _ = make_loop(tmp_path, config, Scripted(lambda n: 1.0))
    outcome = train(loop)
    loop.folder.close()
    assert outcome.steps == 3  # twelve prompts, four a step
    assert [line["progress/retired_prompts"] for line in lines(tmp_path)] == [4, 8, 12]
    seen = [
        prompt_id
        for step in range(1, 4)
        for prompt_id in pq.read_table(tmp_path / "run" / "samples" / f"step-{step:06d}.parquet")[
            "prompt_id"
        ].to_pylist()
    ]
    assert len(set(seen)) == 12


def test_a_run_that_ends_early_is_evaluated_at_its_end(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, "algorithm.retire_reward=1.0", "data.eval.sets=x", "rewards.0.file=a.py", "rewards.0.name=scripted"
    )
    loop, _ = make_loop(tmp_path, config, Scripted(lambda n: 1.0 if n >= 3 else 0.0))  # 3: the first evaluation's
    outcome = train(loop)
    loop.folder.close()
    assert [(line["step"], line["eval/accuracy"]) for line in lines(tmp_path) if "eval/accuracy" in line] == [
        (0, 0.0),
        (3, 1.0),
    ]
    assert outcome.after is not None
    assert loop.folder.facts["accuracy_after"] == outcome.after.accuracy == 1.0


TIMED = ("time", "tokens/per_second", "perf/learner_tflops_per_rank")


def untimed(tmp_path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines(tmp_path)]


@pytest.mark.parametrize("datasets", [{"d": 12}, {"c": 7, "d": 5}])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, datasets: dict[str, int]) -> None:
    """Of one data set, and of two with weights."""
    mixed = ("data.train=[c,d]", "data.train.0.weight=3", "data.train.1.weight=2") if len(datasets) > 1 else ()
    overrides = (
        *mixed,
        "run.steps=8", "run.save_every=3", "data.eval.sets=x", "data.eval.every=2", "data.eval.by=[start]",
        "algorithm.kl_coef=0.1",
        "algorithm.kl_target=0.01", "algorithm.retire_reward=0.1", "algorithm.group_size=3",
    )  # fmt: skip
    (tmp_path / "straight").mkdir()
    (tmp_path / "cut").mkdir()
    config = make_config(tmp_path, *overrides)
    straight, policy = make_loop(tmp_path / "straight", config, datasets=datasets)
    train(straight)
    straight.folder.close()
    assert [path.name for path in list_checkpoints(tmp_path / "straight" / "run")] == ["step-000006", "step-000008"]

    dying, dying_policy = make_loop(tmp_path / "cut", config, datasets=datasets)
    learn, died_at = dying_policy.step, []

    def die(steps: Sequence[Any]) -> StepResult:
        if dying.progress.step == 5:
            died_at.append(dying.progress.step)
            raise KeyboardInterrupt("the power went")
        return learn(steps)

    dying_policy.step = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="the power went"):
        train(dying)
    dying.folder.close()
    run = tmp_path / "cut" / "run"
    (run / "checkpoints" / "step-000003.partial").rename(run / "checkpoints" / "step-000006.partial")  # half-written
    assert died_at == [5]
    assert list_checkpoints(run) == []  # captured, and not yet a checkpoint

    again, _ = make_loop(tmp_path / "cut", config, reopened=0, datasets=datasets)
    dying_policy.step = learn  # type: ignore[method-assign]
    assert lines(tmp_path / "cut") == []
    stop_after(again, 7)
    assert [path.name for path in list_checkpoints(run)] == ["step-000003"]
    assert [line["step"] for line in lines(tmp_path / "cut")] == list(range(8))

    manifest = read(run / "checkpoints" / "step-000003")
    resumed, resumed_policy = make_loop(tmp_path / "cut", config, reopened=3, datasets=datasets)
    assert [line["step"] for line in lines(tmp_path / "cut")] == list(range(4))
    assert sorted(path.name for path in (run / "samples").glob("step-*")) == [
        f"step-00000{n}.parquet" for n in (1, 2, 3)
    ]
    resumed_policy.restore(run / "checkpoints" / "step-000003")
    resumed = dataclasses.replace(resumed, progress=Progress.restore(manifest.driver, resumed.prompts))
    outcome = train(resumed)
    resumed.folder.close()
    assert outcome.before == straight.progress.before
    assert outcome.after == straight.progress.after
    assert outcome.after is not None
    assert outcome.after.parts
    assert torch.equal(resumed_policy.learner.weight, policy.learner.weight)
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "straight")
    for step in range(1, 9):
        name = f"run/samples/step-{step:06d}.parquet"
        assert pq.read_table(tmp_path / "cut" / name).equals(pq.read_table(tmp_path / "straight" / name)), step
    assert all(line["progress/retired_prompts"] > 0 for line in untimed(tmp_path / "cut")[-2:])
    if mixed:
        epochs = {name: [line[f"progress/epoch/{name}"] for line in untimed(tmp_path / "cut")[1:]] for name in "cd"}
        assert all(sorted(of_set) == of_set for of_set in epochs.values())
        assert epochs["c"][0] == pytest.approx(2 / 7) or epochs["c"][0] == pytest.approx(3 / 7)


def test_a_mix_is_drawn_by_its_weights_and_told_apart(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=9", "data.train=[c,d]", "data.train.0.weight=3", "data.train.1.weight=1")
    loop, _ = make_loop(tmp_path, config, datasets={"c": 7, "d": 5})
    train(loop)
    loop.folder.close()
    for step, line in enumerate(lines(tmp_path), start=1):
        assert (line["group/count/c"], line["group/count/d"]) == (3, 1)
        assert line["progress/epoch/c"] == pytest.approx(3 * step / 7)
        assert line["progress/epoch/d"] == pytest.approx(step / 5)
        assert line["progress/epoch"] == pytest.approx(4 * step / 12)
        table = pq.read_table(tmp_path / "run" / "samples" / f"step-{step:06d}.parquet").to_pandas()
        for name in "cd":
            own = table[table.prompt_id.str.startswith(f"{name}:")]
            assert line[f"reward/mean/{name}"] == pytest.approx(own.reward.mean())
            tokens = own.completion_token_ids.map(len)
            assert line[f"completion/tokens_mean/{name}"] == pytest.approx(tokens.mean())
            assert line[f"completion/truncated_fraction/{name}"] == pytest.approx(
                (own.finish_reason == "length").mean()
            )
            spread = own.groupby("prompt_id").reward.nunique()
            assert line[f"group/no_spread_fraction/{name}"] == pytest.approx((spread == 1).mean())


def test_two_sets_without_weights_are_one_pool(tmp_path: Path) -> None:
    for folder, sets, datasets in (("one", "x", {"d": 12}), ("two", "[c,d]", {"c": 7, "d": 5})):
        (tmp_path / folder).mkdir()
        loop, _ = make_loop(
            tmp_path / folder, make_config(tmp_path, "run.steps=4", f"data.train={sets}"), datasets=datasets
        )
        train(loop)
        loop.folder.close()
    drawn = [
        [row.split(":")[1] for n in range(1, 5) for row in
         pq.read_table(tmp_path / folder / "run" / "samples" / f"step-{n:06d}.parquet")["prompt_id"].to_pylist()]
        for folder in ("one", "two")
    ]  # fmt: skip
    assert drawn[0] == drawn[1]
    assert not [name for name in lines(tmp_path / "one")[0] if name.endswith(("/c", "/d"))]
    last = lines(tmp_path / "two")[-1]
    assert last["group/count/c"] + last["group/count/d"] == last["group/count"]
    assert "progress/epoch/c" not in last


def test_a_run_that_is_asked_to_end_finishes_its_step_and_saves(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=6", "run.trace=true")
    loop, policy = make_loop(tmp_path, config)
    asked = iter([False, False, True])
    outcome = train(dataclasses.replace(loop, stopping=lambda: next(asked)))
    loop.folder.close()
    assert (outcome.finished, outcome.steps) == (False, 3)
    assert [read(path).step for path in list_checkpoints(tmp_path / "run")] == [3]
    assert "save" not in policy.calls  # no model of a run that is not at its end
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert len([*(tmp_path / "run" / "trace").iterdir()]) == 3


def test_a_run_that_is_asked_to_end_at_its_last_step_is_done(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=2"))
    asked = iter([False, True])
    assert train(dataclasses.replace(loop, stopping=lambda: next(asked))).finished
    loop.folder.close()
    assert policy.calls[-2:] == ["save", "capture"]


class Away(CountTwos):
    """Fails every rollout from the `since`-th on, by `kind`, until `back` is set."""

    def __init__(self, since: int, kind: FailureKind = "exception") -> None:
        super().__init__()
        self.since, self.kind, self.back = since, kind, False

    def submit(self, items: Sequence[Any]) -> Future[list[Scored | Failed]]:
        scored = super().submit(items)
        if self.seen <= self.since or self.back:
            return scored
        future: Future[list[Scored | Failed]] = Future()
        future.set_result([Failed(kind=self.kind, detail="judge server went away") for _ in items])
        return future


def resumed_from(tmp_path: Path, config: Config, step: int, scorer: CountTwos | None = None) -> tuple[Loop, Any]:
    """The loop that goes on in tmp_path/run from its checkpoint of `step`."""
    folder = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
    loop, policy = make_loop(tmp_path, config, scorer, reopened=step)
    policy.restore(folder)
    return dataclasses.replace(loop, progress=Progress.restore(read(folder).driver, loop.prompts)), policy


def same_run(tmp_path: Path, straight: Path) -> None:
    """Metrics but times, and samples, are equal."""
    assert untimed(tmp_path) == untimed(straight)
    for file in sorted((straight / "run" / "samples").iterdir()):
        assert pq.read_table(tmp_path / "run" / "samples" / file.name).equals(pq.read_table(file)), file.name


@pytest.mark.parametrize(
    ("options", "since", "good"),
    [
        ((), 32 * 3 + 8, 3),  # in the middle of the fourth step's scoring
        (("run.save_every=2",), 32 * 3 + 8, 3),
        (("data.eval.sets=x", "data.eval.every=2"), 3 + 32 * 2, 2),  # in the evaluation after the second step
        (("data.eval.sets=x",), 3 + 32 * 6, 6),  # in the one at the end
        (("algorithm.max_refills=2", "algorithm.kl_coef=0.1", "algorithm.kl_target=0.01"), 70, None),
    ],
)
def test_an_outage_loses_no_good_step(options: tuple[str, ...], since: int, good: int | None, tmp_path: Path) -> None:
    """The state after the last good step is saved, and the run that goes on from it is the one without an outage."""
    config = make_config(tmp_path, "run.steps=6", *options)
    config = dataclasses.replace(config, rewards=[dataclasses.replace(config.rewards[0], name="twos")])
    (tmp_path / "straight").mkdir()
    (tmp_path / "struck").mkdir()
    straight, policy = make_loop(tmp_path / "straight", config)
    train(straight)
    straight.folder.close()

    loop, _ = make_loop(tmp_path / "struck", config, Away(since))
    with pytest.raises(RewardOutage, match="judge server went away"):
        train(loop)
    loop.folder.close()
    run = tmp_path / "struck" / "run"
    saved = read(list_checkpoints(run)[-1]).step
    assert good in (saved, None)
    assert 0 < saved == lines(tmp_path / "struck")[-1]["step"] == loop.folder.facts["steps"]

    again, resumed_policy = resumed_from(tmp_path / "struck", config, saved)
    outcome = train(again)
    again.folder.close()
    assert outcome.after == straight.progress.after
    assert torch.equal(resumed_policy.learner.weight, policy.learner.weight)
    if len({line["step"] for line in lines(tmp_path / "struck")}) == len(lines(tmp_path / "struck")):
        same_run(tmp_path / "struck", tmp_path / "straight")
    else:  # the missing evaluation has a line of its own
        assert [line["eval/accuracy"] for line in untimed(tmp_path / "struck") if "eval/accuracy" in line] == [
            line["eval/accuracy"] for line in untimed(tmp_path / "straight") if "eval/accuracy" in line
        ]


def test_what_is_not_a_good_state_is_not_saved(tmp_path: Path) -> None:
    """Before the first step, after the update of a step that failed, and of engines that are lost."""

    def raising(at: int, error: Exception, name: str) -> Callable[[Loop, TablePolicy], None]:
        def arm(loop: Loop, policy: TablePolicy) -> None:
            plain = getattr(policy, name)

            def call(*arguments: Any, **named: Any) -> Any:
                if loop.progress.step == at and not (name == "publish" and loop.progress.learned == at):
                    raise error
                return plain(*arguments, **named)

            setattr(policy, name, call)

        return arm

    cases: list[tuple[Callable[[Loop, TablePolicy], None], type[Exception], int | None]] = [
        (raising(0, RuntimeError("sampler"), "sample"), RuntimeError, None),
        (raising(2, RuntimeError("sampler"), "sample"), RuntimeError, 2),
        (raising(2, EngineFailure("learner"), "sample"), EngineFailure, None),
        (raising(2, EngineFailure("sampler", learner_answers=True), "sample"), EngineFailure, 2),
        (raising(2, UserError("judge: No space left on device"), "sample"), UserError, 2),
        (raising(2, OSError(errno.ENOSPC, "full"), "sample"), OSError, None),
        (raising(2, RuntimeError("update"), "step"), RuntimeError, None),
        (raising(2, RuntimeError("sync"), "publish"), RuntimeError, None),
    ]
    for number, (arm, kind, saved) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        loop, policy = make_loop(tmp_path / str(number), make_config(tmp_path))
        arm(loop, policy)
        with pytest.raises(kind):
            train(loop)
        loop.folder.close()
        steps = [read(folder).step for folder in list_checkpoints(tmp_path / str(number) / "run")]
        assert steps == ([] if saved is None else [saved]), number


def test_a_checkpoint_that_was_begun_is_finished(tmp_path: Path) -> None:
    """Also where the state of the step that failed is none to save."""
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.save_every=2"))
    publish_other_weights(policy, 2)
    with pytest.raises(MismatchError):
        train(loop)
    loop.folder.close()
    assert [read(folder).step for folder in list_checkpoints(tmp_path / "run")] == [2]


def test_after_a_failed_update_nothing_is_asked_of_the_learner(tmp_path: Path) -> None:
    """Ranks that wait for the one that failed would not answer."""
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.save_every=2"))
    plain, captured = policy.step, policy.captured
    failed = False

    def step(steps: Sequence[Any]) -> StepResult:
        nonlocal failed
        failed = loop.progress.step == 2
        if failed:
            raise RuntimeError("in the third update")
        return plain(steps)

    def asked(*, wait: bool) -> dict[str, FileRecord] | None:
        assert not failed
        return captured(wait=wait)

    policy.step, policy.captured = step, asked  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="in the third update"):
        train(loop)
    loop.folder.close()
    assert not [line for line in loop.reporter.said if line.startswith("besides")]  # type: ignore[attr-defined]


def test_samples_that_could_not_be_written_end_the_run_before_the_next_update(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, make_config(tmp_path))
    write = loop.folder._write_samples

    def fail(name: str, step: int, *more: Any) -> None:
        if step == 2:
            raise OSError(errno.EIO, "stale")
        write(name, step, *more)

    loop.folder._write_samples = fail  # type: ignore[method-assign]
    raise_failed = loop.folder.raise_failed

    def wait_first() -> None:
        wait(loop.folder._writing[:-1])
        raise_failed()

    loop.folder.raise_failed = wait_first  # type: ignore[method-assign]
    with pytest.raises(OSError, match="stale"):
        train(loop)
    loop.folder.close()
    assert [read(folder).step for folder in list_checkpoints(tmp_path / "run")] == [2]


def test_a_finished_run_needs_no_room_for_its_last_checkpoint(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=2"))
    policy.needs = 2**60
    assert train(loop).finished
    loop.folder.close()
    assert "save" in policy.calls
    assert "the last checkpoint could not be written" in loop.reporter.said[-1]  # type: ignore[attr-defined]


def test_a_state_that_cannot_be_saved_does_not_hide_the_failure(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path), Away(70))
    policy.needs = 2**60
    with pytest.raises(RewardOutage):
        train(loop)
    loop.folder.close()
    said = loop.reporter.said[-1]  # type: ignore[attr-defined]
    assert said.startswith("also, the state after step 2 could not be saved: ")


def test_a_model_that_cannot_be_written_at_the_end_loses_no_step(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=2", "run.save_last=false"))

    def save(folder: Path) -> None:
        raise RuntimeError("no such user")

    policy.save = save  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no such user"):
        train(loop)
    loop.folder.close()
    assert [read(folder).step for folder in list_checkpoints(tmp_path / "run")] == [2]


def test_wrong_values_are_no_outage(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, make_config(tmp_path), Away(70, "wrong_type"))
    with pytest.raises(UserError) as raised:
        train(loop)
    loop.folder.close()
    assert not isinstance(raised.value, RewardOutage)
    assert [read(folder).step for folder in list_checkpoints(tmp_path / "run")] == [2]


def test_a_finished_run_goes_on_to_more_steps(tmp_path: Path) -> None:
    for name in ("straight", "longer", "left out"):
        (tmp_path / name).mkdir()
    longer = make_config(tmp_path, "run.steps=6")
    straight, policy = make_loop(tmp_path / "straight", longer)
    train(straight)
    straight.folder.close()
    first, _ = make_loop(tmp_path / "longer", make_config(tmp_path, "run.steps=4"))
    train(first)
    first.folder.close()
    again, again_policy = resumed_from(tmp_path / "longer", longer, 4)
    train(again)
    again.folder.close()
    assert torch.equal(again_policy.learner.weight, policy.learner.weight)
    same_run(tmp_path / "longer", tmp_path / "straight")
    without, _ = make_loop(tmp_path / "left out", make_config(tmp_path, "run.steps=2", "run.save_last=false"))
    train(without)
    without.folder.close()
    assert list_checkpoints(tmp_path / "left out" / "run") == []


def test_an_accuracy_that_was_not_measured_is_absent(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=6", "data.eval.sets=x")
    config = dataclasses.replace(config, rewards=[dataclasses.replace(config.rewards[0], name="twos")])
    loop, _ = make_loop(tmp_path, config)
    outcome = train(dataclasses.replace(loop, stopping=lambda: True))
    loop.folder.close()
    assert outcome.before is not None
    assert outcome.after is None
    before = outcome.before.interval()
    measured = {"accuracy_before": outcome.before.accuracy, "accuracy_before_interval": [before.low, before.high]}
    assert loop.folder.facts == {"steps": 1, **measured, "warnings": []}
    again, _ = resumed_from(tmp_path, config, 1)
    assert again.progress.accuracies() == measured
    again.folder.close()


@pytest.mark.parametrize(
    ("options", "reward", "signs"),
    [
        ((), lambda n: 1.0, {"constant_reward", "zero_gradient"}),
        (("algorithm.kl_coef=0.1",), lambda n: 0.0, {"constant_reward", "zero_gradient"}),  # it is the reference still
        ((), lambda n: float(n // 8 % 2), {"no_spread", "zero_gradient"}),  # the same for all eight of a group
        (("optimizer.lr=0",), lambda n: float(n % 2), {"zero_lr"}),
        (("algorithm.mask_truncated=true",), lambda n: float(n % 2), {"all_truncated", "zero_gradient"}),
    ],
)  # fmt: skip
def test_a_run_that_learns_nothing_says_so(
    options: tuple[str, ...], reward: Callable[[int], float], signs: set[str], tmp_path: Path
) -> None:
    """At once, and in its summary."""
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=6", *options), Scripted(reward))
    if "all_truncated" in signs:  # the end token is never written
        policy.sampler[:, END] = policy.learner.weight.data[:, END] = -1e9
    train(loop)
    loop.folder.close()
    warnings = loop.folder.facts["warnings"]
    assert {warning["sign"] for warning in warnings} == signs
    said = [line for line in loop.reporter.said if line.startswith("warning: ")]  # type: ignore[attr-defined]
    assert len(said) == len(signs)
    assert all(any(warning["text"] in line for line in said) for warning in warnings)


def test_a_run_that_learns_has_no_warning(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, make_config(tmp_path, "run.steps=6"))
    train(loop)
    loop.folder.close()
    assert loop.folder.facts["warnings"] == []


def stop_after(loop: Loop, steps: int) -> None:
    """Train until that many steps are done, and stop there as a crash would."""
    show = loop.reporter.step

    def stop(step: int, metrics: Mapping[str, float]) -> None:
        show(step, metrics)
        if step == steps:
            raise KeyboardInterrupt

    loop.reporter.step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(loop)
    loop.folder.close()


def test_two_runs_cannot_work_in_one_folder(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    loop, _ = make_loop(tmp_path, config)
    with pytest.raises(UserError, match="another process is working in"):
        reopen(tmp_path / "run", config, 0)
    loop.folder.close()
    reopen(tmp_path / "run", config, 0).close()


def test_accuracy_is_read_from_the_first_of_two_functions_of_one_name(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run.steps=1", "data.eval.sets=x")
    rewards = [RewardConfig(file=file, name="score") for file in ("good.py", "other.py")]
    scorer = Scripted(lambda n: 1.0, parts={"good.score": 0.25, "other.score": 0.75})
    loop, _ = make_loop(tmp_path, dataclasses.replace(config, rewards=rewards), scorer)
    train(loop)
    loop.folder.close()
    assert loop.folder.facts["accuracy_after"] == 0.25


def test_the_kl_coefficient_follows_its_target(tmp_path: Path) -> None:
    overrides = ["run.steps=6", "algorithm.kl_coef=0.1", "algorithm.kl_target=1e6", "algorithm.kl_horizon=1"]
    loop, policy = make_loop(tmp_path, make_config(tmp_path, *overrides))
    train(loop)
    loop.folder.close()
    assert policy.kl_coefs == pytest.approx([0.1 * 0.8**n for n in range(6)])  # far below target: a fifth less a step
    assert [line["policy/kl_coef"] for line in lines(tmp_path)] == policy.kl_coefs


def poisoned(loop: Loop, policy: TablePolicy, steps: set[int]) -> None:
    """Make the advantages of these steps NaN."""
    plain = policy.step

    def step(rank_steps: Sequence[Any]) -> StepResult:
        if loop.progress.step + 1 in steps:
            for batch in (batch for minibatch in rank_steps[0].minibatches for batch in minibatch):
                batch.advantages.fill_(float("nan"))
        return plain(rank_steps)

    policy.step = step  # type: ignore[method-assign]


def test_a_step_that_is_not_finite_is_skipped_said_and_counted(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=9"))
    poisoned(loop, policy, {2, 3, 5, 6, 8})
    weights: list[torch.Tensor] = []
    publish = policy.publish

    def kept(policy_version: int, probe: Any, *, full_check: bool) -> Any:
        weights.append(policy.learner.weight.detach().clone())
        return publish(policy_version, probe, full_check=full_check)

    policy.publish = kept  # type: ignore[method-assign]
    train(loop)
    loop.folder.close()
    assert [line["optim/skipped_updates"] for line in lines(tmp_path)] == [0, 1, 1, 0, 1, 1, 0, 1, 0]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [True, False, False, True, False, False, True, False, True]
    assert [line.split(":")[0] for line in loop.reporter.said if "not finite" in line] == [  # type: ignore[attr-defined]
        f"step {n}" for n in (2, 3, 5, 6, 8)
    ]
    for line in lines(tmp_path):
        used = sum(line[f"gradient/{name}"] for name in ("no_spread", "stopped", "zero_advantage", "contributing"))
        assert used == line["gradient/sampled"]


def test_a_critic_that_is_never_updated_stops_the_run(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=9"))
    plain = policy.step

    def step(rank_steps: Sequence[Any]) -> StepResult:
        result = plain(rank_steps)
        return dataclasses.replace(result, skipped_updates=1)

    policy.step = step  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="step 3: the loss or gradient of 1 updates was not finite"):
        train(loop)
    loop.folder.close()


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=9"))
    poisoned(loop, policy, {2, 4, 5, 6})
    with pytest.raises(NonFiniteError, match=r"step 6: .*grpo replay.*3 steps in a row"):
        train(loop)
    loop.folder.close()
    assert policy.calls.count("publish") == 1 + 5


def test_steps_that_are_not_finite_are_counted_across_a_resume(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.steps=2"))
    poisoned(loop, policy, {1, 2})
    train(loop)
    loop.folder.close()
    assert loop.progress.skipped == 2
    state = json.loads(json.dumps(loop.progress.state(loop.prompts)))
    assert Progress.restore(state, loop.prompts).skipped == 2
    (tmp_path / "other").mkdir()
    other, policy = make_loop(tmp_path / "other", make_config(tmp_path, "run.steps=2"))
    poisoned(other, policy, {1})
    other.progress.skipped = 2
    with pytest.raises(NonFiniteError, match=r"step 1: .*3 steps in a row"):
        train(other)
    other.folder.close()


def group_of(rewards: list[float | None], index: int) -> Group:
    prompt = Prompt(
        prompt_id=f"d:{index}:h", token_ids=(1, 2), text="", row={}, messages=None, dataset="d", where="d[0]"
    )
    completion = Completion(
        token_ids=np.asarray([3], dtype=np.int32), sampler_logprobs=np.zeros(1, dtype=np.float32),
        sampled_mask=np.ones(1, dtype=bool), policy_versions=np.zeros(1, dtype=np.int32),
        finish_reason="stop", seed=None,
    )  # fmt: skip
    outcomes = [Failed(kind="timeout", detail="") if r is None else Scored(value=r, parts={}) for r in rewards]
    rollouts = tuple(Rollout(prompt=prompt, completion=completion, text="", outcome=o) for o in outcomes)
    return Group(prompt=prompt, rollouts=rollouts)


def test_throughput_by_hand(tmp_path: Path) -> None:
    config = make_config(tmp_path, "algorithm.group_size=2", "algorithm.epochs_per_step=3", "algorithm.kl_coef=0.1")
    minibatches = training_rows(
        [group_of([1.0, 0.0], i) for i in range(4)], [], config, 0
    ).minibatches  # 8 rows of 2 positions
    numbers = throughput(config, minibatches, 4 * 1000, {"tokens/sampled": 8, "time/step_s": 4, "time/update_s": 2})
    assert numbers["tokens/per_second"] == 2
    # three epochs forward and backward, one forward of the reference, one for the old logprobs
    assert numbers["perf/learner_tflops_per_rank"] == pytest.approx(1000 * 16 * (6 * 3 + 2 + 2) / 2 / 1e12)
    config = module.load(
        tmp_path / "r.yaml",
        ["cluster.device=gpu", "cluster.samplers=4", "cluster.learner_ranks=4"],
    )
    numbers = throughput(config, minibatches, 4000, {"tokens/sampled": 8, "time/step_s": 4, "time/update_s": 2})
    assert numbers["tokens/per_second_per_gpu"] == 0.5


def test_timings_by_hand() -> None:
    """A step from 10 to 30: 8 s of sampling, 2 of scoring after it, 1 of batching, 4 of the update, a sync from 26 on;
    one second nobody worked."""
    credit: Any = None
    result: Any = None
    sampled = Sampled(groups=(), unused=(), attempts=1, sample_s=8.0, reward_s=2.0)
    learned = Learned(credit=credit, result=result, batch_s=1.0, update_s=4.0)
    sync = SimpleNamespace(
        seconds=3.0, nbytes=5, probe=Spread(rms=0.5, q90=0.25), noise=Spread(rms=0.75, q90=0.125),
        movement_errors=(0.25, 0.5, 0.125), full_check_s=1.5,
    )  # fmt: skip
    numbers = timings(sampled, learned, sync, 10.0, 26.0, 30.0)
    assert numbers == {
        "time/sample_s": 8, "time/reward_s": 2, "time/batch_s": 1, "time/update_s": 4, "time/sync_s": 4,
        "time/idle_s": 1, "time/step_s": 20, "time/samplers_busy_fraction": 12 / 20,
        "time/learner_busy_fraction": 8 / 20, "sync/seconds": 3,
        "sync/bytes": 5, "sync/probe_rms": 0.5, "sync/probe_q90": 0.25, "sync/noise_rms": 0.75,
        "sync/noise_q90": 0.125, "sync/movement_error": 0.5, "time/full_check_s": 1.5,
    }  # fmt: skip


def test_a_trace_has_every_step(tmp_path: Path) -> None:
    loop, policy = make_loop(tmp_path, make_config(tmp_path, "run.trace=true", "run.steps=3", "run.save_every=2"))
    publish = policy.publish

    def slow(version: int, probe: Any, *, full_check: bool) -> Any:
        done = publish(version, probe, full_check=full_check)
        time.sleep(0.05)
        return done

    policy.publish = slow  # type: ignore[method-assign]
    train(loop)
    loop.folder.close()
    files = sorted((tmp_path / "run" / "trace").iterdir())
    assert [file.name for file in files] == [f"step-00000{i}.json" for i in (1, 2, 3)]
    names = [[event["name"] for event in json.loads(file.read_text())["traceEvents"]] for file in files]
    scored = ["sample and score", *["score"] * 4]  # one for each of the step's prompts
    assert names[0] == [*scored, "update", "weight sync"]
    assert names[1] == [*scored, "update", "weight sync", "save"]
    # the sync goes on while the driver reckons the step's metrics
    assert json.loads(files[0].read_text())["traceEvents"][-1]["dur"] >= 50_000


def test_the_mismatch_gate(tmp_path: Path) -> None:
    """The root mean square over two tokens, against five times the noise or the option."""

    def result(*differences: float) -> StepResult:
        squares = sum(d * d for d in differences)
        return StepResult(
            optimizer_steps=1, skipped_updates=0, metrics={}, maxima={}, minima={},
            mismatch_square=Mean(squares, len(differences)), kl_ref=Mean(), learner_logprob_sums={},
            mismatch_counts=mismatch_counts(np.abs(differences)),
        )  # fmt: skip

    def config(*overrides: str) -> Config:
        return module.load(tmp_path / "r.yaml", overrides)

    make_config(tmp_path)
    noise = Spread(rms=0.1, q90=0.0)
    guard_mismatch(result(0.0, 0.70), config(), noise)  # 0.70 / sqrt(2) = 0.495
    for wrong in ((0.0, 0.72), (0.0, float("nan")), (float("inf"), 0.0)):  # 0.72 / sqrt(2) = 0.509
        with pytest.raises(MismatchError, match="sets the limit"):
            guard_mismatch(result(*wrong), config(), noise)
    guard_mismatch(result(0.0, 0.72), config("sampling.temperature=0.5"), noise)  # logprobs are twice as far apart
    with pytest.raises(MismatchError):
        guard_mismatch(result(0.0, 0.72), config("sampling.temperature=2"), noise)
    guard_mismatch(result(0.0, 5.0), config("algorithm.max_mismatch=4"), noise)
    with pytest.raises(MismatchError, match="allowed 4"):
        guard_mismatch(result(5.0, 5.0), config("algorithm.max_mismatch=4"), noise)
    guard_mismatch(result(4e-5), config(), Spread(rms=0.0, q90=0.0))  # five times what float32 logprobs resolve
    with pytest.raises(MismatchError):
        guard_mismatch(result(6e-5), config(), Spread(rms=0.0, q90=0.0))
