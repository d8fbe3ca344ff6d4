"""The probe of a weight sync: its tokens, how differences are measured, random rounding and perturbed parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grpo.learner.probe import (
    GENTLE,
    TF32_ROUNDOFF,
    UNIT_ROUNDOFF,
    ZERO_SCALE,
    Perturbation,
    rounded_at_random,
)
from grpo.sync.probe import TOKENS, Spread, group_members, make_probe, spread
from grpo.types import Prompt


def prompt(*token_ids: int) -> Prompt:
    return Prompt(prompt_id="d:0:x", token_ids=token_ids, text="", row={}, messages=None, dataset="d", where="d[0]")


def test_a_probe_is_the_ends_of_prompts_and_mixed_tokens() -> None:
    """Prompts that begin alike differ in the probe; every id is one of theirs."""
    prompts = [prompt(*range(40), 50 + i, 90, 91, 92) for i in range(20)]
    rows = make_probe(prompts, longest=100).token_ids
    assert rows[:8] == tuple((*range(9, 40), 50 + i) for i in range(8))  # not the end that all have
    assert len(rows) == 12
    assert all(len(row) == TOKENS for row in rows)
    assert {i for row in rows for i in row} <= {*range(40), *range(50, 70), 90, 91, 92}
    assert [len(row) for row in make_probe(prompts, longest=5).token_ids] == 12 * [5]
    same = make_probe([prompt(1, 2, 3, 4)] * 3, longest=5).token_ids
    assert same[:3] == 3 * ((1, 2, 3, 4),)
    inside = make_probe([prompt(7, 5, 5), prompt(5, 5)], longest=5).token_ids  # one ends with all of the other
    assert inside[:2] == ((7, 5, 5), (5, 5))  # too short without it
    assert len(make_probe([prompt(1), prompt(2)], longest=5).token_ids) == 4  # a token alone has no logprob


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (1, 7), (3, 7), (16, 272), (16, 17), (5, 5)])
def test_groups_are_neighbours_and_hold_each_parameter_once(groups: int, count: int) -> None:
    members = [list(group_members(group, groups, count)) for group in range(groups)]
    assert [i for group in members for i in group] == list(range(count))
    assert max(map(len, members)) - min(map(len, members)) <= 1
    assert list(group_members(1, 3, 7)) == [2, 3]


def test_spread_by_hand() -> None:
    """Differences 0.3, 0.4 and eight of 0: squares 0.25 of 10; the 90 % quantile lies 0.1 of the way to 0.4."""
    a = (np.zeros(5, dtype=np.float32), np.zeros(5, dtype=np.float32))
    b = (np.asarray([0.3, 0, 0, 0, 0], dtype=np.float32), np.asarray([0, 0, 0, 0, -0.4], dtype=np.float32))
    found = spread(a, b)
    assert found.rms == pytest.approx(math.sqrt(0.025), rel=1e-6)
    assert found.q90 == pytest.approx(0.3 + 0.1 * 0.1, rel=1e-6)
    for value in (np.nan, np.inf, -np.inf):
        broken = (np.asarray([value, 0, 0, 0, 0], dtype=np.float32), b[1])
        assert spread(a, broken) == Spread(rms=math.inf, q90=math.inf)
        assert spread(broken, broken) == Spread(rms=math.inf, q90=math.inf)


def test_both_figures_must_be_within() -> None:
    limit = Spread(rms=0.1, q90=0.2).allowed()
    assert Spread(rms=0.5, q90=0.4).within(limit)
    assert not Spread(rms=0.51, q90=0.1).within(limit)
    assert not Spread(rms=0.1, q90=0.41).within(limit)
    assert not Spread(rms=math.inf, q90=math.inf).within(limit)
    assert not Spread(rms=math.inf, q90=math.inf).within(Spread(rms=math.inf, q90=math.inf).allowed())
    assert not Spread(rms=0.0, q90=0.0).within(Spread(rms=math.inf, q90=math.inf).allowed())  # noise that overflowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_rounding_changes_layers_by_their_unit_roundoff(dtype: torch.dtype) -> None:
    """The first layer copies its input: what comes out has changed by at most u, and by half of it on average."""
    layer, last = torch.nn.Linear(4096, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(last.weight)
    model = torch.nn.Sequential(torch.nn.Identity(), last).to(dtype)
    tokens = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(1)).to(dtype) + 1
    with rounded_at_random(model, without=last), torch.no_grad():
        relative = (model(tokens).double() / tokens.double() - 1).abs()
    u = UNIT_ROUNDOFF[dtype]
    assert float(relative.max()) <= u * 2.1  # its own rounding is added
    assert 0.3 * u < float(relative.mean()) < 0.7 * u
    with torch.no_grad():
        assert torch.equal(model(tokens), tokens)  # nothing is left behind
    with rounded_at_random(layer, without=layer), torch.no_grad():
        given = torch.rand(3, 4096, generator=torch.Generator().manual_seed(2))
        assert torch.equal(layer(given), torch.nn.functional.linear(given, layer.weight))


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, TF32_ROUNDOFF), (torch.bfloat16, 2.0**-8)])
def test_float32_on_a_gpu_rounds_as_tf32(dtype: torch.dtype, unit: float) -> None:
    """TF32 keeps 10 bits of the significand: half a unit in the last place is 2^-11. A tolerance for float32's 23 bits
    would refuse a healthy sampler, whose attention multiplies in TF32."""

    class Layer(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given.as_subclass(OnGpu)

    layer = Layer()
    ones = torch.ones(20_000, dtype=dtype)
    with rounded_at_random(torch.nn.Sequential(layer), without=torch.nn.Identity()):
        moved = (layer(ones).as_subclass(torch.Tensor).double() - 1).abs()
    assert TF32_ROUNDOFF == 2.0**-11
    assert 0.9 * unit < float(moved.max()) <= unit


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 4), (4, 4), (4,), (6, 4), (4,))
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    torch.nn.init.zeros_(made[4])
    return made


def test_perturbations_by_hand_and_undone() -> None:
    """Each element of the chosen moves by the strength times the root mean square of its parameter, some up and some
    down; a second strength replaces the first; afterwards every bit is as before."""
    found = parameters()
    before = [p.detach().clone() for p in found]
    perturbation = Perturbation(found, chosen=(0, 3, 4), vocabulary=50, rank=0)
    for strength in (0.5, 0.1):
        perturbation.apply(strength)
        moved = [p.detach() - b for p, b in zip(found, before, strict=True)]
        expected = (GENTLE * before[0].square().mean().sqrt(), before[3].square().mean().sqrt(), GENTLE * ZERO_SCALE)
        for i, size in zip((0, 3, 4), expected, strict=True):
            assert torch.allclose(moved[i].abs(), torch.full_like(moved[i], strength * float(size)), rtol=1e-4)
        assert moved[3].min() < 0 < moved[3].max()
        assert not moved[1].any()
        assert not moved[2].any()
    perturbation.undo()
    assert all(torch.equal(p.detach(), b) for p, b in zip(found, before, strict=True))


def test_a_perturbation_follows_parameters_to_new_storage() -> None:
    """An offload in between gives parameters new storage: it is there that they are restored."""
    found = parameters()
    before = [p.detach().clone() for p in found]
    perturbation = Perturbation(found, chosen=range(5), vocabulary=50, rank=0)
    perturbation.apply(0.3)
    for p in found:
        p.data = p.data.clone()
    perturbation.undo()
    assert all(torch.equal(p.detach(), b) for p, b in zip(found, before, strict=True))


def test_padding_of_a_shard_is_not_measured() -> None:
    """Ten elements on ranks of four: the last rank's shard has two of them, and memory that held NaN."""

    class Sharded:
        shape, ds_shape, ds_numel = torch.Size([0]), torch.Size([2, 5]), 10

        def __init__(self, *values: float) -> None:
            self.ds_tensor = torch.tensor(values)

    shard = Sharded(3.0, -3.0, float("nan"), float("nan"))
    Perturbation([shard], chosen=(0,), vocabulary=50, rank=2).apply(0.1)
    assert torch.allclose(
        shard.ds_tensor[:2].abs() - 3.0, torch.full((2,), 0.3).copysign(shard.ds_tensor[:2].abs() - 3.0)
    )
    whole = Sharded(1.0, 1.0, 7.0, 7.0)
    Perturbation([whole], chosen=(0,), vocabulary=50, rank=1).apply(0.1)
    assert torch.allclose((whole.ds_tensor - torch.tensor([1.0, 1.0, 7.0, 7.0])).abs(), torch.full((4,), 0.5))


def test_ranks_with_other_shards_perturb_otherwise() -> None:
    ours, theirs = parameters(), parameters()
    Perturbation(ours, chosen=(1,), vocabulary=50, rank=0).apply(0.1)
    Perturbation(theirs, chosen=(1,), vocabulary=50, rank=1).apply(0.1)
    assert not torch.equal(ours[1], theirs[1])
