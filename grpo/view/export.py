"""One HTML file with a view of runs, to send to someone: static files and data are inlined, and nothing is loaded.

The page is that of the server. It reads the answers of the endpoints from a block of JSON instead of over the network.
Its content security policy allows its own script and style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Mapping

from grpo.types import Json, UserError
from grpo.view import api, samples
from grpo.view.bundle import STATIC, bundle
from grpo.view.files import NotFoundError
from grpo.view.query import Query
from grpo.view.runs import Run

MAX_BYTES = 8 << 20
"""Bytes of the data of the page. Longer texts of completions are truncated to fit, and marked."""
SHORTEST = 500
"""Characters that are kept of every completion, however many there are."""


def html_page(opened: api.Runs, step: str | None = None) -> str:
    """Return the page. It has the overview of the runs, and of each the completions of one step and one evaluation.

    Args:
        step: number of a step, or stem of a samples file; None: the last step and the last evaluation.

    Raises UserError when no run has the step.
    """
    data: dict[str, Json] = {"/api/runs": json_of(api.answer(opened, "/api/runs", {}))}
    chosen = {run.number: files_of(run, step) for run in opened}
    if step is not None and not any(chosen.values()):
        raise NotFoundError(f"--step {step}: no run has such a samples file")
    for run in opened:
        root = f"/api/runs/{run.number}"
        data[root] = json_of(api.answer(opened, root, {}))
        data[f"{root}/series"] = json_of(api.answer(opened, f"{root}/series", {}))
        for stem in chosen[run.number]:
            add_file(data, run, stem)
        if step is not None and chosen[run.number] and "start" not in data:
            data["start"] = f"#/run/{run.number}/step/{chosen[run.number][0]}"
    shorten(data)
    return assemble(data)


def json_of(found: api.Answer) -> Json:
    """Return an answer that is not lines."""
    answer: Json = json.loads(b"".join(api.parts_of(found)))
    return answer


def files_of(run: Run, step: str | None) -> list[str]:
    """Return the stems of the samples files of a run that the page has."""
    files = run.files.samples()
    if step is not None:
        wanted = f"step-{int(step):06d}" if step.isdecimal() and len(step) < 10 else step
        return [file.stem for file in files if file.stem == wanted]
    last = {file.kind: file.stem for file in files}
    return [last[kind] for kind in ("step", "eval") if kind in last]


def add_file(data: dict[str, Json], run: Run, stem: str) -> None:
    """Add the groups of a samples file and their completions, without tokens."""
    path = f"/api/runs/{run.number}/samples/{stem}"
    file = run.files.samples_file(stem)
    data[path] = samples.groups_answer(run.files, stem, Query({}, []), page=(0, sys.maxsize))
    for g, group in samples.every_group(run.files, file):
        data[f"{path}/groups/{g}"] = group


def shorten(data: Mapping[str, Json]) -> None:
    """Truncate the texts of completions so that the data has about MAX_BYTES."""
    texts = [one for answer in data.values() if isinstance(answer, dict) for one in completions_of(answer)]
    lengths = sorted(len(json.dumps(one["text"])) for one in texts)
    left = MAX_BYTES - sum(len(api.to_json(answer)) for answer in data.values()) + sum(lengths)
    for i, length in enumerate(lengths):
        if length * (len(lengths) - i) > left:  # the remaining texts share what is left
            limit = max(SHORTEST, left // (len(lengths) - i))
            break
        left -= length
    else:
        return
    for one in texts:
        text = str(one["text"])
        if len(json.dumps(text)) > limit:
            kept = min(len(text), limit * len(text) // len(json.dumps(text)))
            one |= {"text": text[:kept], "truncated_text": True}


def completions_of(answer: Mapping[str, Json]) -> list[dict[str, Json]]:
    """Return the completions in the answer about a group; none for another answer."""
    found = answer.get("completions")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def assemble(data: Mapping[str, Json]) -> str:
    """Return the HTML of the page with its data."""
    page, script = static("index.html"), bundle()
    style = static("style.css")
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    text = api.to_json(dict(data)).decode().replace("<", "\\u003c")
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    page = put(page, "<head>", f"<head>\n{meta}")
    page = put(page, '<link rel="stylesheet" href="/static/style.css">', f"<style>{style}</style>")
    inline = f'<script type="application/json" id="data">{text}</script>\n<script type="module">{script}</script>'
    return put(page, '<script type="module" src="/static/app.js"></script>', inline)


def put(page: str, mark: str, text: str) -> str:
    """Return the page with `text` in place of `mark`. Raises RuntimeError if the page does not have it once."""
    if page.count(mark) != 1:
        raise RuntimeError(f"{STATIC / 'index.html'} has {mark} {page.count(mark)} times")
    before, _, after = page.partition(mark)
    return f"{before}{text}{after}"


def digest(text: str) -> str:
    """Return the hash of an inline script or style for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def static(name: str) -> str:
    """Return a static file of the page. Raises UserError if the installation lacks it."""
    try:
        return (STATIC / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"the installation has no {error.filename}; install grpo again") from error
