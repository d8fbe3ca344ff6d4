"""Selected logprobs and entropy by chunks against the plain full-logits way, values and gradients."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.nn.functional import linear

from grpo.objective import logprobs as module
from grpo.objective.logprobs import LogitChange, selected_logprobs

B, T, H, V = 3, 5, 4, 11


def inputs(
    dtype: torch.dtype = torch.float64, *, with_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight, bias = draw(B, T, H), draw(V, H), draw(V)
    targets = torch.randint(V, (B, T), generator=generator)
    return hidden, weight, bias if with_bias else None, targets


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, and autograd."""
    every = torch.log_softmax(linear(hidden, weight, bias) / temperature, -1)
    return every.gather(-1, targets[..., None])[..., 0], -(every.exp() * every).sum(-1)


def upstream(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_values_equal_a_naive_loop() -> None:
    hidden, weight, bias, targets = inputs()
    logprobs, entropy = selected_logprobs(hidden, weight, bias, targets, temperature=0.7, float32_head=False)
    assert bias is not None
    h, w, offset = hidden.tolist(), weight.tolist(), bias.tolist()
    for b in range(B):
        for t in range(T):
            logits = [(sum(h[b][t][i] * w[v][i] for i in range(H)) + offset[v]) / 0.7 for v in range(V)]
            total = math.fsum(math.exp(x) for x in logits)
            shares = [math.exp(x) / total for x in logits]
            assert logprobs[b, t].item() == pytest.approx(math.log(shares[int(targets[b, t])]), abs=1e-12)
            assert entropy[b, t].item() == pytest.approx(-math.fsum(s * math.log(s) for s in shares), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("chunk_elements", [1, 2 * V, 4 * V + 3, 1 << 26])
@pytest.mark.parametrize("on", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_plain_autograd(
    temperature: float, chunk_elements: int, on: str, with_bias: bool
) -> None:
    hidden, weight, bias, targets = inputs(with_bias=with_bias)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    ours = selected_logprobs(
        hidden, weight, bias, targets, temperature=temperature, float32_head=False, chunk_elements=chunk_elements
    )
    theirs = plain(hidden, weight, bias, targets, temperature)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    on_logprobs = 0.0 if on == "entropy" else upstream(0)
    on_entropy = 0.0 if on == "logprobs" else upstream(1)
    grads = [
        torch.autograd.grad((on_logprobs * logprobs + on_entropy * entropy).sum(), leaves)
        for logprobs, entropy in (ours, theirs)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)
    assert all(grad.abs().max() > 0.01 for grad in grads[0])


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_may_stay_unused(which: int) -> None:
    hidden, weight, bias, targets = inputs()
    assert bias is not None
    ours = selected_logprobs(hidden, weight, bias, targets, temperature=0.9, float32_head=False, chunk_elements=30)
    found = torch.autograd.grad(ours[which].sum(), [hidden, weight, bias])
    expected = torch.autograd.grad(plain(hidden, weight, bias, targets, 0.9)[which].sum(), [hidden, weight, bias])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_elements", [V, 1 << 20])
def test_gradcheck(chunk_elements: int) -> None:
    hidden, weight, bias, targets = inputs()

    def both(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return selected_logprobs(h, w, b, targets, temperature=0.8, float32_head=True, chunk_elements=chunk_elements)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight, bias, targets = inputs()
    assert bias is not None
    expected = torch.autograd.grad(plain(hidden, weight, bias, targets, 1.0)[0].sum(), [hidden, weight, bias])
    frozen_weight, frozen_bias = weight.detach(), bias.detach()
    logprobs, _ = selected_logprobs(hidden, frozen_weight, frozen_bias, targets, temperature=1.0, float32_head=False)
    logprobs.sum().backward()
    torch.testing.assert_close(hidden.grad, expected[0], rtol=0, atol=1e-12)
    assert frozen_weight.grad is None
    assert frozen_bias.grad is None
    logprobs, _ = selected_logprobs(hidden.detach(), weight, bias, targets, temperature=1.0, float32_head=False)
    logprobs.sum().backward()
    torch.testing.assert_close(weight.grad, expected[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(bias.grad, expected[2], rtol=0, atol=1e-12)


def test_without_gradient_the_values_are_the_same() -> None:
    arguments = inputs()
    with torch.no_grad():
        still = selected_logprobs(*arguments, temperature=0.8, float32_head=False)
    moving = selected_logprobs(*arguments, temperature=0.8, float32_head=False)
    assert not still[0].requires_grad
    assert not still[1].requires_grad
    assert torch.equal(still[0], moving[0])
    assert torch.equal(still[1], moving[1])


@pytest.mark.parametrize("on", ["logprobs", "entropy"])
def test_bfloat16_head_equals_the_same_projection_with_float32_after_it(on: str) -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    assert bias is not None
    ours = selected_logprobs(hidden, weight, bias, targets, temperature=0.7, float32_head=False, chunk_elements=40)
    every = torch.log_softmax(linear(hidden, weight, bias).float() / 0.7, -1)
    theirs = every.gather(-1, targets[..., None])[..., 0], -(every.exp() * every).sum(-1)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    which = 0 if on == "logprobs" else 1
    grads = [
        torch.autograd.grad((upstream(2, torch.float32) * result[which]).sum(), [hidden, weight, bias])
        for result in (ours, theirs)
    ]
    assert all(grad.dtype == torch.bfloat16 for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 26])
def test_float32_head_projects_bfloat16_in_float32(chunk_elements: int) -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    assert bias is not None
    arguments = (hidden, weight, bias, targets)
    ours = selected_logprobs(*arguments, temperature=0.7, float32_head=True, chunk_elements=chunk_elements)
    exact = plain(hidden.double(), weight.double(), bias.double(), targets, 0.7)
    torch.testing.assert_close(ours, tuple(x.float() for x in exact), rtol=0, atol=1e-5)
    narrow, _ = selected_logprobs(*arguments, temperature=0.7, float32_head=False, chunk_elements=chunk_elements)
    assert (narrow - ours[0]).abs().max() > 1e-4
    leaves = [hidden, weight, bias]
    found = torch.autograd.grad((upstream(4, torch.float32) * (ours[0] + ours[1])).sum(), leaves)
    expected = torch.autograd.grad((upstream(4) * (exact[0] + exact[1])).sum(), leaves)
    assert all(grad.dtype == torch.bfloat16 for grad in found)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3)


def test_chunks_of_bfloat16_add_up_in_float32() -> None:
    # a token each: 256 + 1 + 1 with slope 1/2; next to 256 bfloat16 counts in twos, and 256 + 1 would stay 256
    hidden = torch.tensor([[[512.0], [2.0], [2.0]]], dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1, 3, dtype=torch.int64)
    logprobs, _ = selected_logprobs(
        hidden, weight, None, targets, temperature=1.0, float32_head=False, chunk_elements=2
    )
    [grad] = torch.autograd.grad(logprobs.sum(), weight)
    assert grad.flatten().tolist() == [258.0, -258.0]


def test_far_logits_overflow_nowhere() -> None:
    hidden = torch.full((1, 1, 1), 1.0, dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[500.0], [-500.0], [499.0]])
    logprobs, entropy = selected_logprobs(
        hidden, weight, None, torch.tensor([[1]]), temperature=0.5, float32_head=False
    )
    assert logprobs.item() == pytest.approx(-2000 - math.log1p(math.exp(-2)), abs=1e-3)
    share = 1 / (1 + math.exp(-2))
    expected = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert entropy.item() == pytest.approx(expected, abs=1e-4)
    [grad] = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    assert torch.isfinite(grad).all()


def test_no_chunk_exceeds_its_bound_and_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    logits: list[weakref.ref[torch.Tensor]] = []
    kept: list[int] = []

    def counted(*arguments: torch.Tensor | None) -> torch.Tensor:
        result = linear(*arguments)
        made.append(result.numel())
        logits.append(weakref.ref(result))
        return result

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    monkeypatch.setattr(module, "linear", counted)
    hidden, weight, bias, targets = inputs()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropy = selected_logprobs(
            hidden, weight, bias, targets, temperature=0.9, float32_head=False, chunk_elements=4 * V + 5
        )
    assert [ref for ref in logits if ref() is not None] == []
    (logprobs.sum() + entropy.sum()).backward()
    # 15 tokens by 4, forward and backward
    assert made == [4 * V, 4 * V, 4 * V, 3 * V] * 2
    assert sum(kept) <= B * T * H + V * H + V + 3 * B * T  # norm and entropy of each, and its target


def test_a_graph_can_be_used_twice() -> None:
    hidden, weight, bias, targets = inputs()
    logprobs, entropy = selected_logprobs(hidden, weight, bias, targets, temperature=0.9, float32_head=False)
    loss = (upstream(5) * logprobs + upstream(6) * entropy).sum()
    [once] = torch.autograd.grad(loss, hidden, retain_graph=True)
    [twice] = torch.autograd.grad(loss, hidden)
    assert torch.equal(once, twice)


CHANGES = [LogitChange(scale=0.125), LogitChange(cap=1.5), LogitChange(scale=3.0, cap=0.7)]


def changed_plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    change: LogitChange,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `plain`, the logits changed as model families write it."""
    logits = linear(hidden, weight, bias)
    if change.cap is not None:
        logits = torch.tanh(logits / change.cap) * change.cap
    every = torch.log_softmax(logits * change.scale / temperature, -1)
    return every.gather(-1, targets[..., None])[..., 0], -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [1, 4 * V + 3, 1 << 26])
@pytest.mark.parametrize("on", ["logprobs", "entropy"])
def test_changed_logits_equal_plain_autograd(
    change: LogitChange, temperature: float, chunk_elements: int, on: str
) -> None:
    hidden, weight, bias, targets = inputs()
    assert bias is not None
    ours = selected_logprobs(
        hidden, weight, bias, targets, temperature=temperature, float32_head=False, change=change,
        chunk_elements=chunk_elements,
    )  # fmt: skip
    theirs = changed_plain(hidden, weight, bias, targets, change, temperature)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    without = plain(hidden, weight, bias, targets, temperature)
    assert (ours[0] - without[0]).abs().max() > 0.1
    which = 0 if on == "logprobs" else 1
    grads = [
        torch.autograd.grad((upstream(4) * result[which]).sum(), [hidden, weight, bias]) for result in (ours, theirs)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)
    assert all(grad.abs().max() > 0.01 for grad in grads[0])


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_gradcheck_of_changed_logits(change: LogitChange) -> None:
    hidden, weight, bias, targets = inputs()

    def both(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return selected_logprobs(
            h, w, b, targets, temperature=0.8, float32_head=True, change=change, chunk_elements=3 * V
        )

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_a_bfloat16_cap_rounds_as_vllm_does() -> None:
    """Each operation of the cap and the scale in bfloat16, as vLLM's LogitsProcessor computes it; float32 after it."""
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    change = LogitChange(scale=0.3, cap=2.0)
    ours, _ = selected_logprobs(hidden, weight, bias, targets, temperature=1.0, float32_head=False, change=change)
    logits = linear(hidden, weight, bias)
    logits = torch.tanh(logits / 2.0) * 2.0
    logits *= 0.3
    expected = torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    wide, _ = selected_logprobs(hidden, weight, bias, targets, temperature=1.0, float32_head=True, change=change)
    assert (wide - ours).abs().max() > 1e-4
