"""The viewer in a terminal: run, step, group and completion as text, for a machine without a browser.

Control characters, invisible characters and those that change the direction of text are shown by their numbers, so a
completion cannot move the cursor, hide text or change colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl, urlsplit

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from grpo.metrics.measures import HEADLINE
from grpo.types import Json
from grpo.view import api
from grpo.view.files import NotFoundError, number
from grpo.view.runs import Run
from grpo.view.visible import visible

BARS = "▁▂▃▄▅▆▇█"
CURVE = 28
"""Columns of a curve: with the longest name of a metric, it fits into 80 columns."""
QUANTITIES = {
    "sampler_logprob": "logprob", "difference": "diff", "entropy": "entropy", "advantage": "advant.",
    "importance_weight": "weight", "version": "version",
}  # fmt: skip
"""Value of a token -> short heading of its column."""
MAX_TEXT = 4000
"""Characters of a completion in a group."""


def print_place(opened: api.Runs, place: str, console: Console) -> None:
    """Print a part of the runs.

    Args:
        place: "" for the overview; `step-000010`, optionally with the parameters of its endpoint
            (`step-000010?filter=reward < 0.5`), for a step; `step-000010/3` for a group, `step-000010/3/0` for a
            completion.

    Raises UserError when there is no such part.
    """
    url = urlsplit(place)
    parts = [part for part in url.path.split("/") if part]
    if len(parts) > 3:
        raise NotFoundError(f"--text {place[:80]}: it must be FILE, FILE/GROUP or FILE/GROUP/COMPLETION")
    parameters = dict(parse_qsl(url.query, keep_blank_values=True))
    for run in opened:
        if not parts:
            console.print(overview(opened, run))
            continue
        path = f"/api/runs/{run.number}/samples/{parts[0]}"
        path += "".join(f"/{word}" for word in (["groups", *parts[1:]] if len(parts) > 1 else []))
        found = answer(opened, path, parameters)
        console.print(plain(f"{run.files.name}  {'/'.join(parts)}", "bold"))
        console.print((step_page, group_page, completion_page)[len(parts) - 1](found))


def answer(opened: api.Runs, path: str, parameters: Mapping[str, str]) -> Mapping[str, Json]:
    """Return the answer of an endpoint that is a mapping."""
    found = api.answer(opened, path, parameters)
    assert isinstance(found, Mapping)
    return found


def plain(text: Json, style: str = "") -> Text:
    """Return a value as text of one style; markup in it is text."""
    return Text(visible("" if text is None else str(text)), style=style)


def entries(found: Json) -> list[Mapping[str, Json]]:
    """Return the mappings of a list."""
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, Sequence) else []


def table(*names: str) -> Table:
    """Return a table with these columns."""
    made = Table(box=None, pad_edge=False, header_style="dim", show_edge=False)
    for name in names:
        made.add_column(name, overflow="fold")
    return made


def overview(opened: api.Runs, run: Run) -> RenderableType:
    """Return the page of a run: state, alarms, curves, and the options that differ from their defaults."""
    found = answer(opened, f"/api/runs/{run.number}", {})
    parts: list[RenderableType] = [plain(found["name"], "bold"), facts(found)]
    for alarm in entries(found["alarms"]):
        first, last = alarm["first_step"], alarm["last_step"]
        steps = f"step {first}" if first == last else f"{alarm['steps']} of the steps {first} to {last}"
        parts += [plain(f"! {alarm['title']} ({steps})", "bold yellow"), plain(f"  {alarm['text']}: {alarm['cause']}")]
    metrics = run.files.metrics()
    curves = table("metric", "first", "last", "")
    for name in HEADLINE:
        values = metrics.series(name)
        if known := [value for value in values if value is not None]:
            curves.add_row(plain(name), plain(f"{known[0]:.4g}"), plain(f"{known[-1]:.4g}"), plain(curve(values)))
    options = table("option", "value", "default")
    for option in entries(found["options"]):
        if not option["is_default"]:
            standard = "required" if option["required"] else shown(option["default"])
            options.add_row(plain(option["name"]), plain(shown(option["value"])), plain(standard))
    files = [str(file["file"]) for file in entries(found["files"])]
    listed = f"{len(files)} samples files" + (
        f", {files[0]} to {files[-1]}; show one with --text {files[-1]}" if files else ""
    )
    return Group(*parts, Text(), curves, Text(), options, Text(), plain(listed, "dim"))


def facts(found: Mapping[str, Json]) -> Text:
    """Return the line with state, steps and accuracies."""
    words = [str(found["state"]), f"{found['steps']} of {found['steps_planned'] or '?'} steps"]
    for name, when in (("accuracy_before", "before"), ("accuracy_after", "after")):
        if (value := number(found[name])) is not None:
            interval = found[f"{name}_interval"]
            ends = [number(end) for end in interval] if isinstance(interval, Sequence) else []
            between = f" ({ends[0]:.3f} to {ends[1]:.3f})" if len(ends) == 2 and None not in ends else ""
            words.append(f"accuracy {when} {value:.3f}{between}")
    words += [str(found[name]) for name in ("exit_reason", "problem") if found[name] not in (None, "done")]
    return plain("; ".join(words))


def shown(value: Json) -> str:
    """Return a value in at most 60 characters."""
    text = "-" if value is None else str(value).replace("\n", "\\n")
    return text if len(text) <= 60 else f"{text[:57]}..."


def curve(values: Sequence[float | None]) -> str:
    """Return a curve of at most CURVE characters, from the lowest to the highest value; a gap is a space."""
    size = max(1, -(-len(values) // CURVE))
    means = []
    for at in range(0, len(values), size):
        known = [value for value in values[at : at + size] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    present = [mean for mean in means if mean is not None]
    low, high = min(present), max(present)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else BARS[round((mean - low) * scale)] for mean in means)


def step_page(found: Mapping[str, Json]) -> RenderableType:
    """Return the groups of a samples file."""
    rows = table("group", "mean", "spread", "tokens", "failed", "rewards", "prompt")
    for group in entries(found["groups"]):
        cells = Text()
        for cell in entries(group["cells"]):
            cells.append_text(reward_mark(cell))
        rows.add_row(
            plain(group["group"]), *(plain(rounded(group[name])) for name in ("mean", "spread", "length_mean")),
            plain(group["failed"]), cells, plain(str(group["prompt"] or "").replace("\n", " ")[:80]),
        )  # fmt: skip
    line = (
        f"{found['matching_groups']} of {found['total_groups']} groups, {found['matching_rows']} of "
        f"{found['total_rows']} completions"
    )
    return Group(plain(line, "dim"), rows)


def reward_mark(cell: Mapping[str, Json]) -> Text:
    """Return the reward of a completion as a word: what the filter does not match is dim."""
    reward = number(cell["reward"])
    word = "fail" if reward is None else f"{reward:.2g}"
    cut = "…" if cell["finish_reason"] == "length" else ""
    style = "red" if reward is None else "green" if reward > 0 else ""
    return Text(f"{word}{cut} ", style=style if cell["matches"] else "dim")


def rounded(value: Json, digits: int = 4) -> str:
    """Return a number with this many digits; `-` for none."""
    known = number(value)
    return "-" if known is None else f"{known + 0.0:.{digits}g}"  # 0, not -0


def group_page(found: Mapping[str, Json]) -> RenderableType:
    """Return the completions of a group."""
    parts: list[RenderableType] = [plain(found["prompt"], "dim"), plain(f"gold: {found['gold']}", "bold")]
    for one in entries(found["completions"]):
        parts += [Text(), completion_head(one), plain(str(one["text"])[:MAX_TEXT])]
    return Group(*parts)


def completion_head(one: Mapping[str, Json]) -> Text:
    """Return the line above a completion: reward, parts, what was extracted, and why."""
    words = [f"[{one['index']}]", f"reward {rounded(one['reward'])}"]
    parts = one["parts"]
    words += [f"{name} {rounded(value)}" for name, value in parts.items()] if isinstance(parts, Mapping) else []
    words += [
        f"{name} {one[name]}" for name in ("extracted", "why", "failed", "failed_detail") if one[name] is not None
    ]
    if one["final_answer"] and one["final_answer"] != one["extracted"]:
        words.append(f"ends with {one['final_answer']}")
    return plain("; ".join([*words, f"{one['finish_reason']} after {one['length']} tokens"]), "bold cyan")


def completion_page(found: Mapping[str, Json]) -> RenderableType:
    """Return a completion with its tokens."""
    tokens = entries(found["tokens"])
    kept = [name for name in QUANTITIES if any(token[name] is not None for token in tokens)]
    rows = table("", "id", "text", *(QUANTITIES[name] for name in kept))
    for token in tokens:
        text = plain(repr(token["text"]) if token["text"] is not None else "-", "bold" if token["special"] else "")
        values = (plain(rounded(token[name], 3)) for name in kept)
        rows.add_row(plain(token["index"]), plain(token["id"]), text, *values)
    absent = [plain(f"{one['column']}: {one['why']}", "dim") for one in entries(found["absent"])]
    return Group(completion_head(found), plain(str(found["text"])[:MAX_TEXT]), Text(), rows, *absent)
