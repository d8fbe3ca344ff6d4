"""The choices, which of them go together, and which options reach a term: the tables that recipes are held against."""

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
"""A group without spread gets exactly 0 from these, and is dropped where fewer than two members were scored."""

NEEDS_GROUPS: frozenset[Advantage] = GROUP_RELATIVE | {"reinforce_pp_baseline"}
"""Compare the members of a group, of which there must be two."""

WHITENED: frozenset[Advantage] = frozenset(("reinforce_pp", "reinforce_pp_baseline", "gae"))
"""Whitened over all tokens of the step, on the learner."""

_ANY: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean")

LEGAL_AGGREGATIONS: dict[PolicyLoss, tuple[Aggregation, ...]] = {
    "ppo_clip": _ANY,
    "cispo": _ANY,
    "sapo": _ANY,
    "reinforce": _ANY,
    "gspo": ("sequence_mean",),
    "gmpo": ("sequence_mean",),
}
"""Losses of the whole sequence are the same at each of its tokens: any other weights would count long rows more."""

ILLEGAL_KL: dict[tuple[Estimator, Gradient], str] = {
    ("k1", "autodiff"): "its expected gradient is 0; take algorithm.kl_gradient=k2",
    ("k2", "ratio_weighted"): "it is the gradient of another quantity than the KL; take algorithm.kl_gradient=autodiff",
}

REWARD_KL: tuple[Estimator, ...] = ("k1",)
"""As a reward the KL has no gradient of its own, and only k1's score-function gradient is then the whole of it; of k2
and k3 what is missing nearly cancels what is there."""

LOSSES_THAT_REACH: dict[str, tuple[PolicyLoss, ...]] = {
    "eps_low": ("ppo_clip", "gspo", "cispo", "gmpo"),
    "eps_high": ("ppo_clip", "gspo", "cispo", "gmpo"),
    "dual_clip": ("ppo_clip",),
    "sapo_tau_positive": ("sapo",),
    "sapo_tau_negative": ("sapo",),
}
ADVANTAGES_THAT_REACH: dict[str, tuple[Advantage, ...]] = {
    "std_eps": ("group_normalized", "batch_normalized"),
    "pass_k": ("pass_at_k",),
    "gamma": ("reinforce_pp", "gae"),
    "gae_lambda": ("gae",),
}
"""Options of `algorithm` that only some choices use; elsewhere they may not be set to anything but their default."""
