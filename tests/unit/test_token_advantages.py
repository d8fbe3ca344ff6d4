"""Returns, GAE, the last token and whitening against naive loops, with holes in the mask and over ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import at_last_token, generalized_advantages, rewards_to_go, whiten

MASK = torch.tensor(
    [
        [False, True, True, False, True, True],  # a hole
        [True, True, True, True, True, True],
        [False, False, False, False, False, False],  # an empty row
        [False, False, True, False, False, False],
        [True, False, False, True, False, False],  # two holes, then padding
    ]
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(seed: int) -> torch.Tensor:
    return torch.where(MASK, draw(seed, *MASK.shape), 0.0)


def positions(row: int) -> list[int]:
    return [t for t in range(MASK.shape[1]) if MASK[row, t]]


def naive_returns(rewards: torch.Tensor, gamma: float) -> list[list[float]]:
    out = [[0.0] * MASK.shape[1] for _ in range(len(MASK))]
    for b in range(len(MASK)):
        taken = positions(b)
        for i, t in enumerate(taken):
            out[b][t] = math.fsum(gamma ** (j - i) * float(rewards[b, taken[j]]) for j in range(i, len(taken)))
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_rewards_to_go_equal_a_double_loop(gamma: float) -> None:
    rewards = masked(0)
    expected = torch.tensor(naive_returns(rewards, gamma), dtype=torch.float64)
    torch.testing.assert_close(rewards_to_go(rewards, MASK, gamma=gamma), expected, rtol=0, atol=1e-12)


def test_rewards_to_go_by_hand() -> None:
    mask = torch.tensor([[True, False, True, True, False]])
    rewards = torch.tensor([[1.0, 0.0, 2.0, 4.0, 0.0]])
    # the hole is stepped over: 4, then 2 + 4 / 2, then 1 + 4 / 2
    assert rewards_to_go(rewards, mask, gamma=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 200])
def test_rewards_to_go_of_a_long_row_equal_the_recurrence(length: int) -> None:
    rewards, expected, carried = draw(13, length), [0.0] * length, 0.0
    for t in reversed(range(length)):
        carried = float(rewards[t]) + 0.99 * carried
        expected[t] = carried
    result = rewards_to_go(rewards[None], torch.ones(1, length, dtype=torch.bool), gamma=0.99)
    assert result[0].tolist() == pytest.approx(expected, abs=1e-12)


def naive_gae(
    rewards: torch.Tensor, values: torch.Tensor, final: torch.Tensor, gamma: float, lam: float
) -> list[list[float]]:
    """sum of (gamma lam)^l delta, with the deltas of the row's masked tokens alone."""
    out = [[0.0] * MASK.shape[1] for _ in range(len(MASK))]
    for b in range(len(MASK)):
        taken = positions(b)
        v = [float(values[b, t]) for t in taken] + [float(final[b])]
        deltas = [float(rewards[b, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(taken)]
        for i, t in enumerate(taken):
            out[b][t] = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(taken)))
    return out


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.0, 0.5)])
def test_gae_equals_a_double_loop(gamma: float, lam: float, bootstrap: bool) -> None:
    rewards, values = masked(1), masked(2)
    final = draw(3, len(MASK)) if bootstrap else torch.zeros(len(MASK), dtype=torch.float64)
    advantages, returns = generalized_advantages(rewards, values, MASK, gamma=gamma, lam=lam, final_values=final)
    expected = torch.tensor(naive_gae(rewards, values, final, gamma, lam), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, torch.where(MASK, expected + values, 0.0), rtol=0, atol=1e-12)


def test_gae_by_hand() -> None:
    mask = torch.tensor([[True, False, True]])
    rewards = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    values = torch.tensor([[3.0, 0.0, 5.0]], dtype=torch.float64)
    final = torch.tensor([8.0], dtype=torch.float64)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5, final_values=final)
    # last: 2 + 0.5 * 8 - 5 = 1; first: 1 + 0.5 * 5 - 3 + 0.25 * 1 = 0.75
    assert advantages.tolist() == [[0.75, 0.0, 1.0]]
    assert returns.tolist() == [[3.75, 0.0, 6.0]]


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    rewards, values = masked(4), masked(5)
    zero = torch.zeros(len(MASK), dtype=torch.float64)
    _, returns = generalized_advantages(rewards, values, MASK, gamma=0.9, lam=1.0, final_values=zero)
    expected = torch.tensor(naive_returns(rewards, 0.9), dtype=torch.float64)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-12)


