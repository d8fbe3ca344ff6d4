"""Answers about runs: the list, one run with its options and alarms, curves and timelines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from grpo import config as config_module
from grpo.config import Config
from grpo.metrics.health import CAUSES
from grpo.metrics.names import meaning_of
from grpo.types import Json, UserError
from grpo.view.alarms import DISAGREEING_AT_FIRST, DISAGREEING_COUNT, DISAGREEING_FRACTION, Alarm, alarms_of
from grpo.view.files import NotFoundError, RunFiles, number
from grpo.view.index import Disagreement, Index, disagreement
from grpo.view.query import Query, whole

WATERFALL = (
    "failed", "truncated", "no_spread", "stale", "zero_advantage", "stopped", "mismatch_masked", "clipped",
    "contributing",
)  # fmt: skip
"""Columns of the token accounting in the order in which a token is counted (docs/objectives.md)."""
ACCURACIES = (
    "accuracy_before", "accuracy_before_interval", "accuracy_after", "accuracy_after_interval", "accuracy_after_step",
)  # fmt: skip
MAX_SPANS = 20_000
"""Maximum number of spans of a timeline in one answer."""


class Run:
    """One run of the viewer."""

    def __init__(self, number: int, files: RunFiles) -> None:
        self.number, self.files, self.index = number, files, Index(files)
        self._alarms: tuple[str, list[Alarm]] = ("", [])

    def config(self) -> tuple[Config | None, str | None]:
        """Return the config, or None with a sentence about why it cannot be read."""
        try:
            return self.files.config(), None
        except UserError as error:
            return None, str(error)

    def alarms(self) -> list[Alarm]:
        """Return the alarms. They are computed when the folder has changed."""
        changed = self.files.changed()
        if self._alarms[0] != changed:
            lines = self.files.metrics().lines()
            self._alarms = changed, [*alarms_of(self.config()[0], lines), *grader_alarms(self.files)]
        return self._alarms[1]

    def entry(self) -> dict[str, Json]:
        """Return the run as the list of runs has it."""
        metrics, problems = self.files.metrics(), []
        try:
            summary = self.files.summary()
        except UserError as error:
            summary = {}
            problems.append(str(error))
        config, problem = self.config()
        problems += [one for one in (problem, metrics.problem) if one]
        recipe = self.files.path / "recipe.txt"
        accuracies = {name: summary.get(name) for name in ACCURACIES}
        if accuracies["accuracy_after"] is None and accuracies["accuracy_before"] is None:
            accuracies |= measured(metrics.steps, metrics.series("eval/accuracy"))
        return {
            "run": self.number,
            "name": self.files.name,
            "folder": str(self.files.path),
            "recipe": recipe_name(recipe.read_text(errors="replace")) if recipe.is_file() else None,
            "state": self.files.state(summary),
            "exit_reason": summary.get("exit_reason"),
            "steps": max([*metrics.steps, 0]),
            "steps_planned": config.run.steps if config else None,
            **accuracies,
            "alarm_titles": [alarm.title for alarm in self.alarms()],
            "changed": self.files.changed(),
            "problem": "; ".join(problems) or None,
        }


def recipe_name(text: str) -> str:
    """Return the path of the recipe, from recipe.txt."""
    return text.strip()[:1000]


def measured(steps: Sequence[int], values: Sequence[float | None]) -> dict[str, Json]:
    """Return the accuracies of a run without a summary, from its metrics; their intervals are not known yet."""
    found = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    before = [value for step, value in found if step == 0]
    after = [(step, value) for step, value in found if step > 0]
    return {
        "accuracy_before": before[0] if before else None,
        "accuracy_after": after[-1][1] if after else None,
        "accuracy_after_step": after[-1][0] if after else None,
    }


def grader_alarms(files: RunFiles) -> list[Alarm]:
    """Return an alarm if completions that end with the gold answer got the lowest value of the reward that judges
    them, in the last samples file of a step, or for many of them in the first."""
    steps = [file for file in files.samples() if file.kind == "step"]
    held = []
    for file in dict.fromkeys([*steps[:1], *steps[-1:]]):
        try:
            found = disagreement(files, file)
        except (UserError, FileNotFoundError):
            continue
        if found is not None and disagrees(found, last=file == steps[-1]):
            held.append((file.step or 0, found))
    if not held:
        return []
    step, found = held[0]
    return [
        Alarm(
            kind="grader_disagrees",
            title="Right answers get the lowest reward",
            text=f"{found.lowest} of {found.known} completions in step {step} end with the gold answer and got the "
            f"lowest value of `{found.reward}`",
            cause="the reward may read something else than the final answer, or compare it in another form: compare "
            "what it extracted with the gold answer; the prompt must ask for the form that it reads",
            first_step=step, last_step=held[-1][0], steps=len(held), group=found.group,
        )
    ]  # fmt: skip


def disagrees(found: Disagreement, *, last: bool) -> bool:
    """Return whether a disagreement is worth an alarm. `last`: it is that of the last step."""
    if found.lowest < DISAGREEING_COUNT or found.lowest < DISAGREEING_FRACTION * found.known:
        return False
    return last or found.lowest >= DISAGREEING_AT_FIRST * found.right


def runs_answer(runs: Sequence[Run]) -> Json:
    """Return the list of runs."""
    return {"runs": [run.entry() for run in runs]}


def run_answer(run: Run) -> Json:
    """Return one run with its options, alarms and files."""
    metrics, config = run.files.metrics(), run.config()[0]
    try:
        summary = run.files.summary()
    except UserError:
        summary = {}
    try:
        sessions = run.files.read_json("sessions.json")
    except UserError:
        sessions = None
    files = run.files.samples()
    stems = {file.step: file.stem for file in files if file.kind == "step"}
    return {
        **run.entry(),
        "summary": summary,
        "options": option_list(config),
        "weights": {reward.function: reward.weight for reward in config.rewards} if config else {},
        "metrics": [
            dict(zip(("name", "section", "doc"), (name, *meaning_of(name)), strict=True)) for name in metrics.columns
        ],
        "alarms": [alarm.as_json() | {"file": stems.get(alarm.first_step)} for alarm in run.alarms()],
        "files": [
            {"file": file.stem, "kind": file.kind, "step": file.step, "rows": run.files.rows(file)} for file in files
        ],
        "trace_steps": trace_steps(run.files),
        "sessions": sessions if isinstance(sessions, list) else [],
        "waterfall": [
            {"name": f"gradient/{name}", "doc": f"tokens that change no weight: {CAUSES[name]}"}
            if name != "contributing" else {"name": "gradient/contributing", "doc": "tokens that reached the loss"}
            for name in WATERFALL
        ],
    }  # fmt: skip


def option_list(config: Config | None) -> list[Json]:
    """Return every option of the run, with its default and meaning."""
    out: list[Json] = []
    for name, value in config_module.values(config) if config else ():
        option = config_module.declaration(name)
        plain = list(value) if isinstance(value, tuple) else value
        default = option.plain_default if option else []  # an empty list of sections declares nothing itself
        required = default == "???"  # OmegaConf's mark of an option without a default
        out.append(
            {
                "name": name,
                "value": plain,
                "default": None if required else default,
                "required": required,
                "is_default": plain == default,
                "doc": config_module.meaning_text(option) if option else "",
            }
        )
    return out


def series_answer(run: Run, query: Query) -> Json:
    """Return curves."""
    metrics = run.files.metrics()
    asked = query.text("names")
    names = [name for name in asked.split(",") if name in metrics.columns] if asked else [*metrics.columns]
    return {"steps": [*metrics.steps], "series": {name: metrics.series(name) for name in names}}


def trace_steps(files: RunFiles) -> list[int]:
    """Return the steps that have a timeline."""
    found = (re.fullmatch(r"step-(\d{1,12})", path.stem) for path in (files.path / "trace").glob("step-*.json"))
    return sorted(int(named[1]) for named in found if named)


def timeline_answer(run: Run, step: str) -> Json:
    """Return who worked when in a step."""
    found = run.files.read_json(f"trace/step-{whole('step', step):06d}.json")
    if found is None:
        have = "it has no timelines: they are written with run.trace=true"
        if steps := trace_steps(run.files):
            have = f"it has those of steps {steps[0]} to {steps[-1]}"
        raise NotFoundError(f"{run.files.name} has no timeline of step {step}; {have}")
    events = found.get("traceEvents") if isinstance(found, dict) else None
    if not isinstance(events, list):
        raise UserError(f"the timeline of step {step} of {run.files.name} is damaged: it has no list of events")
    spans = [span_of(event) for event in events[:MAX_SPANS] if isinstance(event, dict)]
    begin = min((start for span in spans if (start := number(span["start_s"])) is not None), default=0.0)
    for span in spans:
        span["start_s"] = (number(span["start_s"]) or 0.0) - begin
    return {"step": int(step), "spans": spans}


def span_of(event: Mapping[str, Json]) -> dict[str, Json]:
    """Return a span of a timeline from an event of its file."""
    return {
        "role": str(event.get("tid", "")),
        "name": str(event.get("name", "")),
        "start_s": (number(event.get("ts")) or 0.0) / 1e6,
        "seconds": (number(event.get("dur")) or 0.0) / 1e6,
        "details": event.get("args"),
    }
