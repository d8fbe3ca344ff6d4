"""Conditions that stop a run: sampler and learner disagree, or updates are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from grpo.config import Config
from grpo.sync.probe import Spread
from grpo.types import StepResult

MAX_SKIPPED = 3


class MismatchError(RuntimeError):
    """Sampler and learner disagree about the sampled tokens: the learner would train on data that was not sampled."""


class NonFiniteError(RuntimeError):
    """Loss or gradient was NaN or infinite in `MAX_SKIPPED` consecutive steps."""


def guard_mismatch(result: StepResult, config: Config, noise: Spread) -> None:
    """Raise MismatchError when sampler and learner disagree by more than rounding explains. The weights are then not
    published.

    The limit is algorithm.max_mismatch. By default it is the limit from the `noise` of the last weight sync, divided by
    a temperature below 1, which enlarges the mismatch.
    """
    bar = config.algorithm.max_mismatch
    if bar is None:
        bar = noise.allowed().rms / min(1.0, config.sampling.temperature)
    rms = math.sqrt(result.mismatch_square.value or 0.0)
    if not rms <= bar:
        raise MismatchError(
            f"the logprobs of the sampled tokens differ by {rms:.3g} between sampler and learner (root mean square; "
            f"allowed {bar:.3g}): weights, tokens or sampling settings differ between the two. algorithm.max_mismatch "
            "sets the limit, by default five times the learner's rounding noise (docs/weight-check.md)"
        )


def count_skipped(result: StepResult, step: int, before: int, *, run: Path, say: Callable[[str], None]) -> int:
    """Return the number of consecutive steps, including this one, with an update that was skipped because loss or
    gradient was not finite. `run`: the folder of the run; `say` is called with a line about them.

    Raises NonFiniteError when the number reaches MAX_SKIPPED.
    """
    updates = result.skipped_updates
    if not updates:
        return 0
    said = (
        f"step {step}: the loss or gradient of {updates} updates was not finite; the updates were skipped, and their "
        f"inputs are in {run / 'nonfinite'} (see grpo replay)"
    )
    if before + 1 >= MAX_SKIPPED:
        raise NonFiniteError(f"{said}; this happened in {MAX_SKIPPED} steps in a row")
    say(said)
    return before + 1
