"""avg@k on held-out prompts, and the paired interval between two evaluations of the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.metrics import fraction
from grpo.types import Group, Rollout, Scored

BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Accuracy of every prompt, by the first reward of the recipe."""

    per_prompt: Mapping[str, float]
    """prompt_id -> mean over its scored completions."""
    failed: int
    """Completions without a reward; they are in no mean."""
    tokens_mean: float
    truncated_fraction: float
    pass_at_k: float
    """Share of the prompts with at least one right completion (part equal to its highest value, above 0) of k."""

    @property
    def accuracy(self) -> float:
        """avg@k: mean over prompts of the mean over samples."""
        return float(np.mean(list(self.per_prompt.values())))


def evaluate_groups(groups: Sequence[Group], part: str) -> Evaluation:
    """Reduce sampled and scored groups. `part`: the reward that accuracy is read from.

    Raises ValueError when no completion was scored.
    """
    per_prompt = {}
    for group in groups:
        values = [
            r.outcome.parts[part] for r in group.rollouts if isinstance(r.outcome, Scored) and part in r.outcome.parts
        ]
        if values:
            per_prompt[group.prompt.prompt_id] = values
    if not per_prompt:
        raise ValueError("no completion of the evaluation was scored")
    best = max(max(values) for values in per_prompt.values())
    rollouts: list[Rollout] = [rollout for group in groups for rollout in group.rollouts]
    return Evaluation(
        per_prompt={prompt_id: float(np.mean(values)) for prompt_id, values in per_prompt.items()},
        failed=sum(not isinstance(r.outcome, Scored) for r in rollouts),
        tokens_mean=float(np.mean([len(r.completion.token_ids) for r in rollouts])),
        truncated_fraction=fraction(rollouts, lambda r: r.completion.finish_reason == "length"),
        pass_at_k=fraction(list(per_prompt.values()), lambda values: best > 0 and max(values) == best),
    )


def paired_gain(before: Evaluation, after: Evaluation, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean gain over the prompts that both have, with its 95 % bootstrap interval over prompts: (gain, low, high)."""
    shared = [prompt_id for prompt_id in before.per_prompt if prompt_id in after.per_prompt]
    gains = np.asarray([after.per_prompt[p] - before.per_prompt[p] for p in shared])
    rng = np.random.default_rng(seed)
    draws = np.empty(BOOTSTRAP_DRAWS)
    for i in range(BOOTSTRAP_DRAWS):
        draws[i] = gains[rng.integers(len(gains), size=len(gains))].mean()
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)
