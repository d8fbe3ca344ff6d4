"""Advantages by hand and against naive loops: of rewards (pass@k against every subset), and of tokens, over ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import at_last_token, generalized_advantages, rewards_to_go, whiten

from grpo.objective.advantages import (
    batch_normalized,
    group_centered,
    group_normalized,
    has_spread,
    leave_one_out,
    optimal_baseline,
    pass_at_k,
)

Groups = list[list[float]]

RAGGED: Groups = [[1.0, 0.0, 0.25, -2.0], [0.5, 3.0], [0.1, 0.7, 0.3]]
RAGGED_LENGTHS = [[3, 9, 1, 4], [2, 8], [5, 5, 6]]

GROUP_RELATIVE: dict[str, Callable[[Groups], Groups]] = {
    "group_normalized": lambda r: group_normalized(r, std_eps=0.0),
    "group_centered": group_centered,
    "leave_one_out": leave_one_out,
    "batch_normalized": lambda r: batch_normalized(r, std_eps=0.0),
    "optimal_baseline": lambda r: optimal_baseline(r, [[1 + i * i for i in range(len(group))] for group in r]),
    "pass_at_k": lambda r: pass_at_k(r, k=2),
}
every_method = pytest.mark.parametrize("method", GROUP_RELATIVE.values(), ids=GROUP_RELATIVE.keys())


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def unbiased_std(values: list[float]) -> float:
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def assert_groups_close(actual: Groups, expected: Groups) -> None:
    assert [len(group) for group in actual] == [len(group) for group in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_group_normalized_by_hand() -> None:
    # mean 0.25, unbiased variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25, std 0.5
    assert_groups_close(group_normalized([[1.0, 0.0, 0.0, 0.0]], std_eps=0.0), [[1.5, -0.5, -0.5, -0.5]])
    assert_groups_close(group_normalized([[1.0, 0.0, 0.0, 0.0]], std_eps=0.5), [[0.75, -0.25, -0.25, -0.25]])


def test_group_centered_by_hand() -> None:
    assert_groups_close(group_centered([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0]]), [[0.75, -0.25, -0.25, -0.25], [1.0, -1.0]])


def test_leave_one_out_by_hand() -> None:
    # the others of 1 are 2 and 6, of 2 are 1 and 6, of 6 are 1 and 2
    assert_groups_close(leave_one_out([[1.0, 2.0, 6.0]]), [[-3.0, -1.5, 4.5]])


def test_batch_normalized_by_hand() -> None:
    # all rewards 0, 2, 4, 6: mean 3, unbiased variance (9 + 1 + 1 + 9) / 3 = 20 / 3; group means 1 and 5
    scale = math.sqrt(20 / 3)
    expected = [[-1 / scale, 1 / scale], [-1 / scale, 1 / scale]]
    assert_groups_close(batch_normalized([[0.0, 2.0], [4.0, 6.0]], std_eps=0.0), expected)
    shifted = [[-1 / (scale + 0.5), 1 / (scale + 0.5)]] * 2
    assert_groups_close(batch_normalized([[0.0, 2.0], [4.0, 6.0]], std_eps=0.5), shifted)


def test_batch_normalized_counts_groups_without_spread_in_the_standard_deviation() -> None:
    # all rewards 0, 2, 1, 1: mean 1, unbiased variance 2 / 3
    expected = [[-math.sqrt(1.5), math.sqrt(1.5)], [0.0, 0.0]]
    assert_groups_close(batch_normalized([[0.0, 2.0], [1.0, 1.0]], std_eps=0.0), expected)


def test_optimal_baseline_by_hand() -> None:
    # baseline (1 * 1 + 3 * 0 + 4 * 2) / 8 = 9 / 8
    assert_groups_close(optimal_baseline([[1.0, 0.0, 2.0]], [[1, 3, 4]]), [[-0.125, -1.125, 0.875]])


def test_pass_at_two_by_hand() -> None:
    # n / C(3, 2) = 1. Pairs of 3: with 1 the maximum gains 2, with 0 it gains 3; pairs of 1: with 0 it gains 1
    assert_groups_close(pass_at_k([[3.0, 0.0, 1.0]], k=2), [[5.0, 0.0, 1.0]])


def test_ragged_groups_equal_naive_loops() -> None:
    everything = [r for group in RAGGED for r in group]
    centered = [[r - mean(group) for r in group] for group in RAGGED]
    assert_groups_close(group_centered(RAGGED), centered)
    assert_groups_close(
        group_normalized(RAGGED, std_eps=1e-3), [[(r - mean(g)) / (unbiased_std(g) + 1e-3) for r in g] for g in RAGGED]
    )
    assert_groups_close(
        batch_normalized(RAGGED, std_eps=1e-3),
        [[value / (unbiased_std(everything) + 1e-3) for value in group] for group in centered],
    )
    others = [[mean(group[:i] + group[i + 1 :]) for i in range(len(group))] for group in RAGGED]
    assert_groups_close(
        leave_one_out(RAGGED),
        [[r - o for r, o in zip(g, gs, strict=True)] for g, gs in zip(RAGGED, others, strict=True)],
    )
    expected = []
    for group, lengths in zip(RAGGED, RAGGED_LENGTHS, strict=True):
        baseline = sum(r * n for r, n in zip(group, lengths, strict=True)) / sum(lengths)
        expected.append([r - baseline for r in group])
    assert_groups_close(optimal_baseline(RAGGED, RAGGED_LENGTHS), expected)


def naive_pass_at_k(group: list[float], k: int) -> list[float]:
    """n / C(n, k) * sum over the k-subsets with i of (max - max of the others), every subset listed."""
    n = len(group)
    subsets = list(combinations(range(n), k))

    def best(members: tuple[int, ...]) -> float:
        return max(group[j] for j in members)

    return [
        n / len(subsets) * math.fsum(best(s) - best(tuple(j for j in s if j != i)) for s in subsets if i in s)
        for i in range(n)
    ]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pass_at_k_equals_every_subset_listed(k: int) -> None:
    groups = [
        [0.3, -1.0, 2.0, 0.7, 0.1],
        [1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
        [5.0, 1.0, 1.0, 1.0],
        [-1.0, -1.0, -1.0, -3.0],
    ]
    assert_groups_close(pass_at_k(groups, k=k), [naive_pass_at_k(group, k) for group in groups])


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0, 3.25]), min_size=4, max_size=7), st.integers(2, 4))
def test_pass_at_k_equals_every_subset_listed_with_ties(group: list[float], k: int) -> None:
    assert_groups_close(pass_at_k([group], k=k), [naive_pass_at_k(group, k)])


@pytest.mark.parametrize(("n", "k"), [(2, 2), (4, 2), (4, 3), (5, 4)])
def test_pass_at_k_has_the_gradient_of_the_expected_maximum(n: int, k: int) -> None:
    outcomes = [0.2, 1.5, -0.7]
    logits = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, 0)
    best = torch.zeros((), dtype=torch.float64)
    for draw in product(range(3), repeat=k):
        best = best + logprobs[list(draw)].sum().exp() * max(outcomes[a] for a in draw)
    [exact] = torch.autograd.grad(best, logits, retain_graph=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    for group in product(range(3), repeat=n):
        [advantages] = pass_at_k([[outcomes[a] for a in group]], k=k)
        policy = sum(a * logprobs[token] for a, token in zip(advantages, group, strict=True)) / n
        surrogate = surrogate + logprobs[list(group)].sum().exp().detach() * policy
    [expected] = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(expected, exact, rtol=0, atol=1e-12)
    assert exact.abs().max() > 0.05


@every_method
@pytest.mark.parametrize("group", [[0.95] * 8, [0.1 + 0.2] * 3, [0.1] * 10, [0.0, -0.0], [1e100, 1e100]])
def test_equal_rewards_give_exactly_zero(method: Callable[[Groups], Groups], group: list[float]) -> None:
    assert not has_spread(group)
    assert method([group]) == [[0.0] * len(group)]
    beside = method([group, [0.0, 1.0]])
    assert beside[0] == [0.0] * len(group)
    assert any(value != 0 for value in beside[1])


@every_method
def test_the_smallest_difference_is_signal(method: Callable[[Groups], Groups]) -> None:
    assert has_spread([0.1 + 0.2, 0.3])
    assert has_spread([0.95] * 7 + [0.0])
    assert has_spread([0.0] + [0.95] * 7)
    assert any(value != 0 for value in method([[0.1 + 0.2, 0.3]])[0])


@pytest.mark.parametrize("name", sorted(GROUP_RELATIVE.keys() - {"batch_normalized"}))
def test_a_group_does_not_see_the_others(name: str) -> None:
    method = GROUP_RELATIVE[name]
    assert method(RAGGED) == [method([group])[0] for group in RAGGED]


@every_method
@given(rewards=st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=3, max_size=9), data=st.data())
def test_member_order_moves_with_the_advantages(
    method: Callable[[Groups], Groups], rewards: list[float], data: st.DataObject
) -> None:
    if method is GROUP_RELATIVE["optimal_baseline"]:  # its lengths belong to positions here
        return
    order = data.draw(st.permutations(range(len(rewards))))
    [before], [after] = method([rewards]), method([[rewards[i] for i in order]])
    assert after == pytest.approx([before[i] for i in order], abs=1e-9)


@given(st.lists(st.integers(-1000, 1000).map(lambda n: n / 100), min_size=2, max_size=12), st.integers(-5, 5))
def test_sum_is_zero_order_is_kept_and_a_shift_changes_nothing(rewards: list[float], shift: int) -> None:
    [values] = group_normalized([rewards], std_eps=1e-6)
    assert sum(values) == pytest.approx(0.0, abs=1e-6)
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(values[a] <= values[b] + 1e-9 for a, b in pairwise(order))
    [moved] = group_normalized([[r + shift for r in rewards]], std_eps=1e-1)
    [still] = group_normalized([rewards], std_eps=1e-1)
    assert moved == pytest.approx(still, abs=1e-6)


@every_method
@pytest.mark.parametrize("group", [[], [1.0], [1.0, float("nan")], [float("inf"), 1.0], [float("nan")] * 2])
def test_what_has_no_statistics_is_refused(method: Callable[[Groups], Groups], group: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scored rollouts|finite"):
        method([[0.0, 1.0], group])


def test_pass_at_k_refuses_small_groups_and_small_k() -> None:
    with pytest.raises(ValueError, match="at least 3 scored rollouts, not 2"):
        pass_at_k([[0.0, 1.0, 2.0], [0.0, 1.0]], k=3)
    with pytest.raises(ValueError, match="at least 3 scored rollouts, not 2"):
        pass_at_k([[1.0, 1.0]], k=3)
    for k in (1, 0, -1):
        with pytest.raises(ValueError, match=f"not {k}"):
            pass_at_k([[0.0, 1.0]], k=k)


def test_optimal_baseline_refuses_lengths_of_other_groups() -> None:
    with pytest.raises(ValueError):
        optimal_baseline([[0.0, 1.0], [0.0, 1.0]], [[1, 1]])


@every_method
def test_no_groups_give_no_advantages(method: Callable[[Groups], Groups]) -> None:
    assert method([]) == []


def test_lengths_that_do_not_fit_their_group_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rewards came with 1 lengths"):
        optimal_baseline([[0.0, 1.0, 2.0]], [[5]])


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
