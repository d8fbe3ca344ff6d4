"""The probe of a weight sync: fixed tokens whose logprobs show whether a sampler computes with the learner's weights.

Two engines never agree bit for bit: they add in a different order and round in different places. The resulting
difference depends on the model, its weights and its dtype, so it is measured on the current model at every sync: the
learner computes the probe a second time with the output of each layer rounded at random (`grpo.learner.probe`). A
sampler may differ from the learner by a few times that noise. Differences are judged by a quantile and the root mean
square over tokens. The maximum is not used: for a healthy bfloat16 model it varies by chance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grpo.types import Prompt

LIMIT_Q90, LIMIT_RMS = 2.0, 5.0
"""Allowed difference between sampler and learner, in units of the learner's own rounding noise. The quantile detects a
small change of all tokens, the root mean square a large change of a few tokens. In a healthy model a single token can
multiply the root mean square. Measurements: docs/weight-check.md."""

RESOLUTION = 1e-5
"""The noise is assumed to be at least this large: logprobs are float32 numbers with up to two digits before the
decimal point."""

PERTURBED_GROUPS = {"float32": 1, "bfloat16": 16}
"""Maximum number of groups that the full check perturbs in turn, by dtype. In 16 bits the effect of one stale tensor
would be lost in the noise if all other tensors moved the logprobs, too. A group consists of neighbouring parameters.
With groups of one parameter per depth, all layers would amplify the noise, and four of ten single stale tensors that
are now detected would be missed (docs/weight-check.md)."""

GROUP_SIZE = 16
"""Minimum number of parameters in a group: fewer may not move the logprobs at all."""

STRENGTHS = (0.1, 0.2, 0.4, 0.8)
"""Perturbations that are tried, relative to each parameter's root mean square. The one with the largest ratio of the
learner's movement to the noise is used."""

POWER = 5.0
"""The full check requires its perturbation to move the learner by this many times the noise."""

PROMPTS, TOKENS = 8, 32
"""The probe consists of the ends of PROMPTS prompts and half as many rows of mixed tokens, each of up to TOKENS
tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Fixed tokens whose logprobs are compared at every sync."""

    token_ids: tuple[tuple[int, ...], ...]
    """[N][L_n], L_n >= 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Difference between two vectors of logprobs, in nats. Infinite if either is not finite."""

    q90: float
    """90 % quantile of the absolute difference."""
    rms: float
    """Root mean square of the difference."""

    def allowed(self) -> Spread:
        """Return the allowed difference between a sampler and a learner with this rounding noise."""
        return Spread(q90=LIMIT_Q90 * max(self.q90, RESOLUTION), rms=LIMIT_RMS * max(self.rms, RESOLUTION))

    def within(self, limit: Spread) -> bool:
        """Return whether neither figure exceeds its `limit`. Nothing is within a limit that is not finite."""
        return math.isfinite(limit.rms) and self.q90 <= limit.q90 and self.rms <= limit.rms


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The learner's own measurement of the probe under given weights."""

    logprobs: tuple[NDArray[np.float32], ...]
    """[N][L_n - 1] logprob of each probe token given the preceding ones, at temperature 1."""
    noise: Spread
    """Difference to the logprobs of the same tokens and weights with every layer's output rounded at random."""


def group_members(group: int, groups: int, count: int) -> range:
    """Return the indices of the parameters in the `group`-th of `groups` groups. `count`: number of all parameters,
    in the model's order."""
    return range(count * group // groups, count * (group + 1) // groups)


def make_probe(prompts: Sequence[Prompt], *, longest: int) -> Probe:
    """Return the probe of a run.

    It consists of the last tokens of some prompts, without the suffix that all of them share, and of rows with the
    prompts' token ids in another order, which mix positions and tokens. A row has at most `longest` tokens, or TOKENS.
    """
    tokens = min(TOKENS, longest)
    vocabulary = sorted({i for prompt in prompts[:64] for i in prompt.token_ids})
    mixed = [
        tuple(vocabulary[(7 * i * (row + 1) + row) % len(vocabulary)] for i in range(tokens))
        for row in range(PROMPTS // 2)
    ]
    chosen = [prompt.token_ids for prompt in prompts[:PROMPTS] if len(prompt.token_ids) >= 2]
    from_the_end = zip(*(reversed(ids) for ids in chosen), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, from_the_end))
    ends = [ids[: len(ids) - common] if len(ids) >= common + 2 else ids for ids in chosen]
    return Probe(token_ids=tuple([ids[-tokens:] for ids in ends] + mixed))


def spread(a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]]) -> Spread:
    """Return the difference between the logprobs `a` and `b` [N][L_n - 1] of the same tokens."""
    x, y = np.concatenate(a).astype(np.float64), np.concatenate(b).astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return Spread(q90=math.inf, rms=math.inf)
    difference = np.abs(x - y)
    return Spread(q90=float(np.quantile(difference, 0.9)), rms=float(np.sqrt(np.mean(difference**2))))
