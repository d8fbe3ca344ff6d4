"""The folder of an evaluation: named after its inputs, so that it is a cache, and resumable.

evals/<model>-<key>/  config.yaml  key.json  samples/<n>.parquet  evaluation.json  logs/
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download

from grpo import config as config_module
from grpo import data
from grpo.checks.check import CheckedRun
from grpo.cluster import engines
from grpo.config import Config
from grpo.evaluation.statistics import Interval, Judged, interval, parts_by, repeats_of_avg, statistics_of, with_bounds
from grpo.files import fingerprint
from grpo.rollout.collect import PASSING, Scorer, collect, enforce_failure_budget, eval_seed, may_pass, requests_of
from grpo.run import folder as run_folder
from grpo.run.compare import Samples, read_rows, read_samples, table
from grpo.run.heartbeat import Watch
from grpo.run.samples import read_columns, write_groups
from grpo.run.timeline import Timeline
from grpo.sampler.settings import eval_settings
from grpo.types import Group, Json, Moment, Prompt, UserError

WRITE_S = 20.0
"""Seconds between two writes of completions; an interruption may lose that much."""
SAY_S = 10.0
RESULT = "evaluation.json"
KEY = "key.json"
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "*.py",
)  # fmt: skip
"""Patterns of the files that define the tokenizer of a model folder, including its own code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """Result of one data set, or of a part of it."""

    prompts: int
    samples_per_prompt: int
    failed: int
    tokens_mean: float
    tokens_max: int
    truncated_fraction: float
    statistics: Mapping[str, Interval]
    """`avg`, `pass@<k>` and `maj`; empty if no completion was scored."""
    by: Mapping[str, Mapping[str, SetResult]] = field(default_factory=dict)
    """Column of data.eval.by -> its value -> the result of the prompts with that value."""

    def as_json(self) -> dict[str, Json]:
        """Return the result as evaluation.json has it."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("statistics", "by")},
            **{
                name: {k: None if math.isnan(v) else v for k, v in dataclasses.asdict(found).items()}
                for name, found in self.statistics.items()
            },
            **{
                f"by {name}": {value: part.as_json() for value, part in parts.items()}
                for name, parts in self.by.items()
            },
        }


def key_of(plan: CheckedRun, model: str) -> dict[str, Json]:
    """Return all inputs that determine the numbers of an evaluation. `model`: SHA-256 of the model folder."""
    config = plan.config
    return {
        "model": model,
        "tokenizer": tokenizer_fingerprint(config.model.path),
        "fingerprints": {name: value for name, value in plan.fingerprints.items() if name != "data.train"},
        "samples_per_prompt": {name: config.data.eval.samples_of(name) for name in set_names(plan)},
        "settings": dataclasses.asdict(eval_settings(config, plan.end_token_ids)),
        "dtype": config.model.dtype,
        "float32_head": config.model.float32_head,
        "seeded": config.sampling.seeded,
        "seed": config.run.seed,
        "sampler.engine": config.sampler.engine,
        "rewards": [[r.function, r.weight, r.style, list(r.sets), r.timeout_s, r.memory_gib] for r in config.rewards],
        "versions": run_folder.versions(),
    }


def tokenizer_fingerprint(path: str) -> str:
    """Return the SHA-256 of the tokenizer files of a model folder or hub id."""
    folder = Path(path)
    if not folder.is_dir():
        with data.hub_or_cache():
            folder = Path(snapshot_download(path, allow_patterns=list(TOKENIZER_FILES)))
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return fingerprint(sorted(files))


def folder_of(root: Path, name: str, key: Mapping[str, Json]) -> Path:
    """Return the folder of the evaluation with this key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return root / f"{name}-{digest[:12]}"


