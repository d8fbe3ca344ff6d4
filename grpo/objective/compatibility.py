"""The algorithm's choices and their legal combinations.

Recipes are validated against these tables.
"""

from __future__ import annotations

from typing import Literal

PolicyLoss = Literal["ppo_clip", "gspo", "cispo", "sapo", "gmpo", "reinforce"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean"]
Estimator = Literal["k1", "k2", "k3"]
Gradient = Literal["autodiff", "k2", "ratio_weighted"]
Advantage = Literal[
    "group_normalized", "group_centered", "leave_one_out", "batch_normalized", "optimal_baseline", "pass_at_k",
    "reinforce_pp", "reinforce_pp_baseline", "gae",
]  # fmt: skip

GROUP_RELATIVE: frozenset[Advantage] = frozenset(
    ("group_normalized", "group_centered", "leave_one_out", "batch_normalized", "optimal_baseline", "pass_at_k")
)
"""These give exactly 0 to a group without spread. A group with fewer than two scored members is dropped."""

NEEDS_GROUPS: frozenset[Advantage] = GROUP_RELATIVE | {"reinforce_pp_baseline"}
"""These compare the members of a group, so a group needs at least two."""

WHITENED: frozenset[Advantage] = frozenset(("reinforce_pp", "reinforce_pp_baseline", "gae"))
"""These are whitened over all tokens of the step, on the learner."""

_ANY: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean")

LEGAL_AGGREGATIONS: dict[PolicyLoss, tuple[Aggregation, ...]] = {
    "ppo_clip": _ANY,
    "cispo": _ANY,
    "sapo": _ANY,
    "reinforce": _ANY,
    "gspo": ("sequence_mean",),
    "gmpo": ("sequence_mean",),
}
"""A sequence-level loss repeats one value at each token of a row. Weights other than `sequence_mean` would count long
rows more."""

ILLEGAL_KL: dict[tuple[Estimator, Gradient], str] = {
    ("k1", "autodiff"): "its expected gradient is 0; use algorithm.kl_gradient=k2",
    ("k2", "ratio_weighted"): "it is not the gradient of the KL; use algorithm.kl_gradient=autodiff",
}

REWARD_KL: tuple[Estimator, ...] = ("k1",)
"""In the reward the estimator itself is not differentiated, so only its score-function gradient remains. For k1 this is
the whole gradient of the KL. For k2 and k3 the missing part nearly cancels the remaining one."""
