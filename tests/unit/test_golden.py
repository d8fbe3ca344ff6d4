"""Reference numbers that this project did not make, read from ../shared/golden where a checkout has them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.advantages import group_normalized
from grpo.kl import k3
from grpo.loss import aggregation_weights, grpo_token_loss

FILE = Path(__file__).resolve().parents[3] / "shared" / "golden" / "objectives.json"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE.name} is kept outside the project and is not here")


def cases() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text()) if FILE.exists() else []


def test_group_normalized_advantages() -> None:
    seen = 0
    for case in cases():
        inputs = case["inputs"]
        members = defaultdict(list)
        for i, group in enumerate(inputs["group"]):
            members[group].append(i)
        for entry in case["advantages"]:
            if entry["name"] != "group_norm" or not entry["params"].get("divide_by_std"):
                continue
            rewards = [[inputs["rewards"][i] for i in rows] for rows in members.values()]
            ours = group_normalized(rewards, std_eps=entry["params"]["std_eps"])
            for rows, values in zip(members.values(), ours, strict=True):
                for i, value in zip(rows, values, strict=True):
                    assert value == pytest.approx(entry["values"][i], abs=1e-9)
            seen += 1
    assert seen > 0


def test_clipped_loss_and_gradient() -> None:
    names = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean"}
    seen = 0
    for case in cases():
        inputs = case["inputs"]
        tensor = {k: torch.tensor(inputs[k], dtype=torch.float64) for k in ("rollout", "old", "new", "ref", "adv")}
        mask = torch.tensor(inputs["mask"]).bool()
        for entry in case["losses"]:
            if entry["objective"] != "ppo_clip" or entry["aggregation"] not in names or "dual_clip_c" in entry:
                continue
            given = entry["new_logprobs"]
            cap = entry.get("importance_correction", {}).get("cap", 0.0)
            new = tensor["new"] if given == "inputs.new" else torch.tensor(given, dtype=torch.float64)
            new = new.clone().requires_grad_()
            lengths = mask.sum(1).tolist()
            weights = aggregation_weights(
                lengths, aggregation=names[entry["aggregation"]], denominator_tokens=sum(lengths),
                denominator_rows=len(lengths),
            )  # fmt: skip
            result = grpo_token_loss(
                logprobs=new, old_logprobs=tensor["old"], sampler_logprobs=tensor["rollout"],
                advantages=tensor["adv"][:, None].expand_as(new), completion_mask=mask, ref_logprobs=None,
                eps_low=entry["clip_eps_low"], eps_high=entry["clip_eps_high"], kl_coef=0.0,
                importance_weight_cap=cap,
            )  # fmt: skip
            loss = (torch.tensor(weights, dtype=torch.float64)[:, None] * mask * result.total).sum()
            loss.backward()
            assert loss.item() == pytest.approx(entry["loss"], abs=1e-9)
            expected = torch.tensor(entry["grad_new_logprobs"], dtype=torch.float64)
            torch.testing.assert_close(new.grad, expected, atol=1e-9, rtol=0)
            seen += 1
    assert seen > 0


def test_k3_and_its_autodiff_gradient() -> None:
    for case in cases():
        inputs = case["inputs"]
        new = torch.tensor(inputs["new"], dtype=torch.float64, requires_grad=True)
        mask = torch.tensor(inputs["mask"]).bool()
        entry = case["kl"]["k3"]
        values = k3(new, torch.tensor(inputs["ref"], dtype=torch.float64))
        expected = torch.tensor(entry["per_token"], dtype=torch.float64)
        torch.testing.assert_close(values[mask], expected[mask], atol=1e-9, rtol=0)
        mean = values[mask].mean()
        assert mean.item() == pytest.approx(entry["token_mean"], abs=1e-9)
        mean.backward()
        torch.testing.assert_close(new.grad, torch.tensor(entry["grad"], dtype=torch.float64), atol=1e-9, rtol=0)
