"""Answers about prompts: each over the steps, and two files compared prompt by prompt."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.evaluation.statistics import GAINS, bounds
from grpo.types import Json, UserError
from grpo.view.files import NotFoundError, RunFiles, SamplesFile, number
from grpo.view.index import FileIndex
from grpo.view.query import Query
from grpo.view.rows import TOKENS, Groups
from grpo.view.runs import Run
from grpo.view.samples import PREVIEW, as_text, read_group

SORTS = ("prompt_id", "groups", "first", "last", "change", "dataset")
MAX_OCCURRENCES = 200
"""Maximum number of groups of one prompt whose answers are read: the last ones."""
MAX_ANSWERS = 10
"""Answers of a group that are listed, the most frequent first."""


class Prompt:
    """Where a prompt occurs in a run."""

    __slots__ = ("dataset", "first", "first_mean", "groups", "last_mean")

    def __init__(self, dataset: str | None, first: tuple[SamplesFile, Groups, int]) -> None:
        self.dataset, self.first = dataset, first
        self.groups = 0
        self.first_mean: float | None = None
        """Mean reward in the first group that has one."""
        self.last_mean: float | None = None

    def change(self) -> float | None:
        """Return the last mean minus the first; None if it has only one."""
        if self.first_mean is None or self.last_mean is None or self.groups < 2:
            return None
        return self.last_mean - self.first_mean


def prompts_of(run: Run) -> dict[str, Prompt]:
    """Return the prompts of the training steps by id; those of the evaluations if there are no steps."""
    every = [*run.index.all()]
    chosen = [pair for pair in every if pair[0].kind == "step"] or every
    found: dict[str, Prompt] = {}
    for file, index in chosen:
        ids, datasets = index.prompt_ids.to_pylist(), index.datasets.to_pylist()
        for g, (prompt_id, dataset, mean) in enumerate(zip(ids, datasets, index.mean.tolist(), strict=True)):
            one = found.get(prompt_id)
            if one is None:
                one = found[prompt_id] = Prompt(dataset, (file, index.groups, g))
            one.groups += 1
            if not math.isnan(mean):
                one.first_mean = mean if one.first_mean is None else one.first_mean
                one.last_mean = mean
    return found


def text_of_prompt(files: RunFiles, place: tuple[SamplesFile, Groups, int], names: Sequence[str]) -> dict[str, Json]:
    """Return columns of the first row of a group; empty if the file can no longer be read."""
    file, groups, g = place
    try:
        one = Groups(groups.starts[g : g + 1], np.array([1]))
        return read_group(files, file, one, 0, names)[0]
    except (UserError, IndexError):
        return {}


def prompts_answer(run: Run, query: Query) -> Json:
    """Return a page of the prompts of a run."""
    offset, limit = query.page(100)
    sort = query.choice("sort", SORTS, "prompt_id")
    descending = query.choice("order", ("asc", "desc"), "asc") == "desc"
    search = query.text("search")
    found = prompts_of(run)
    wanted = [*found] if not search else [*matching(run, found, search)]

    keyed: dict[str, tuple[float, str]] = {}
    for prompt_id in wanted:
        one = found[prompt_id]
        numbers = {
            "groups": one.groups,
            "first": one.first_mean,
            "last": one.last_mean,
            "change": one.change(),
        }
        value = numbers.get(sort, 0.0)
        if value is not None:
            keyed[prompt_id] = value, {"prompt_id": prompt_id, "dataset": one.dataset or ""}.get(sort, "")
    order = sorted(keyed, key=lambda prompt_id: keyed[prompt_id], reverse=descending)
    order += [prompt_id for prompt_id in wanted if prompt_id not in keyed]
    page = order[offset : offset + limit]
    return {
        "prompts": [
            {
                "prompt_id": prompt_id,
                "dataset": found[prompt_id].dataset,
                "prompt": text[:PREVIEW],
                "groups": found[prompt_id].groups,
                "first_mean": found[prompt_id].first_mean,
                "last_mean": found[prompt_id].last_mean,
                "change": found[prompt_id].change(),
            }
            for prompt_id, text in zip(page, texts_of(run, found, page), strict=True)
        ],
        "total": len(order),
    }


def texts_of(run: Run, found: Mapping[str, Prompt], prompt_ids: Sequence[str]) -> list[str]:
    """Return the texts of prompts. Each file is read once."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for prompt_id in prompt_ids:
        by_file[found[prompt_id].first[0].stem].append(prompt_id)
    texts: dict[str, str] = {}
    for some in by_file.values():
        file, groups, _ = found[some[0]].first
        last = max(found[prompt_id].first[2] for prompt_id in some)
        rows = Groups(np.array([0]), np.array([int(groups.starts[last]) + 1]))
        try:
            prompts = read_group(run.files, file, rows, 0, ["prompt"])
        except UserError:
            continue
        for prompt_id in some:
            at = int(groups.starts[found[prompt_id].first[2]])
            texts[prompt_id] = as_text(prompts[at].get("prompt")) or "" if at < len(prompts) else ""
    return [texts.get(prompt_id, "") for prompt_id in prompt_ids]


