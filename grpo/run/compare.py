"""`grpo compare A B`: compare two runs, or two evaluations."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from grpo.config import RewardConfig, leaves, part_names
from grpo.evaluation.answers import final_answer
from grpo.evaluation.statistics import (
    GAINS,
    Judged,
    bounds,
    interval,
    judge,
    repeats_of_avg,
    sign_test,
    statistics_of,
    with_bounds,
)
from grpo.metrics.measures import HEADLINE
from grpo.run.checkpoints import MANIFEST
from grpo.run.results import metric_lines, numbers, read_config
from grpo.run.samples import PART, read_columns
from grpo.suggest import common_start, one_line
from grpo.types import Json, UserError

Samples = dict[str, dict[str, list[Judged]]]
"""Data set -> prompt_id -> its completions."""
COLUMNS = ("dataset", "prompt_id", "sample_index", "completion", "finish_reason", "completion_token_ids")
BY_ITSELF = "grpo eval"
NOT_COMPARED = ("run.name", "run.dir")
TRAINING = ("critic.", "learner.", "optimizer.", "run.")
"""Beginnings of options that have no effect on an evaluation."""
SHOWN = 40
"""Maximum number of characters shown of a value."""
LAST_STEPS = 10
"""Number of last steps over which metrics are averaged."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The data of a run, or of an evaluation made by `grpo eval`."""

    path: Path
    config: Mapping[str, Json]
    record: Mapping[str, Mapping[str, str]]
    """Record written by the run or evaluation: `fingerprints` of the files it read, `versions` of the libraries."""
    metrics: Mapping[int, Mapping[str, float]]
    """step -> its line of metrics.jsonl."""
    samples: Samples
    evaluated: str
    """Describes the evaluation that `samples` belong to."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One completion of a samples file."""

    dataset: str
    prompt_id: str
    sample_index: int
    completion: str
    finish_reason: str
    tokens: int
    parts: Mapping[str, float]
    """Values of the rewards that gave one."""


def compare(first: Path, second: Path, step: int | None = None) -> list[str]:
    """Return lines that compare options, graders, evaluations (with paired intervals) and metrics.

    Args:
        step: compare the evaluations after this step; None: the last evaluation of each.

    Raises UserError when a folder is neither a run nor an evaluation, or the two have nothing in common.
    """
    a, b = (read_subject(path.expanduser(), step) for path in (first, second))
    if step is not None and a.evaluated == b.evaluated == BY_ITSELF:
        raise UserError(f"--step {step} is for runs; {a.path} and {b.path} are evaluations by grpo eval, without steps")
    lines = [f"A  {a.path}  ({a.evaluated})", f"B  {b.path}  ({b.evaluated})", ""]
    lines += [*differing_options(a, b), *differing_graders(a, b), ""]
    lines += compare_evaluations(a.samples, b.samples)
    steps = sorted(set(a.metrics) & set(b.metrics) - {0})
    if steps:
        lines += ["", *compare_metrics(a, b, steps)]
    return lines


