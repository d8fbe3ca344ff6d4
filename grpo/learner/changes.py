"""Detect how a model's forward changes its logits after the vocabulary projection, by running it.

The projection is replaced by one that returns chosen numbers, and the model runs on one token. The output shows the
change, whatever the family's config calls it: a scale (Granite, Cohere), a soft cap (Gemma 2), or both. A change that
our head does not compute is refused. The weights are not used, so a model on the meta device suffices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from grpo.objective.logprobs import UNCHANGED, LogitChange
from grpo.types import UserError

SMALL, HUGE = 1e-6, 1e8
"""A logit so small that no cap changes it, and one so large that every cap saturates."""
POINTS = (SMALL, 1.0, HUGE, 0.0, -0.3, 2.0, -7.0, 25.0)


class _Output(tuple[torch.Tensor]):
    """Stand-in for the output of a model's body: the hidden states; every other attribute is None."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _forward_as(module: torch.nn.Module, forward: Callable[..., torch.Tensor | _Output]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]


def find_change(model: PreTrainedModel) -> LogitChange:
    """Return the change that the forward of `model`, a causal language model of transformers, makes to its logits.

    Raises UserError, with the config.json entries, for a change that our head does not compute.
    """
    head, body = model.get_output_embeddings(), _body(model)
    if head is None or body is None:
        raise UserError(f"model.path: {type(model).__name__} is not a decoder with a vocabulary projection")
    vocabulary = head.weight.shape[0]
    given = torch.linspace(-1, 1, head.weight.shape[1]).to(head.weight.dtype)[None, None]
    chosen = torch.zeros(1, 1, vocabulary, dtype=torch.float64)
    chosen[0, 0, : len(POINTS)] = torch.tensor(POINTS, dtype=torch.float64)[:vocabulary]
    seen: list[torch.Tensor] = []

    def project(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return chosen.clone()

    with torch.no_grad(), _forward_as(head, project), _forward_as(body, lambda *_, **__: _Output((given,))):
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        logits = model(input_ids=token, use_cache=False).logits
    found = logits[0, 0, : len(POINTS)].double().tolist()
    change = _fit(found)
    if change is None or logits.shape[-1] != vocabulary:
        raise UserError(f"model.path: {_entries(model)} change logits by more than a scale and a soft cap")
    if change != UNCHANGED and not (seen[0].shape == given.shape and bool((seen[0] == given).all())):
        raise UserError(f"model.path: {_entries(model)} change the hidden states in front of the projection, too")
    return change


def _body(model: PreTrainedModel) -> torch.nn.Module | None:
    """Return the child of `model` that maps token ids to hidden states."""
    embedding = model.get_input_embeddings()
    return next((child for child in model.children() if any(part is embedding for part in child.modules())), None)


def _fit(found: list[float]) -> LogitChange | None:
    """Return the change that maps POINTS to `found`, or None if it is no scale and soft cap."""
    small, one, huge = found[:3]
    if math.isclose(huge, one * HUGE, rel_tol=1e-5):
        change = LogitChange(scale=one)
    else:
        scale = float(f"{small / SMALL:.6g}")
        change = LogitChange(scale=scale, cap=huge / scale if scale else None)
    expected = change.apply_(torch.tensor(POINTS, dtype=torch.float64)).tolist()
    close = all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) for a, b in zip(found, expected, strict=True))
    return change if close and change.scale != 0 else None


def _entries(model: PreTrainedModel) -> str:
    """Return the subject of an error message: the config.json entries about logits, with their values."""
    settings = model.config.get_text_config().to_dict()
    named = [f"{name}={value}" for name, value in settings.items() if "logit" in name and value not in (None, False)]
    return f"config.json's {', '.join(named)}" if named else f"the forward of {type(model).__name__} does"


def bypass(model: PreTrainedModel) -> None:
    """Make `model` return the output of its projection unchanged.

    The config keeps its entries about logits, also when the model is saved.
    """
    body, head = _body(model), model.get_output_embeddings()
    assert body is not None

    def forward(input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        return CausalLMOutput(logits=head(body(input_ids=input_ids, use_cache=use_cache)[0]))

    model.forward = forward