def test_what_stands_off_the_mask_is_not_read() -> None:
    poison = torch.where(MASK, 0.0, float("nan"))
    rewards, values, final = masked(6), masked(7), draw(8, len(MASK))
    assert torch.equal(rewards_to_go(rewards + poison, MASK, gamma=0.9), rewards_to_go(rewards, MASK, gamma=0.9))
    settings_ = {"gamma": 0.9, "lam": 0.8, "final_values": final}
    clean = generalized_advantages(rewards, values, MASK, **settings_)
    dirty = generalized_advantages(rewards + poison, values + poison, MASK, **settings_)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    for ours, theirs in zip(
        whiten([rewards + poison], [MASK], eps=1e-8, all_sum=list),
        whiten([rewards], [MASK], eps=1e-8, all_sum=list),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_at_last_token_is_the_last_on_the_mask() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    expected = torch.zeros(5, 6)
    expected[0, 5], expected[1, 5], expected[3, 2], expected[4, 3] = 1.0, 2.0, 4.0, 5.0
    assert torch.equal(at_last_token(values, MASK), expected)


def alone(numbers: Sequence[float]) -> list[float]:
    return list(numbers)


def naive_whiten(parts: list[torch.Tensor], masks: list[torch.Tensor], eps: float) -> list[torch.Tensor]:
    taken = [float(x) for part, mask in zip(parts, masks, strict=True) for x in part[mask]]
    mean = math.fsum(taken) / len(taken)
    variance = math.fsum((x - mean) ** 2 for x in taken) / (len(taken) - 1)
    out = []
    for part, mask in zip(parts, masks, strict=True):
        whole = torch.zeros_like(part)
        for b in range(part.shape[0]):
            for t in range(part.shape[1]):
                if mask[b, t]:
                    whole[b, t] = (float(part[b, t]) - mean) / math.sqrt(variance + eps)
        out.append(whole)
    return out


def test_whiten_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    values = torch.tensor([[1.0, 2.0], [6.0, 0.0]], dtype=torch.float64)
    # mean 3, unbiased variance (4 + 1 + 9) / 2 = 7; with eps 2 the scale is 3
    [result] = whiten([values], [mask], eps=2.0, all_sum=alone)
    expected = torch.tensor([[-2 / 3, -1 / 3], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_whiten_equals_a_naive_loop() -> None:
    [result] = whiten([masked(9)], [MASK], eps=1e-3, all_sum=alone)
    torch.testing.assert_close(result, naive_whiten([masked(9)], [MASK], 1e-3)[0], rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_whitening_by_microbatches_equals_the_whole(cut: int, seed: int) -> None:
    values = 5 + masked(seed)
    parts, masks = [values[:cut], values[cut:]], [MASK[:cut], MASK[cut:]]
    result = whiten(parts, masks, eps=1e-8, all_sum=alone)
    torch.testing.assert_close(torch.cat(result), naive_whiten([values], [MASK], 1e-8)[0], rtol=0, atol=1e-10)


def on_two_ranks(work: Callable[[int, Callable[[Sequence[float]], list[float]]], list[torch.Tensor]]) -> torch.Tensor:
    """Both ranks at once, as threads; `all_sum` waits for the other and adds."""
    barrier = threading.Barrier(2, timeout=20)
    sent: dict[int, list[float]] = {}
    results: dict[int, list[torch.Tensor]] = {}

    def rank(r: int) -> None:
        def all_sum(numbers: Sequence[float]) -> list[float]:
            sent[r] = list(numbers)
            barrier.wait()
            total = [a + b for a, b in zip(sent[0], sent[1], strict=True)]
            barrier.wait()
            return total

        results[r] = work(r, all_sum)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([*results[0], *results[1]])


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_whitening_over_two_ranks_equals_the_whole(cut: int) -> None:
    values = torch.where(MASK, 5 + masked(10), 0.0)

    def work(r: int, all_sum: Callable[[Sequence[float]], list[float]]) -> list[torch.Tensor]:
        rows, mask = (values[:cut], MASK[:cut]) if r == 0 else (values[cut:], MASK[cut:])
        return whiten([rows[:1], rows[1:]], [mask[:1], mask[1:]], eps=1e-8, all_sum=all_sum)

    expected = naive_whiten([values], [MASK], 1e-8)[0]
    torch.testing.assert_close(on_two_ranks(work), expected, rtol=0, atol=1e-12)


def test_a_rank_without_tokens_takes_part() -> None:
    values = torch.where(MASK, 5 + masked(11), 0.0)

    def work(r: int, all_sum: Callable[[Sequence[float]], list[float]]) -> list[torch.Tensor]:
        return whiten([values], [MASK], eps=1e-8, all_sum=all_sum) if r else whiten([], [], eps=1e-8, all_sum=all_sum)

    expected = naive_whiten([values], [MASK], 1e-8)[0]
    torch.testing.assert_close(on_two_ranks(work), expected, rtol=0, atol=1e-12)


def test_whitened_tokens_have_mean_zero_and_unbiased_variance_one() -> None:
    [result] = whiten([masked(12)], [MASK], eps=0.0, all_sum=alone)
    taken = result[MASK]
    assert float(taken.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(taken.square().sum()) / (taken.numel() - 1) == pytest.approx(1.0, abs=1e-12)
    assert (result[~MASK] == 0).all()


def test_fewer_than_two_tokens_are_left_as_they_are() -> None:
    one = torch.tensor([[0.0, 3.0]])
    assert torch.equal(whiten([one], [one > 0], eps=1e-8, all_sum=alone)[0], one)
    nothing = torch.zeros(1, 2)
    assert torch.equal(whiten([nothing], [nothing > 0], eps=1e-8, all_sum=alone)[0], nothing)


def test_equal_advantages_become_zero_and_not_nan() -> None:
    [result] = whiten([torch.where(MASK, 0.5, 0.0)], [MASK], eps=1e-8, all_sum=alone)
    assert (result == 0).all()
