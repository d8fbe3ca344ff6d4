"""Hold the project's objective against reference numbers: python tests/golden/check.py FILE

FILE is a list of cases as ../shared/golden/README.md describes them: inputs, advantages, losses with gradients and KL
estimators, all float64 and 0 off the mask. Every number but `metrics` is computed through the public functions of
`grpo.objective`. The exit code is 1 when one differs by more than 1e-9, with a line for each, and 2 when the file is
damaged or holds something that is not known here: a key that is passed over is a number that is not checked.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.objective import advantages as family
from grpo.objective.advantages import at_last_token, generalized_advantages, rewards_to_go, whiten
from grpo.objective.kl import k1, k2, k3
from grpo.objective.losses import (
    Rows,
    aggregation_weights,
    bounded_weight,
    importance_weight,
    kept_sequences,
    policy_term,
)

TOLERANCE = 1e-9
WHITEN_EPS = 1e-8
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant_length",
    "prompt-mean": "prompt_mean",
}
LOSSES = {"ppo_clip": "ppo_clip", "gspo": "gspo", "cispo": "cispo", "sapo": "sapo", "gmpo": "gmpo",
          "reinforce": "reinforce"}  # fmt: skip


ADVANTAGES: dict[str, tuple[set[str], set[str]]] = {
    "group_norm": ({"divide_by_std"}, {"std", "std_eps"}),
    "rloo": (set(), set()),
    "leave_one_out": (set(), set()),
    "opo": (set(), {"baseline"}),
    "batch_norm": ({"std_eps"}, set()),
    "batch_std": ({"std_eps"}, set()),
    "pass_at_k": ({"k"}, set()),
    "pass_k": ({"k"}, set()),
    "reinforce_pp": ({"gamma"}, {"whiten"}),
    "reinforce_pp_baseline": (set(), {"whiten"}),
    "gae": ({"gamma", "lam", "value_inputs"}, {"whiten", "returns", "truncated_bootstrap"}),
}
"""Advantage -> parameters that it must have, and may have."""
CLIP = {"clip_eps_low", "clip_eps_high"}
PARAMETERS: dict[str, tuple[set[str], set[str]]] = {
    "ppo_clip": (CLIP, {"dual_clip_c"}), "gspo": (CLIP, set()), "cispo": (CLIP, set()), "gmpo": (CLIP, {"clip_on"}),
    "sapo": ({"tau_pos", "tau_neg"}, set()), "reinforce": (set(), set()),
}  # fmt: skip
"""Loss -> the same."""
WHITENING = "over all completion tokens of the batch, unbiased variance, eps 1e-8 inside the square root"


class UnknownEntryError(Exception):
    """The file has an entry that this script has no function for, or lacks one that it needs."""


def keys(what: str, entry: Any, required: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Raises UnknownEntryError unless `entry` is a mapping with exactly these keys."""
    if not isinstance(entry, dict):
        raise UnknownEntryError(f"{what} must be a mapping, not {entry!r:.40}")
    for key in entry:
        if key not in required | optional:
            near = difflib.get_close_matches(str(key), required | optional, n=1)
            raise UnknownEntryError(f"{what} has {key}" + (f"; did you mean {near[0]}?" if near else ""))
    if required - entry.keys():
        raise UnknownEntryError(f"{what} lacks {', '.join(sorted(required - entry.keys()))}")


def hold_against_format(case: Any) -> None:
    """Raises UnknownEntryError at the first key of a case that would be passed over, or is missing."""
    keys("the case", case, {"inputs"}, {"seed", "advantages", "losses", "kl"})
    keys("inputs", case["inputs"], {"lens", "mask", "rollout", "old", "new", "ref", "rewards", "adv", "group"})
    for entry in case.get("advantages", []):
        keys("an advantage", entry, {"name", "params", "values"})
        if entry["name"] not in ADVANTAGES:
            raise UnknownEntryError(f"advantage {entry['name']}")
        keys(f"params of {entry['name']}", entry["params"], *ADVANTAGES[entry["name"]])
        if entry["params"].get("whiten", WHITENING) != WHITENING:
            raise UnknownEntryError(f"{entry['name']} whitened {entry['params']['whiten']!r}")
    for entry in case.get("losses", []):
        if not isinstance(entry, dict) or entry.get("objective") not in PARAMETERS:
            raise UnknownEntryError(f"loss {entry!r:.60}")
        required, optional = PARAMETERS[entry["objective"]]
        scaled = {"scale"} if entry.get("aggregation") == "seq-mean-token-sum-norm" else set()
        always = {"objective", "aggregation", "loss", "grad_new_logprobs", "new_logprobs"}
        keys(
            f"loss {entry['objective']}", entry, always | required | scaled,
            optional | {"metrics", "importance_correction"},
        )  # fmt: skip
        if "importance_correction" in entry:
            settings = entry["importance_correction"]
            keys("importance_correction", settings, {"level", "mode"}, {"cap", "high", "low", "floor"})
    for name, entry in case.get("kl", {}).items():
        keys(f"kl {name}", entry, {"per_token", "token_mean", "grad"})


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def in_groups(values: Sequence[float], groups: Sequence[int]) -> tuple[list[list[float]], list[list[int]]]:
    """Values by group, and the rows that they came from."""
    rows: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        rows[group].append(i)
    return [[values[i] for i in members] for members in rows.values()], list(rows.values())