@contextmanager
def opened(folder: Path, key: Mapping[str, Json], plan: CheckedRun) -> Iterator[None]:
    """Create or reopen an evaluation folder, and lock it so that only one process works in it.

    Raises UserError when another process works in it, or when it cannot be created.
    """
    try:
        for sub in ("samples", "logs"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--out {folder.parent}: no folder can be created there: {error.strerror}") from error
    with run_folder.lock(folder, f"another process is evaluating into {folder}"):
        run_folder.drop_unfinished(folder)
        run_folder.write_text(folder / "config.yaml", config_module.dump(plan.config))
        run_folder.write_text(folder / KEY, json.dumps(key, indent=2, sort_keys=True) + "\n")
        yield


def set_names(plan: CheckedRun) -> list[str]:
    """Return the names of the data sets, in the recipe's order."""
    return list(dict.fromkeys(prompt.dataset for prompt in plan.eval_prompts))


def unfinished(plan: CheckedRun, folder: Path, say: Callable[[str], None]) -> dict[str, list[Prompt]]:
    """Return data set -> its prompts whose completions are not in the folder, for the sets that have any.

    Only the samples count: an existing result does not prove that they exist.
    """
    done = finished_prompts(plan, folder, say)
    out = {}
    for name in set_names(plan):
        prompts = [p for p in plan.eval_prompts if p.dataset == name]
        if left := [p for p in prompts if p.prompt_id not in done]:
            out[name] = left
        if 0 < len(left) < len(prompts):
            say(f"{name}: {len(prompts) - len(left)} of {len(prompts)} prompts have been evaluated before")
    return out


def evaluate(
    plan: CheckedRun,
    folder: Path,
    left: Mapping[str, Sequence[Prompt]],
    sampler: engines.Engines,
    scorer: Scorer,
    say: Callable[[str], None],
) -> dict[str, SetResult]:
    """Sample and score the prompts in `left` (see `unfinished`), then write the result and return it by data set.

    Raises UserError when too many completions fail; the samples made until then are in the folder.
    """
    writer = Writer(folder, plan.config)
    try:
        for name, prompts in left.items():
            each = plan.config.data.eval.samples_of(name)
            say(f"sampling {each} completions of {len(prompts)} prompts of {name}")
            sample_set(plan, name, prompts, sampler, scorer, writer, say)
    finally:
        writer.flush()
    return conclude(plan, folder)


def conclude(plan: CheckedRun, folder: Path) -> dict[str, SetResult]:
    """Write the result of the samples in the folder, and return it by data set.

    Raises UserError when too many completions failed.
    """
    sets = results(plan, read_samples(sorted((folder / "samples").glob("*.parquet"))))
    for name, found in sets.items():
        bound = plan.config.algorithm.max_failed_fraction
        if found.failed > bound * found.prompts * found.samples_per_prompt:
            raise UserError(
                f"{found.failed} completions of {name} have no reward, more than algorithm.max_failed_fraction="
                f"{bound:g} allows; they are in {folder / 'samples'}, with why"
            )
    result = {"versions": run_folder.versions(), "sets": {name: found.as_json() for name, found in sets.items()}}
    run_folder.write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    return sets


def sample_set(
    plan: CheckedRun,
    name: str,
    prompts: Sequence[Prompt],
    sampler: engines.Engines,
    scorer: Scorer,
    writer: Writer,
    say: Callable[[str], None],
) -> None:
    """Sample and score one data set, and write its completions as they arrive.

    Raises UserError when too many completions fail.
    """
    config = plan.config
    started = said = time.monotonic()
    count = tokens = 0

    def keep(group: Group) -> None:
        nonlocal said, count, tokens
        writer.add(group)
        count += 1
        tokens += sum(len(rollout.completion.token_ids) for rollout in group.rollouts)
        if time.monotonic() - said > SAY_S or count == len(prompts):
            said = time.monotonic()
            say(f"{name}: {count} of {len(prompts)} prompts, {tokens / (said - started):.0f} tokens/s")

    each = config.data.eval.samples_of(name)
    completions, timeline = len(prompts) * each, Timeline(None)
    with Watch(name, completions, sampler=sampler, scorer=scorer, timeline=timeline, say=say) as watch:
        collected = collect(
            prompts,
            requests_of(prompts, each, functools.partial(eval_seed, config)),
            sampler=sampler,
            scorer=scorer,
            settings=eval_settings(config, plan.end_token_ids),
            decode=functools.partial(data.completion_texts, plan.tokenizer),
            moment=Moment(),
            reward_timeout_s=config.cluster.step_timeout_s,
            observer=watch,
            when_scored=keep,
        )
    enforce_failure_budget(collected.groups, config.algorithm)


class Writer:
    """Writes groups to samples/<n>.parquet, every WRITE_S seconds. Groups with failures that a retry may fix go to a
    separate file, which the next evaluation into the folder may remove."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder, self._answer_column = folder / "samples", config.data.answer_column
        self._rewards = config_module.part_names(config.rewards)
        numbers = [int(path.stem) for path in self._folder.glob("*.parquet") if path.stem.isdecimal()]
        self._number = 1 + max(numbers, default=-1)
        self._whole: list[Group] = []
        self._failed: list[Group] = []
        self._written = time.monotonic()

    def add(self, group: Group) -> None:
        again = any(may_pass(rollout.outcome) for rollout in group.rollouts)
        (self._failed if again else self._whole).append(group)
        if time.monotonic() - self._written > WRITE_S:
            self.flush()

    def flush(self) -> None:
        for groups in (self._whole, self._failed):
            if groups:
                target = self._folder / f"{self._number:06d}.parquet"
                write_groups(target, 0, groups, rewards=self._rewards, answer_column=self._answer_column)
                self._number += 1
        self._whole, self._failed, self._written = [], [], time.monotonic()


def finished_prompts(plan: CheckedRun, folder: Path, say: Callable[[str], None]) -> set[str]:
    """Return the prompts whose completions are all in the folder, and remove the files that `survey` finds unusable.
    Their prompts are sampled again, with the same seeds."""
    done, unusable = survey(plan, folder)
    for path, why in unusable.items():
        say(f"{why}; it is removed, and its prompts are sampled again")
        path.unlink()
    return done


def survey(plan: CheckedRun, folder: Path) -> tuple[set[str], dict[Path, str]]:
    """Return the prompts whose completions are all in the folder, each once, and file -> why it does not count.

    A file does not count when it is damaged or incomplete, or has prompts of another file. While there is no result, a
    file with failures that a retry may fix does not count either.
    """
    concluded = (folder / RESULT).exists()
    asked = {p.prompt_id: plan.config.data.eval.samples_of(p.dataset) for p in plan.eval_prompts}
    done: set[str] = set()
    unusable: dict[Path, str] = {}
    for path in sorted((folder / "samples").glob("*.parquet")):
        found: dict[str, list[int]] = defaultdict(list)
        try:
            for row in read_rows(path):
                found[row.prompt_id].append(row.sample_index)
        except UserError as error:
            unusable[path] = str(error)
            continue
        parts = [name for name, some in found.items() if sorted(some) != list(range(asked.get(name, 0)))]
        if done & found.keys():
            unusable[path] = f"{path} has prompts of another file"
        elif parts:
            unusable[path] = f"{path} does not hold all of {parts[0]}"
        elif not concluded and (failed := count_passing(path)):
            unusable[path] = f"{path} holds {failed} completions without a reward"
        else:
            done |= found.keys()
    return done, unusable


def count_passing(file: Path) -> int:
    """Return the number of failed completions of a samples file that a retry may fix."""
    return sum(kind in PASSING for kind in read_columns(file, ["failed"])["failed"].to_pylist())


def results(plan: CheckedRun, samples: Samples) -> dict[str, SetResult]:
    """Return data set -> its result."""
    rows = {prompt.prompt_id: prompt.row for prompt in plan.eval_prompts}
    sets = {}
    for name in set_names(plan):
        parts = {column: parts_by(column, rows, samples[name]) for column in plan.config.data.eval.by}
        by = {
            column: {value: summarize(part) for value, part in some.items()} for column, some in parts.items() if some
        }
        sets[name] = dataclasses.replace(summarize(samples[name]), by=by)
    return sets


def summarize(samples: Mapping[str, Sequence[Judged]]) -> SetResult:
    """Return the result of one data set, or of a part of it, without `by`."""
    every = [sample for some in samples.values() for sample in some]
    failed = sum(sample.value is None for sample in every)
    found = statistics_of(samples) if failed < len(every) else {}
    return SetResult(
        prompts=len(samples),
        samples_per_prompt=max(len(some) for some in samples.values()),
        failed=failed,
        tokens_mean=float(np.mean([sample.tokens for sample in every])),
        tokens_max=max(sample.tokens for sample in every),
        truncated_fraction=float(np.mean([sample.truncated for sample in every])),
        # "pass" is redundant: it equals pass@k when no completion has failed
        statistics={name: interval(list(values.values())) for name, values in found.items() if name != "pass"},
    )


def report(sets: Mapping[str, SetResult]) -> list[str]:
    """Return the results of the data sets as the lines of a table. Statistics that are the same numbers as avg@k are
    left out."""
    lines = [*lines_of(sets)]
    ks = sorted({int(s.partition("@")[2]) for _, part in lines for s in part.statistics if "@" in s})
    k = max(part.samples_per_prompt for _, part in lines)
    statistics = [*(["avg"] if ks else []), *(f"pass@{k}" for k in ks), "maj"]
    statistics = [
        s for s in statistics
        if s not in repeats_of_avg(k) or any(cell(part, s) != cell(part, "avg") for _, part in lines)
    ]  # fmt: skip
    names = [s if "@" in s else f"{s}@k" for s in statistics]
    rows = [["data set", "prompts", "k", *names, "tokens", "truncated", "failed"]]
    for label, part in lines:
        rows.append(
            [
                label,
                str(part.prompts),
                str(part.samples_per_prompt),
                *(cell(part, s) for s in statistics),
                f"{part.tokens_mean:.1f}",
                f"{part.truncated_fraction:.1%}",
                str(part.failed),
            ]
        )
    notes = [f"note: no completion of {name} was scored" for name, found in sets.items() if not found.statistics]
    return [*table(rows), *notes]


def lines_of(sets: Mapping[str, SetResult]) -> Iterator[tuple[str, SetResult]]:
    """Yield the label and the result of each data set and of its parts."""
    for name, found in sets.items():
        yield name, found
        for column, parts in found.by.items():
            yield from ((f"  {column} {value}", part) for value, part in parts.items())


def cell(part: SetResult, statistic: str) -> str:
    """Return a statistic with its interval as text; a dash if the part does not have it."""
    return with_bounds(part.statistics[statistic]) if statistic in part.statistics else "-"


def name_of(model: str) -> str:
    """Return a short name of a model, for the evaluation folder; for the model of a run the name of the run."""
    path = Path(model).expanduser().resolve() if os.path.isdir(Path(model).expanduser()) else Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name