def matching(run: Run, found: Mapping[str, Prompt], search: str) -> list[str]:
    """Return the prompts whose id or text contains `search`, without regard to case."""
    folded = search.casefold()
    ids = [*found]
    texts = texts_of(run, found, ids)
    return [i for i, text in zip(ids, texts, strict=True) if folded in i.casefold() or folded in text.casefold()]


def prompt_answer(run: Run, query: Query) -> Json:
    """Return one prompt with its groups over the steps and their answers."""
    prompt_id = query.needed("id")
    places = [
        (file, index, g)
        for file, index in run.index.all()
        for g in np.flatnonzero(index.prompt_ids.to_numpy(zero_copy_only=False) == prompt_id).tolist()
    ]
    if not places:
        raise NotFoundError(f"{run.files.name} has no prompt {prompt_id[:200]!r}")
    places.sort(key=lambda place: (place[0].step or 0, place[0].kind == "step"))
    kept = places[-MAX_OCCURRENCES:]
    first = text_of_prompt(run.files, (kept[0][0], kept[0][1].groups, kept[0][2]), ["prompt", "gold", "dataset"])
    return {
        "prompt_id": prompt_id,
        "dataset": as_text(first.get("dataset")),
        "prompt": as_text(first.get("prompt")),
        "gold": as_text(first.get("gold")),
        "occurrences": [occurrence(run.files, *place) for place in kept],
        "total": len(places),
    }


def occurrence(files: RunFiles, file: SamplesFile, index: FileIndex, g: int) -> dict[str, Json]:
    """Return a group of a prompt, with its most frequent answers."""
    try:
        rows = read_group(files, file, index.groups, g, ["extracted", "reward", TOKENS])
    except UserError:
        rows = []
    lengths = [len(tokens) for row in rows if isinstance(tokens := row.get(TOKENS), list)]
    counts = Counter(as_text(row.get("extracted")) or "" for row in rows)
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if (reward := number(row.get("reward"))) is not None:
            rewards[as_text(row.get("extracted")) or ""].append(reward)
    return {
        "file": file.stem,
        "kind": file.kind,
        "step": file.step,
        "group": g,
        "mean": number(float(index.mean[g])),
        "n": int(index.groups.sizes[g]),
        "failed": int(index.failed[g]),
        "length_mean": sum(lengths) / len(lengths) if lengths else None,
        "answers": [
            {
                "answer": answer[:PREVIEW],
                "count": count,
                "mean_reward": sum(rewards[answer]) / len(rewards[answer]) if rewards[answer] else None,
            }
            for answer, count in counts.most_common(MAX_ANSWERS)
        ],
    }


def default_file(run: Run) -> str:
    """Return the last evaluation of a run, or its last step without one. Raises NotFoundError if it has no samples."""
    files = run.files.samples()
    if not files:
        raise NotFoundError(f"{run.files.name} has no samples")
    return max(files, key=lambda file: (file.kind == "eval", file.step or 0)).stem


