"""The learner's part of the weight check: random rounding, and temporary perturbation of parameters.

Both work on a plain model and on one whose parameters DeepSpeed has sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_outputs import CausalLMOutput

from grpo.learner.heads import LogprobHead, unpack
from grpo.sync.probe import Probe, Reading, Spread, spread
from grpo.types import Unchecked

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}
"""Largest relative change by rounding. A layer in 16 bits accumulates in float32 and rounds its result once, to half a
unit in the last place. A layer in float32 rounds each addition; over the thousands of terms of a matrix product this
adds up to about sixteen times the rounding of one."""

TF32_ROUNDOFF = 2.0**-11
"""Unit roundoff of float32 matrix products on GPUs: some kernels of the engines round their operands to TF32."""

GENTLE = 1 / 3
"""Share of the perturbation for vectors (norms, biases) and vocabulary matrices. Each of them moves logprobs more than
a projection does, and would hide the effect of the others."""

ZERO_SCALE = 0.02
"""Used instead of the root mean square of a parameter that is all zeros: the usual scale of initial weights."""


@contextmanager
def rounded_at_random(model: torch.nn.Module, without: torch.nn.Module, seed: int = 0) -> Iterator[None]:
    """Multiply the output of each layer of `model`, except for the module `without`, by 1 + u within this context.

    u is uniform within the unit roundoff of the output's dtype. The result is the model as another engine might compute
    it (Monte Carlo arithmetic; D. S. Parker, UCLA CSD-970002, 1997).
    """
    generators: dict[torch.device, torch.Generator] = {}

    def round_output(module: torch.nn.Module, given: Unchecked, out: Unchecked) -> torch.Tensor | None:
        if not isinstance(out, torch.Tensor) or out.dtype not in UNIT_ROUNDOFF:
            return None
        if out.device not in generators:
            generators[out.device] = torch.Generator(out.device).manual_seed(seed)
        unit = TF32_ROUNDOFF if out.is_cuda and out.dtype == torch.float32 else UNIT_ROUNDOFF[out.dtype]
        wide = torch.promote_types(out.dtype, torch.float32)
        u = torch.rand(out.shape, generator=generators[out.device], device=out.device, dtype=wide)
        return (out.to(wide) * (1 + (2 * u - 1) * unit)).to(out.dtype)

    layers = [module for module in model.modules() if module is not without and not list(module.children())]
    hooks = [layer.register_forward_hook(round_output) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_probe(
    forward: Callable[..., CausalLMOutput],
    model: torch.nn.Module,
    head: LogprobHead,
    probe: Probe,
    device: torch.device,
    noise: Spread | None = None,
) -> Reading:
    """Return the logprobs of the probe under the current weights, and their rounding noise.

    Args:
        forward: the callable for `input_ids`: the model itself, or DeepSpeed's engine around it.
        head: the model's head.
        noise: rounding noise from an earlier reading. None: it is measured.
    """
    logprobs = _logprobs(forward, head, probe, device)
    if noise is not None:
        return Reading(logprobs=logprobs, noise=noise)
    with rounded_at_random(model, without=head.module), head.in_float32():
        otherwise = _logprobs(forward, head, probe, device)
    return Reading(logprobs=logprobs, noise=spread(otherwise, logprobs))


@torch.no_grad()
def _logprobs(
    forward: Callable[..., CausalLMOutput], head: LogprobHead, probe: Probe, device: torch.device
) -> tuple[NDArray[np.float32], ...]:
    """Return the logprobs of the probe tokens after the first, [N][L_n - 1], at temperature 1.

    One forward computes all rows: right padding needs no mask.
    """
    rows = [torch.tensor(ids, device=device) for ids in probe.token_ids]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with head.targets(tokens[:, 1:], 1.0):
        logprobs, _ = unpack(forward(input_ids=tokens[:, :-1], use_cache=False).logits)
    return tuple(row[: len(ids) - 1].float().cpu().numpy() for row, ids in zip(logprobs, probe.token_ids, strict=True))


class Perturbation:
    """Changes some parameters of a model in place, and keeps a copy of their values to restore.

    The storage of a parameter is looked up on each use, since an offload gives parameters new storage.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], chosen: Sequence[int], vocabulary: int, rank: int
    ) -> None:
        """Copy the chosen parameters.

        Args:
            parameters: all parameters of the model.
            chosen: indices of the parameters to change.
            vocabulary: number of rows of a vocabulary matrix.
            rank: this rank, if the parameters are sharded over the ranks; else 0.
        """
        self._parameters = {i: parameters[i] for i in chosen}
        self._vocabulary, self._rank = vocabulary, rank
        self._saved = {i: _data(p).clone() for i, p in self._parameters.items()}

    @torch.no_grad()
    def apply(self, strength: float) -> None:
        """Set each parameter to its copy plus or minus `strength` times its root mean square, with random signs.

        Vectors and vocabulary matrices change by GENTLE times that.
        """
        for i, p in self._parameters.items():
            saved = self._saved[i]
            generator = torch.Generator(saved.device).manual_seed(1000 * i + self._rank)
            signs = torch.randint(0, 2, saved.shape, generator=generator, device=saved.device, dtype=torch.int8)
            real = saved.flatten()[: _real_elements(p, saved, self._rank)]
            scale = float(real.float().square().mean().sqrt()) if real.numel() else 0.0
            shape = getattr(p, "ds_shape", p.shape)
            gentle = GENTLE if len(shape) < 2 or shape[0] >= self._vocabulary else 1.0
            change = strength * gentle * (scale or ZERO_SCALE)
            _data(p).copy_(saved + (signs * (2 * change) - change).to(saved.dtype))

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the parameters bit for bit."""
        for i, p in self._parameters.items():
            _data(p).copy_(self._saved[i])


def _real_elements(parameter: torch.nn.Parameter, shard: torch.Tensor, rank: int) -> int:
    """Return how many elements of the rank's `shard` belong to the parameter.

    At ZeRO 3 the last shards are padded with uninitialized memory.
    """
    whole = getattr(parameter, "ds_numel", shard.numel())
    return max(0, min(shard.numel(), whole - rank * shard.numel()))


def _data(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the current storage of a parameter on this rank; at ZeRO 3 its shard."""
    data: torch.Tensor = getattr(parameter, "ds_tensor", parameter).data
    return data