def read_subject(path: Path, step: int | None) -> Subject:
    """Read a run folder or an evaluation folder.

    Raises UserError when `path` holds neither a run nor an evaluation, or no evaluation after `step`.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is neither a run folder nor an evaluation: it has no config.yaml")
    config = read_config(path / "config.yaml")
    found = ((re.fullmatch(r"eval-(\d+)", file.stem), file) for file in (path / "samples").glob("*.parquet"))
    made = {int(named[1]): file for named, file in found if named}
    if (path / "evaluation.json").is_file():
        files, evaluated = sorted((path / "samples").glob("*.parquet")), BY_ITSELF
    elif (path / "key.json").is_file():
        raise UserError(f"{path} is an evaluation that is not finished; the same grpo eval command continues it")
    elif step is None and not made:
        files, evaluated = [], "no evaluation"
    else:
        step = max(made) if step is None else step
        if step not in made:
            have = ", ".join(map(str, sorted(made))) or "none"
            raise UserError(f"{path} has no evaluation after step {step}; it has {have}")
        files, evaluated = [made[step]], f"evaluation after step {step}"
    samples = read_samples(files)
    if evaluated == BY_ITSELF:
        check_counts(path, samples)
    return Subject(
        path=path, config=config, record=read_record(path), metrics=read_metrics(path / "metrics.jsonl"),
        samples=samples, evaluated=evaluated,
    )  # fmt: skip


def read_record(path: Path) -> dict[str, dict[str, str]]:
    """Return the record of an evaluation or an ended run. For a run that has not ended, return the record of its last
    checkpoint, or an empty one without a checkpoint.

    Raises UserError when a record is damaged.
    """
    checkpoints = sorted((path / "checkpoints").glob("step-*[0-9]"))
    files = [path / "key.json", path / "summary.json", *(folder / MANIFEST for folder in checkpoints[-1:])]
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged: {one_line(error, 200)}") from error
        if isinstance(record, dict) and isinstance(record.get("fingerprints"), dict):
            return {"fingerprints": record["fingerprints"], "versions": record.get("versions", {})}
    return {"fingerprints": {}, "versions": {}}


def check_counts(path: Path, samples: Samples) -> None:
    """Raise UserError unless the numbers of prompts and completions match the evaluation's result."""
    try:
        sets = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))["sets"]
        wanted = {name: (found["prompts"], found["samples_per_prompt"]) for name, found in sets.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / 'evaluation.json'} is damaged; the same grpo eval command writes it again") from error
    for name in dict.fromkeys([*wanted, *samples]):
        prompts, asked = samples.get(name, {}), wanted.get(name, (0, 0))
        have = (len(prompts), max((len(some) for some in prompts.values()), default=0))
        if have != asked:
            raise UserError(
                f"{path / 'samples'} has {have[0]} prompts of {name} with {have[1]} completions each, and its "
                f"evaluation.json is of {asked[0]} with {asked[1]}; the same grpo eval command samples what is missing"
            )


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Return step -> metrics; empty without a file. Raises UserError naming a damaged line."""
    out: dict[int, dict[str, float]] = defaultdict(dict)
    for values in map(numbers, metric_lines(path)):
        out[int(values.pop("step"))] |= values  # an evaluation may have a separate line
    return out


def read_rows(file: Path) -> list[SampleRow]:
    """Return the rows of a samples file. Raises UserError when the file is damaged."""
    table = read_columns(file, COLUMNS)
    lengths = pc.list_value_length(table["completion_token_ids"])
    rows = []
    for row in table.drop_columns("completion_token_ids").append_column("tokens", lengths).to_pylist():
        values = {name: row.pop(name) for name in [*row] if name.startswith(PART)}
        if None in row.values():
            raise UserError(f"{file} is damaged: a completion of {row['prompt_id']} has gaps")
        parts = {name.removeprefix(PART): value for name, value in values.items() if value is not None}
        odd = [name for name, value in parts.items() if not math.isfinite(value)]
        if odd:
            raise UserError(f"{file} is damaged: {PART}{odd[0]} of a completion of {row['prompt_id']} is no number")
        rows.append(SampleRow(**row, parts=parts))
    return rows


def read_samples(files: Sequence[Path]) -> Samples:
    """Return the completions of samples files.

    Raises UserError when a file is damaged, or when the prompts of a data set do not all have the same sample indices,
    each once.
    """
    by_set: dict[str, list[SampleRow]] = defaultdict(list)
    for file in files:
        for row in read_rows(file):
            by_set[row.dataset].append(row)
    out: Samples = {}
    for name, rows in by_set.items():
        by = judge([row.parts for row in rows])
        prompts = out[name] = defaultdict(list)
        indices = defaultdict(list)
        for row in rows:
            indices[row.prompt_id].append(row.sample_index)
            prompts[row.prompt_id].append(
                Judged(
                    value=None if by is None else row.parts.get(by),
                    answer=final_answer(row.completion),
                    tokens=row.tokens,
                    truncated=row.finish_reason == "length",
                )
            )
        most = max(len(some) for some in indices.values())
        for prompt_id, some in indices.items():
            if sorted(some) != list(range(most)):
                shown = str(sorted(some))
                shown = shown if len(shown) <= SHOWN else f"...{shown[3 - SHOWN :]}"
                raise UserError(
                    f"{files[0].parent} is damaged: {prompt_id} has the completions {shown}, where each prompt of "
                    f"{name} has 0 to {most - 1} once"
                )
    return out


def differing_options(a: Subject, b: Subject) -> list[str]:
    """Return a table of the options that differ, including those inside lists (rewards[0].weight). Of two evaluations
    by themselves, options of training are left out."""
    old, new = dict(leaves(a.config)), dict(leaves(b.config))
    names = [name for name in sorted({*old, *new} - {*NOT_COMPARED}) if old.get(name) != new.get(name)]
    if a.evaluated == b.evaluated == BY_ITSELF:
        names = [name for name in names if not name.startswith(TRAINING)]
    if not names:
        return ["options: the same"]
    return table([["option", "A", "B"], *([name, *differing_values(old.get(name), new.get(name))] for name in names)])


def differing_graders(a: Subject, b: Subject) -> list[str]:
    """Return warnings if A and B were graded differently: by other functions, file contents or library versions.

    A difference in accuracy may then come from the graders.
    """
    one, other = graders(a), graders(b)
    warnings = []
    if [*one] != [*other]:
        said = " and ".join(f"{which} by {', '.join(some) or 'none'}" for which, some in (("A", one), ("B", other)))
        warnings.append(f"warning: the graders differ: {said}; the first of them determines accuracy")
    for name in one:
        if name not in other or one[name] == other[name]:
            continue
        unknown = [which for which, some in (("A", one), ("B", other)) if some[name] is None]
        if unknown:
            warnings.append(f"note: {unknown[0]} has no record of the content of the grader {name}")
        else:
            warnings.append(
                f"warning: the grader {name} has different contents in A and B, so they are graded differently"
            )
    old, new = (subject.record["versions"].get("math-verify") for subject in (a, b))
    if old and new and old != new:
        warnings.append(f"warning: math-verify, which math_answer uses, is {old} in A and {new} in B")
    return warnings


def graders(subject: Subject) -> dict[str, str | None]:
    """Return name of the reward function -> fingerprint of its file; None if unknown.

    Raises UserError when the rewards of the config are damaged.
    """
    sections: Any = subject.config.get("rewards", [])
    try:
        names = part_names([RewardConfig(file=each["file"], name=each.get("name")) for each in sections])
    except (TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{subject.path / 'config.yaml'} is damaged: its rewards are none") from error
    return {name: subject.record["fingerprints"].get(f"rewards[{i}].file") for i, name in enumerate(names)}


def differing_values(old: Json, new: Json) -> tuple[str, str]:
    """Return two values, shortened; long values are shown from shortly before their first difference."""
    one, other = ("-" if value is None else str(value).replace("\n", "\\n") for value in (old, new))
    if max(len(one), len(other)) <= SHOWN:
        return one, other
    start = max(0, common_start(one, other) - SHOWN // 4)

    def part(text: str) -> str:
        text = f"...{text[start + 3 :]}" if start > 3 else text
        return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."

    return part(one), part(other)


def compare_evaluations(a: Samples, b: Samples) -> list[str]:
    """Return a table with a line for each statistic of each data set, over the prompts that both evaluations have.

    Raises UserError when both have an evaluation but share no prompt.
    """
    if not a or not b:
        return [f"nothing to compare on held-out data: {' and '.join(n for n, s in (('A', a), ('B', b)) if not s)} "
                "has no evaluation"]  # fmt: skip
    rows = [["data set", "prompts", "statistic", "A", "B", "B - A, 95 % interval", "p"]]
    notes = []
    for name in [name for name in a if name in b]:
        shared = [prompt_id for prompt_id in a[name] if prompt_id in b[name]]
        if not shared:
            continue
        left = {max(len(a[name]), len(b[name])) - len(shared)} - {0}
        notes += [f"note: {n} prompts of {name} are in only one of the two, and are left out" for n in left]
        unscored = [which for which, some in (("A", a), ("B", b)) if not any_scored(some[name][p] for p in shared)]
        if unscored:
            notes.append(f"note: no completion of {name} was scored in {' and '.join(unscored)}")
            continue
        first, second = (statistics_of({p: some[name][p] for p in shared}) for some in (a, b))
        k = max(len(some) for samples in (a[name], b[name]) for some in samples.values())
        for statistic in [s for s in first if s in second and s != "pass"]:
            if statistic in repeats_of_avg(k) and all(same(one[statistic], one["avg"]) for one in (first, second)):
                continue
            both = [p for p in first[statistic] if p in second[statistic]]
            old, new = (np.asarray([values[statistic][p] for p in both]) for values in (first, second))
            rows.append([name, str(len(both)), statistic, *row_of(old, new)])
    if len(rows) == 1 and notes:
        return ["nothing to compare on held-out data", *notes]
    if len(rows) == 1:
        raise UserError(
            f"the two evaluations share no prompt: A has {', '.join(a)} and B has {', '.join(b)}; the data must be the "
            "same, with the same columns"
        )
    return [*table(rows), *notes]


def same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Return whether two statistics have the same values, up to rounding, of the same prompts."""
    return one.keys() == other.keys() and all(math.isclose(one[p], other[p], abs_tol=1e-9) for p in one)


def any_scored(prompts: Iterable[Sequence[Judged]]) -> bool:
    return any(sample.value is not None for some in prompts for sample in some)


def row_of(old: NDArray[np.float64], new: NDArray[np.float64]) -> list[str]:
    """Return both means with intervals, the paired gain with its interval, and the p-value, as texts."""
    gains = new - old
    low, high = bounds([gains], GAINS)
    gain = f"{gains.mean():+.3f} ({low:+.3f} to {high:+.3f})" if len(gains) > 1 else f"{gains.mean():+.3f}"
    return [with_bounds(interval(list(old))), with_bounds(interval(list(new))), gain, f"{sign_test([gains]):.4f}"]


def compare_metrics(a: Subject, b: Subject, steps: Sequence[int]) -> list[str]:
    """Return a table of the headline metrics, averaged over the last steps that both runs have."""
    last = steps[-LAST_STEPS:]
    rows = [[f"mean of steps {last[0]} to {last[-1]}", "A", "B"]]
    for name in (*HEADLINE, "tokens/sampled"):
        means = [[subject.metrics[step][name] for step in last if name in subject.metrics[step]] for subject in (a, b)]
        if all(means):
            rows.append([name, *(f"{np.mean(values):.4g}" for values in means)])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