def compare_answer(a: Run, b: Run, query: Query) -> Json:
    """Return two files compared by prompt id: which prompts b does better (won), worse or equally."""
    offset, limit = query.page(200)
    verdict = query.choice("verdict", ("all", "won", "lost", "unchanged"), "all")
    stems = [query.text("file_a") or default_file(a), query.text("file_b") or default_file(b)]
    files = [run.files.samples_file(stem) for run, stem in zip((a, b), stems, strict=True)]
    sides = [means_of(run.index.of(file)) for run, file in zip((a, b), files, strict=True)]
    shared = [prompt_id for prompt_id in sides[0] if prompt_id in sides[1]]
    gains = {p: sides[1][p][0] - sides[0][p][0] for p in shared}
    counts = Counter(verdict_of(gain) for gain in gains.values())
    by_set: dict[str, list[float]] = defaultdict(list)
    for prompt_id, gain in gains.items():
        by_set[sides[0][prompt_id][2] or ""].append(gain)
    strata = [np.asarray(values) for values in by_set.values()]
    span = span_of_gains([mean for side in sides for mean, _, _ in side.values()])
    low, high = bounds(strata, span) if len(gains) > 1 else (math.nan, math.nan)
    order = sorted((p for p in shared if verdict in ("all", verdict_of(gains[p]))), key=lambda p: (gains[p], p))
    page = order[offset : offset + limit]
    index = a.index.of(files[0])
    rows = {p: text_of_prompt(a.files, (files[0], index.groups, sides[0][p][1]), ["prompt", "gold"]) for p in page}
    return {
        "file_a": stems[0],
        "file_b": stems[1],
        **{name: counts[name] for name in ("won", "lost", "unchanged")},
        "only_a": len(sides[0]) - len(shared),
        "only_b": len(sides[1]) - len(shared),
        "difference": float(np.mean([values.mean() for values in strata])) if strata else None,
        "interval": [number(low), number(high)] if len(gains) > 1 else None,
        "too_few": too_few([len(values) for values in strata]),
        "prompts": [
            {
                "prompt_id": p,
                "prompt": (as_text(rows[p].get("prompt")) or "")[:PREVIEW],
                "gold": as_text(rows[p].get("gold")),
                "mean_a": sides[0][p][0],
                "mean_b": sides[1][p][0],
                "group_a": sides[0][p][1],
                "group_b": sides[1][p][1],
                "verdict": verdict_of(gains[p]),
            }
            for p in page
        ],
        "total": len(order),
    }


def span_of_gains(means: Sequence[float]) -> tuple[float, float]:
    """Return the range of the gains of prompts: that of rewards from 0 to 1, or wider if the mean rewards of the two
    files are further apart than 1. An interval needs it, because a gain that no prompt shows can still occur."""
    reach = max(GAINS[1], max(means) - min(means)) if means else GAINS[1]
    return -reach, reach


def too_few(counts: Sequence[int]) -> bool:
    """Return whether the interval of the gain contains 0 whatever these prompts show, even if b loses each of them by
    the largest possible gain. `counts`: number of prompts of each data set."""
    return sum(counts) < 30 and bounds([np.full(count, GAINS[0]) for count in counts], GAINS)[1] >= 0


def verdict_of(gain: float) -> str:
    """Return `won` if b is better, `lost` if a is, else `unchanged`."""
    return "won" if gain > 0 else "lost" if gain < 0 else "unchanged"


def means_of(index: FileIndex) -> dict[str, tuple[float, int, str | None]]:
    """Return prompt_id -> (mean reward, group, data set) of the prompts that have a reward; the first group of each."""
    out: dict[str, tuple[float, int, str | None]] = {}
    rows = zip(index.prompt_ids.to_pylist(), index.mean.tolist(), index.datasets.to_pylist(), strict=True)
    for g, (prompt_id, mean, dataset) in enumerate(rows):
        if not math.isnan(mean):
            out.setdefault(prompt_id, (mean, g, dataset))
    return out
