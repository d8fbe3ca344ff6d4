"""The endpoints: one table, used by the server, by `grpo view --json`, by the HTML page and by the documentation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from grpo.suggest import suggest
from grpo.types import Json
from grpo.view import find, prompts, runs, samples
from grpo.view.files import NotFoundError, open_runs
from grpo.view.query import Query, whole
from grpo.view.runs import Run

Answer: TypeAlias = "Json | Iterator[bytes]"
"""The answer of an endpoint: JSON, or lines of JSON."""
Runs = Sequence[Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One endpoint."""

    path: str
    """Its path, with `{name}` for a part that varies."""
    doc: str
    parameters: Mapping[str, str]
    """Parameter -> its meaning."""
    answer: Callable[[Runs, Mapping[str, str], Query], Answer]

    def match(self, path: str) -> dict[str, str] | None:
        """Return the varying parts of `path` by name; None if it is the path of another endpoint."""
        found = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path), path)
        return found.groupdict() if found else None


def open_paths(paths: Sequence[Path]) -> list[Run]:
    """Return the runs of the viewer. Raises UserError when a path is no run and no folder of runs."""
    return [Run(i, files) for i, files in enumerate(open_runs([*paths]))]


def answer(opened: Runs, path: str, parameters: Mapping[str, str]) -> Answer:
    """Return the answer to a request. `path`: without the query, such as `/api/runs/0`.

    Raises NotFoundError for what does not exist, UserError for another mistake.
    """
    path = "/" + path.strip("/")
    for endpoint in ENDPOINTS:
        if (parts := endpoint.match(path)) is not None:
            return endpoint.answer(opened, parts, Query(parameters, [*endpoint.parameters]))
    near = suggest(path[:200], [endpoint.path for endpoint in ENDPOINTS])
    raise NotFoundError(f"there is no endpoint {path[:200]}{near or '; /api/describe lists them'}")


def run_of(opened: Runs, text: str, name: str = "run") -> Run:
    """Return the run with this number. Raises NotFoundError if there is none."""
    number = whole(name, text)
    if number >= len(opened):
        raise NotFoundError(f"there is no run {number}; the runs are 0 to {len(opened) - 1}")
    return opened[number]


def to_json(value: Json) -> bytes:
    """Return `value` as JSON. Numbers that are not finite become null."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"), default=str).encode()
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, separators=(",", ":"), default=str).encode()


def parts_of(found: Answer) -> Iterator[bytes]:
    """Yield an answer in parts: one line of JSON, or its lines."""
    if isinstance(found, Iterator):
        yield from found
    else:
        yield to_json(found) + b"\n"


def finite(value: Json) -> Json:
    """Return `value` with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(opened: Runs, parts: Mapping[str, str], query: Query) -> Json:
    """Return the list of endpoints."""
    return {
        "endpoints": [
            {"path": one.path, "doc": one.doc, "parameters": dict(one.parameters)} for one in ENDPOINTS
        ]
    }  # fmt: skip


FILTER = "an expression over the columns (docs/view.md#filters)"
PAGE = {"offset": "number of entries to leave out", "limit": "maximum number of entries, at most 1000"}
ORDER = {"order": "asc or desc"}
FILE = "stem of a samples file, such as step-000010"

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(path="/api/describe", doc="the endpoints", parameters={}, answer=describe),
    Endpoint(
        path="/api/runs", doc="the runs, by their order on the command line", parameters={},
        answer=lambda opened, parts, query: runs.runs_answer(opened),
    ),
    Endpoint(
        path="/api/runs/{run}", doc="a run: state, accuracies, options, alarms, names of metrics, samples files",
        parameters={}, answer=lambda opened, parts, query: runs.run_answer(run_of(opened, parts["run"])),
    ),
    Endpoint(
        path="/api/runs/{run}/series", doc="the values of metrics over the steps",
        parameters={"names": "names of metrics, separated by commas; all if absent"},
        answer=lambda opened, parts, query: runs.series_answer(run_of(opened, parts["run"]), query),
    ),
    Endpoint(
        path="/api/runs/{run}/timeline/{step}", doc="the spans of a step, with run.trace=true", parameters={},
        answer=lambda opened, parts, query: runs.timeline_answer(run_of(opened, parts["run"]), parts["step"]),
    ),
    Endpoint(
        path="/api/runs/{run}/samples/{file}", doc="the groups of a samples file",
        parameters={"filter": FILTER, "sort": ", ".join(samples.SORTS), **ORDER, **PAGE},
        answer=lambda opened, parts, query: samples.groups_answer(
            run_of(opened, parts["run"]).files, parts["file"], query
        ),
    ),
    Endpoint(
        path="/api/runs/{run}/samples/{file}/groups/{group}", doc="the completions of a group", parameters={},
        answer=lambda opened, parts, query: samples.group_answer(
            run_of(opened, parts["run"]).files, parts["file"], parts["group"]
        ),
    ),
    Endpoint(
        path="/api/runs/{run}/samples/{file}/groups/{group}/{index}", doc="a completion with its tokens",
        parameters={"offset": "first token", "limit": "maximum number of tokens, at most 10000"},
        answer=lambda opened, parts, query: samples.completion_answer(
            run_of(opened, parts["run"]).files, parts["file"], parts["group"], parts["index"], query
        ),
    ),
    Endpoint(
        path="/api/runs/{run}/prompts", doc="the prompts of the run with their first and last mean reward",
        parameters={"search": "text in the prompt or its id", "sort": ", ".join(prompts.SORTS), **ORDER, **PAGE},
        answer=lambda opened, parts, query: prompts.prompts_answer(run_of(opened, parts["run"]), query),
    ),
    Endpoint(
        path="/api/runs/{run}/prompts/one", doc="a prompt over the steps: rewards, lengths, answers",
        parameters={"id": "prompt_id"},
        answer=lambda opened, parts, query: prompts.prompt_answer(run_of(opened, parts["run"]), query),
    ),
    Endpoint(
        path="/api/compare", doc="two samples files, prompt by prompt: what b won and lost",
        parameters={
            "a": "number of a run", "b": "number of a run", "file_a": f"{FILE}; the last evaluation if absent",
            "file_b": f"{FILE}; the last evaluation if absent", "verdict": "all, won, lost or unchanged", **PAGE,
        },
        answer=lambda opened, parts, query: prompts.compare_answer(
            run_of(opened, query.needed("a"), "a"), run_of(opened, query.needed("b"), "b"), query
        ),
    ),
    Endpoint(
        path="/api/search", doc="completions by text (case matters), token ids or filter, in all samples files",
        parameters={
            "run": "number of a run", "q": "text in a prompt or a completion", "ids": "token ids, in sequence",
            "filter": FILTER, "limit": "maximum number of hits, at most 1000",
        },
        answer=lambda opened, parts, query: find.search_answer(run_of(opened, query.text("run", "0")), query),
    ),
    Endpoint(
        path="/api/export", doc="completions as JSONL: fields of the data row, prompt, completion, reward and others",
        parameters={"run": "number of a run", "file": f"{FILE}; all files if absent", "filter": FILTER},
        answer=lambda opened, parts, query: find.export_lines(run_of(opened, query.text("run", "0")), query),
    ),
)  # fmt: skip