def per_row(values: Sequence[Sequence[float]], rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Values by group -> [B]."""
    flat = {
        i: value for group, members in zip(values, rows, strict=True) for i, value in zip(members, group, strict=True)
    }
    return tensor([flat[i] for i in range(len(flat))])


def by_token(mask: torch.Tensor) -> Rows:
    """Rows of the tokens on a [B,T] mask."""
    return Rows(mask.nonzero()[:, 0], len(mask))


def padded(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N] values of the tokens on a mask -> [B,T], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)


def same(values: Sequence[float]) -> list[float]:
    """What a single rank adds up."""
    return list(values)


def advantages_of(entry: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """[B], or [B,T] of a token-level method; for GAE the returns with it."""
    name, params = entry["name"], entry["params"]
    rewards, rows = in_groups(inputs["rewards"], inputs["group"])
    mask = torch.tensor(inputs["mask"]).bool()
    if name == "group_norm":
        if not params["divide_by_std"]:
            return per_row(family.group_centered(rewards), rows)
        if params.get("std", "unbiased") != "unbiased":
            raise UnknownEntryError(f"group_norm with std {params['std']}")
        return per_row(family.group_normalized(rewards, std_eps=params["std_eps"]), rows)
    if name in ("rloo", "leave_one_out"):
        return per_row(family.leave_one_out(rewards), rows)
    if name == "opo":
        lengths, _ = in_groups(inputs["lens"], inputs["group"])
        return per_row(family.optimal_baseline(rewards, [[int(n) for n in group] for group in lengths]), rows)
    if name in ("batch_norm", "batch_std"):
        return per_row(family.batch_normalized(rewards, std_eps=params["std_eps"]), rows)
    if name in ("pass_at_k", "pass_k"):
        return per_row(family.pass_at_k(rewards, k=params["k"]), rows)
    tokens, returns = by_token(mask), None
    last = at_last_token(tensor(inputs["rewards"]), tokens)
    if name == "reinforce_pp":
        raw = rewards_to_go(last, tokens, gamma=params["gamma"])
    elif name == "reinforce_pp_baseline":
        raw = per_row(family.group_centered(rewards), rows)[tokens.ids]
    elif name == "gae":
        final = torch.full((len(mask),), float(params.get("truncated_bootstrap", 0.0)), dtype=torch.float64)
        raw, returns = generalized_advantages(
            last, tensor(params["value_inputs"])[mask], tokens, gamma=params["gamma"], lam=params["lam"],
            final_values=final,
        )  # fmt: skip
    else:
        raise UnknownEntryError(f"advantage {name}")
    [values] = whiten([raw], eps=WHITEN_EPS, all_sum=same) if "whiten" in params else [raw]
    return padded(values, mask) if returns is None else (padded(values, mask), padded(returns, mask))


def loss_of(entry: dict[str, Any], inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and its gradient to the new logprobs."""
    mask = torch.tensor(inputs["mask"]).bool()
    given = entry.get("new_logprobs", "inputs.new")
    new = tensor(inputs["new"] if given == "inputs.new" else given).requires_grad_()
    rows = by_token(mask)
    old, sampler = (tensor(inputs[name])[mask] for name in ("old", "rollout"))
    advantages = tensor(inputs["adv"])[rows.ids]
    if entry["objective"] not in LOSSES or entry["aggregation"] not in AGGREGATIONS:
        raise UnknownEntryError(f"loss {entry['objective']} with {entry['aggregation']}")
    if entry["objective"] == "gmpo" and entry.get("clip_on", "log_ratio") != "log_ratio":
        raise UnknownEntryError(f"gmpo with clip_on {entry['clip_on']}")
    term = policy_term(
        LOSSES[entry["objective"]], logprobs=new[mask], old_logprobs=old, advantages=advantages,
        rows=rows, eps_low=entry.get("clip_eps_low", 0.2), eps_high=entry.get("clip_eps_high", 0.2),
        dual_clip=entry.get("dual_clip_c"), tau_positive=entry.get("tau_pos", 1.0),
        tau_negative=entry.get("tau_neg", 1.05),
    )  # fmt: skip
    lengths = [int(n) for n in mask.sum(1)]
    weights = aggregation_weights(
        lengths, inputs["group"], aggregation=AGGREGATIONS[entry["aggregation"]],
        constant_length=entry.get("scale", 1.0) / len(lengths),
    )  # fmt: skip
    token_weights = tensor(weights)[rows.ids]
    loss = (token_weights * term.loss * correction(entry, old, sampler, rows)).sum()
    [gradient] = torch.autograd.grad(loss, new)
    return loss.detach(), gradient


def correction(entry: dict[str, Any], old: torch.Tensor, sampler: torch.Tensor, rows: Rows) -> torch.Tensor | float:
    """What multiplies the policy term for sampler/learner mismatch."""
    if "importance_correction" not in entry:
        return 1.0
    settings = entry["importance_correction"]
    level, mode = settings["level"], settings["mode"]
    low, high = settings.get("low", settings.get("floor", 0.0)), settings.get("cap", settings.get("high"))
    if level == "geometric":
        return kept_sequences(old, sampler, rows, low=low, high=high)[rows.ids].double()
    if level not in ("token", "sequence") or mode not in ("truncate", "mask") or high is None:
        raise UnknownEntryError(f"importance_correction {settings}")
    return bounded_weight(importance_weight(old, sampler, rows, level=level), mode=mode, low=low, high=high)


def kl_of(name: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, token mean, and the mean's autodiff gradient."""
    mask = torch.tensor(inputs["mask"]).bool()
    new = tensor(inputs["new"]).requires_grad_()
    estimators = {"k1": k1, "abs": lambda a, b: k1(a, b).abs(), "k2": k2, "k3": k3}
    if name not in estimators:
        raise UnknownEntryError(f"kl {name}")
    values = torch.where(mask, estimators[name](new, tensor(inputs["ref"])), 0.0)
    mean = values.sum() / mask.sum()
    [gradient] = torch.autograd.grad(mean, new)
    return values.detach(), mean.detach(), gradient


def differences(case: dict[str, Any]) -> list[tuple[str, float]]:
    """(what, largest absolute difference) of every number of a case."""
    hold_against_format(case)
    inputs = case["inputs"]
    out = []

    def compare(what: str, ours: torch.Tensor, theirs: Any) -> None:
        expected = tensor(theirs)
        if ours.shape != expected.shape:
            raise UnknownEntryError(f"{what} has shape {list(expected.shape)}, expected {list(ours.shape)}")
        worst = float((ours - expected).abs().max()) if ours.numel() else 0.0
        out.append((what, worst if worst == worst else float("inf")))

    for entry in case.get("advantages", []):
        ours = advantages_of(entry, inputs)
        if isinstance(ours, tuple):
            ours, returns = ours
            if "returns" in entry["params"]:
                compare(f"advantage {entry['name']} returns", returns, entry["params"]["returns"])
        compare(f"advantage {entry['name']}", ours, entry["values"])
    for entry in case.get("losses", []):
        what = f"loss {entry['objective']} {entry['aggregation']}"
        loss, gradient = loss_of(entry, inputs)
        compare(what, loss, entry["loss"])
        compare(f"{what} gradient", gradient, entry["grad_new_logprobs"])
    for name, entry in case.get("kl", {}).items():
        values, mean, gradient = kl_of(name, inputs)
        compare(f"kl {name}", values, entry["per_token"])
        compare(f"kl {name} mean", mean, entry["token_mean"])
        compare(f"kl {name} gradient", gradient, entry["grad"])
    return out


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("usage: python tests/golden/check.py FILE", file=sys.stderr)
        return 2
    count = wrong = 0
    worst = 0.0
    try:
        cases = json.loads(Path(arguments[0]).read_text())
    except ValueError as error:
        print(f"{arguments[0]} is not JSON: {error}", file=sys.stderr)
        return 2
    if not isinstance(cases, list) or not cases:
        print(f"{arguments[0]} must be a list of cases, not {cases!r:.40}", file=sys.stderr)
        return 2
    for number, case in enumerate(cases):
        try:
            found = differences(case)
        except UnknownEntryError as error:
            print(f"{arguments[0]}: case {number}: not known here: {error}", file=sys.stderr)
            return 2
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            said = " ".join(str(error).split())
            print(f"{arguments[0]}: case {number} cannot be evaluated: {type(error).__name__}: {said}", file=sys.stderr)
            return 2
        if not found:
            print(f"{arguments[0]}: case {number} has no number to compare", file=sys.stderr)
            return 2
        for what, difference in found:
            count, worst = count + 1, max(worst, difference)
            if not difference <= TOLERANCE:
                wrong += 1
                print(f"case {number}: {what} differs by {difference:.3g}")
    print(f"{count} comparisons, {wrong} above {TOLERANCE:g}; largest difference {worst:.3g}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
