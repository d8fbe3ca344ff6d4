"""The probe of a weight sync: fixed tokens whose logprobs show whether a sampler computes with the learner's weights.

Two engines never agree to the last bit: they add in another order and round in other places. How far that alone can
move the probe depends on the model, its weights and its dtype, so it is measured on the very model at every
sync: the learner computes the probe a second time with the output of each layer rounded at random
(`grpo.learner.probe`). A sampler may differ from the learner by a few times that noise. Differences are judged by a
quantile and the root mean square over tokens; the maximum of a healthy bfloat16 model is a matter of luck.
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
"""How far a sampler may be from the learner, in units of the learner's own rounding noise. The quantile tells a small
change of all tokens from noise, the root mean square finds a large one of few tokens; a single token can multiply the
latter in a healthy model. docs/weight-check.md has what was measured."""

RESOLUTION = 1e-5
"""Differences of this size are always allowed: logprobs are float32 numbers of two digits before the point."""

PERTURBED_GROUPS = {"float32": 1, "bfloat16": 16}
"""The full check perturbs the parameters in at most so many turns, by dtype. In 16 bits the effect of one stale tensor
would drown in the noise if all the others moved the logprobs, too. A group has neighbouring parameters: where one of
each depth is perturbed, all layers amplify the noise, and four of ten single tensors go unseen that are seen so
(docs/weight-check.md)."""

GROUP_SIZE = 16
"""Parameters that a group has at least: fewer may not move the logprobs at all."""

STRENGTHS = (0.1, 0.2, 0.4, 0.8)
"""Perturbations that are tried, relative to each parameter's root mean square; the one that moves the learner by most
times the noise is taken."""

POWER = 5.0
"""The full check proves nothing unless its perturbation moves the learner by this many times the noise."""

PROMPTS, TOKENS = 8, 32
"""The probe has the ends of PROMPTS prompts and half as many rows of mixed tokens, of up to TOKENS tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Fixed tokens whose logprobs are compared at every sync."""

    token_ids: tuple[tuple[int, ...], ...]
    """[N][L_n], L_n >= 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How far two vectors of logprobs are apart, in nats. Infinite where either is not finite."""

    q90: float
    """90 % quantile of the absolute difference."""
    rms: float
    """Root mean square."""

    def allowed(self) -> Spread:
        """Return how far a sampler may be from a learner whose rounding noise this is."""
        return Spread(q90=LIMIT_Q90 * max(self.q90, RESOLUTION), rms=LIMIT_RMS * max(self.rms, RESOLUTION))

    def within(self, limit: Spread) -> bool:
        """Return whether neither figure exceeds that of `limit`; nothing is within a limit that is not finite."""
        return math.isfinite(limit.rms) and self.q90 <= limit.q90 and self.rms <= limit.rms


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The learner's own probe under some weights."""

    logprobs: tuple[NDArray[np.float32], ...]
    """[N][L_n - 1] logprob of each probe token given those before it, temperature 1."""
    noise: Spread
    """Of the same tokens and weights with every layer's output rounded at random."""


def group_members(group: int, groups: int, count: int) -> range:
    """Return which of `count` parameters, in the model's order, are in the `group`-th of `groups` groups."""
    return range(count * group // groups, count * (group + 1) // groups)


def make_probe(prompts: Sequence[Prompt], *, longest: int) -> Probe:
    """Return the probe of a run: the last tokens of some prompts before what all of them end with, and the ids that the
    prompts use in another order, so that positions and tokens are mixed. No row has more than `longest` tokens, or
    TOKENS."""
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
    """Return how far the logprobs `a` and `b` [N][L_n - 1] of the same tokens are apart."""
    x, y = np.concatenate(a).astype(np.float64), np.concatenate(b).astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return Spread(q90=math.inf, rms=math.inf)
    difference = np.abs(x - y)
    return Spread(q90=float(np.quantile(difference, 0.9)), rms=float(np.sqrt(np.mean(difference**2))))
