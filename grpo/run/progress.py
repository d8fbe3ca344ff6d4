"""Progress of a run: the state that the loop carries between steps. With the learner's state it is the whole run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from grpo.config import Config
from grpo.data import Cursor, CursorState, MixedCursor, MixedState, restore_cursor, start_cursor
from grpo.evaluation.statistics import Evaluation, SetEvaluation
from grpo.sync.probe import Spread
from grpo.types import Json, Prompt, UserError


class ProgressState(TypedDict):
    """The progress as plain JSON, with prompts identified by their ids."""

    step: int
    cursor: CursorState | MixedState
    kl_coef: float
    retired: list[str]
    tokens: int
    rollouts: int
    skipped: int
    before: Mapping[str, Mapping[str, Mapping[str, Any]]] | None
    """The fields of an `Evaluation`, down to those of its `SetEvaluation`s."""
    after: Mapping[str, Mapping[str, Mapping[str, Any]]] | None
    evaluated: int | None


@dataclass(slots=True, kw_only=True)
class Progress:
    """State of a run after `step` steps."""

    cursor: Cursor | MixedCursor
    kl_coef: float
    """Coefficient of the next step."""
    step: int = 0
    learned: int = 0
    """Step of the last update that the learner has begun: `step`, or `step` + 1 while that update or its sync runs."""
    retired: set[int] = field(default_factory=set)
    """Indices of prompts that are not drawn again."""
    tokens: int = 0
    rollouts: int = 0
    skipped: int = 0
    """Consecutive steps, up to the last one, with an update that was not finite."""
    noise: Spread = field(default_factory=lambda: Spread(q90=0.0, rms=0.0))
    """The learner's rounding noise on the probe at the last weight sync. It is not in checkpoints; a restart measures
    it again."""
    before: Evaluation | None = None
    """The evaluation before the first step."""
    after: Evaluation | None = None
    """The latest evaluation after a step."""
    evaluated: int | None = None
    """Step after which the latest evaluation was made."""

    @classmethod
    def start(cls, config: Config, prompts: Sequence[Prompt]) -> Progress:
        """Return the progress of a run before its first step."""
        return cls(cursor=start_cursor(prompts, config.data), kl_coef=config.algorithm.kl_coef)

    def accuracies(self) -> dict[str, Json]:
        """Return the accuracies and their intervals for the summary; those of evaluations not yet made are absent, as
        are intervals of a single prompt."""
        out: dict[str, Json] = {}
        for name, evaluation in {"accuracy_before": self.before, "accuracy_after": self.after}.items():
            if evaluation is None:
                continue
            out[name], interval = evaluation.accuracy, evaluation.interval()
            if not math.isnan(interval.low):
                out[f"{name}_interval"] = [interval.low, interval.high]
        if self.after is not None and self.evaluated is not None:
            out["accuracy_after_step"] = self.evaluated
        return out

    def state(self, prompts: Sequence[Prompt]) -> ProgressState:
        """Return the progress for a checkpoint."""
        return {
            "step": self.step,
            "cursor": self.cursor.state(),
            "kl_coef": self.kl_coef,
            "retired": [prompts[i].prompt_id for i in sorted(self.retired)],
            "tokens": self.tokens,
            "rollouts": self.rollouts,
            "skipped": self.skipped,
            "before": None if self.before is None else dataclasses.asdict(self.before),
            "after": None if self.after is None else dataclasses.asdict(self.after),
            "evaluated": self.evaluated,
        }

    @classmethod
    def restore(
        cls, state: ProgressState, prompts: Sequence[Prompt], *, anew: Cursor | MixedCursor | None = None
    ) -> Progress:
        """Return the progress saved in `state`.

        Args:
            anew: cursor to use instead of the saved one, if the data set or its order is allowed to differ.

        Raises UserError when the data set differs and `anew` is None.
        """
        index = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
        gone = [prompt_id for prompt_id in state["retired"] if prompt_id not in index]
        if gone and anew is None:
            raise UserError(f"data.train no longer has {gone[0]}, a prompt that the run had retired")
        before, after = (
            None
            if saved is None
            else Evaluation(
                sets={n: SetEvaluation(**found) for n, found in saved["sets"].items()},
                parts={n: SetEvaluation(**found) for n, found in saved["parts"].items()},
            )
            for saved in (state["before"], state["after"])
        )
        return cls(
            step=state["step"],
            learned=state["step"],
            cursor=anew or restore_cursor(prompts, state["cursor"]),
            kl_coef=state["kl_coef"],
            retired={index[prompt_id] for prompt_id in state["retired"] if prompt_id in index},
            tokens=state["tokens"],
            rollouts=state["rollouts"],
            skipped=state["skipped"],
            before=before,
            after=after,
            evaluated=state["evaluated"],
        )
