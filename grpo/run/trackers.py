"""Send the metrics of each step, and sometimes a table of completions, to TensorBoard and W&B."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo.config import Config
from grpo.evaluation.answers import final_answer
from grpo.objective.spread import has_spread
from grpo.run.checkpoints import plain
from grpo.run.samples import UNTRAINED, Trained, gold_answer
from grpo.suggest import one_line
from grpo.types import Failed, Group, UserError

TABLE_EVERY = 10
"""Steps between two tables of training completions; each evaluation has one."""
TABLE_GROUPS = 2
"""Groups per table. Each contributes the completions with the highest and the lowest reward."""
TABLE_CHARACTERS = 2000
"""Maximum length of a text in a table; the middle of a longer text is left out. samples/ has the full texts."""
NO_MARKUP = str.maketrans({"\n": "<br>", "\r": ""} | {mark: f"&#{ord(mark)};" for mark in "|*_`~[]\\"})
COLUMNS = ("prompt_id", "prompt", "completion", "extracted", "gold", "reward", "advantage", "finish")

STEP = "step"
"""Metric of W&B with the step of the other metrics."""

Row = Mapping[str, str]


class Tracker(Protocol):
    """Receiver of the metrics and completions of a run."""

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Show a table. `rows`: column in COLUMNS -> text."""

    def close(self, *, failed: bool) -> None:
        """End its threads and files. Another run of this process has a tracker of its own."""


def table_is_due(name: str, step: int) -> bool:
    """Return whether a samples file gets a table. `name`: name of the file, step-... or eval-..."""
    return name.startswith("eval") or step == 1 or step % TABLE_EVERY == 0


def table_rows(groups: Sequence[Group], answer_column: str, trained: Trained = UNTRAINED) -> list[Row]:
    """Return the rows of a table of completions: of TABLE_GROUPS groups the completions with the highest and the lowest
    reward. Groups with spread are preferred."""
    starts = [sum(len(group.rollouts) for group in groups[:i]) for i in range(len(groups))]
    order = sorted(range(len(groups)), key=lambda i: not has_spread(groups[i].rewards))
    rows: list[Row] = []
    for i in order[:TABLE_GROUPS]:
        values = [None if isinstance(r.outcome, Failed) else r.outcome.value for r in groups[i].rollouts]
        scored = [j for j, value in enumerate(values) if value is not None] or [0]
        by_value = sorted(scored, key=lambda j: values[j] or 0.0)
        for j in dict.fromkeys((by_value[-1], by_value[0])):
            rollout, value = groups[i].rollouts[j], values[j]
            advantage = trained.advantages.get(starts[i] + j)
            outcome = f"{value:g}" if value is not None else f"failed: {getattr(rollout.outcome, 'kind', '')}"
            texts = (
                rollout.prompt.prompt_id, rollout.prompt.text, rollout.text, final_answer(rollout.text),
                gold_answer(rollout.prompt.row, answer_column) or "", outcome,
                "" if advantage is None else f"{advantage:.3g}", rollout.completion.finish_reason,
            )  # fmt: skip
            rows.append(dict(zip(COLUMNS, map(shorten, texts), strict=True)))
    return rows


def shorten(text: str) -> str:
    """Replace the middle of a text of more than TABLE_CHARACTERS by the number of characters left out."""
    if len(text) <= TABLE_CHARACTERS:
        return text
    half = TABLE_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table. Texts are escaped, so they contain no markup."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        lines.append(" | ".join(html.escape(row[name]).translate(NO_MARKUP) for name in COLUMNS))
    return "\n".join(f"| {line} |" for line in lines)


class TensorBoard:
    """Writes event files to the run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """`step`: the run resumes after it; data written for later steps is hidden."""
        from torch.utils.tensorboard.writer import SummaryWriter  # noqa: PLC0415 - slow, and only when on

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self._board.add_text(f"samples/{name}", markdown(rows), step)
        self._board.flush()

    def close(self, *, failed: bool) -> None:
        self._board.close()


class WandB:
    """Logs to a W&B run; W&B must be installed.

    W&B drops data whose `step` is lower than one that it has seen, as after a resume from an earlier checkpoint. So the
    step is a metric here, and the x axis of all others.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        """Raises UserError when W&B cannot be reached or does not know the user."""
        import wandb  # noqa: PLC0415 - optional; the check has verified that it is installed

        self._wandb: Any = wandb
        try:
            self._run: Any = wandb.init(
                project=config.run.wandb_project,
                name=folder.name,
                dir=str(folder),
                id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
                resume="allow",
                config=plain(config),
            )
        except wandb.Error as error:
            raise UserError(f"run.wandb=true: {one_line(error)}") from error
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, STEP: step})

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        data = [[row[column] for column in COLUMNS] for row in rows]
        self._run.log({f"samples/{name}": self._wandb.Table(columns=list(COLUMNS), data=data), STEP: step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def make_trackers(config: Config, folder: Path, step: int) -> list[Tracker]:
    """Return the enabled trackers. `step`: the run resumes after it."""
    trackers: list[Tracker] = []
    if config.run.tensorboard:
        trackers.append(TensorBoard(folder, step))
    if config.run.wandb:
        trackers.append(WandB(config, folder))
    return trackers
