"""Dumps of updates that were not finite. `grpo replay DUMP` reports the first quantity that is not finite.

A replay runs in one process without DeepSpeed: plain torch with the dump's weights, on the GPU if there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from grpo import config as config_module
from grpo.config import Config
from grpo.learner import heads
from grpo.learner.prepare import Prepared, TrainedTokens, critic_ids, trained_tokens
from grpo.learner.step import objective_terms
from grpo.objective.losses import clipped_value_loss
from grpo.suggest import one_line
from grpo.types import Batch, UserError


def replay(folder: Path) -> list[str]:
    """Return the lines of the report on the dump `folder`. Raises UserError if it is no complete dump."""
    files = sorted(folder.glob("rank-*.safetensors"))
    for needed in ("rank-0.safetensors", "config.yaml", "model/config.json"):
        if not (folder / needed).is_file():
            raise UserError(f"{folder} is not a complete dump of an update: it has no {needed}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_module.load(folder / "config.yaml", [f"model.path={folder / 'model'}"])
    model = heads.load_policy(config).to(device)
    head = heads.install(model, config)
    critic = None
    if config.algorithm.advantage == "gae":
        of_critic = dataclasses.replace(config.critic, path=str(folder / "model" / "critic"))
        critic = heads.load_critic(dataclasses.replace(config, critic=of_critic)).to(device)
    lines = [f"{folder}: {len(files)} ranks, {config.model.dtype} on {device}"]
    lines += [f"weights: {name} {_counted(p)}" for name, p in model.named_parameters() if not _finite(p)]
    for rank, file in enumerate(files):
        for number, (batch, prepared, kl_coef) in enumerate(read(file)):
            try:
                found = examine(model, head, config, batch, prepared, kl_coef, device)
                if critic is not None:
                    found |= examine_critic(critic, config, batch, prepared, device)
            except (IndexError, RuntimeError, ValueError) as error:
                what = one_line(error, 200)
                raise UserError(f"{file}: microbatch {number} does not fit the dump's model: {what}") from error
            where = f"rank {rank} microbatch {number}"
            lines += [f"{where}: {name} {text}" for name, text in found.items()]
    begins = next((line for line in lines[1:] if "not finite" in line), None)
    lines.append(f"begins with {begins}" if begins else "everything is finite here; it depends on hardware or chance")
    return lines


def read(file: Path) -> list[tuple[Batch, Prepared, float]]:
    """Return the microbatches of one rank's file, each with its `Prepared` and kl_coef.

    Raises UserError if the file cannot be read or is incomplete.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            about = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    out = []
    try:
        count, kl_coef = int(about["microbatches"]), float(about["kl_coef"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not part of a dump: it does not say how many microbatches it has") from error
    for number in range(count):
        own = {name.split("/")[1]: t for name, t in tensors.items() if name.startswith(f"{number}/")}
        missing = [f.name for f in dataclasses.fields(Batch) if f.name not in own]
        if missing:
            raise UserError(f"{file} lacks {number}/{missing[0]}")
        batch = Batch(**{f.name: own[f.name] for f in dataclasses.fields(Batch)})
        prepared = Prepared(**{f.name: own.get(f.name) for f in dataclasses.fields(Prepared)})  # type: ignore[arg-type]
        if prepared.advantages.dim() != 1:
            raise UserError(f"{file} was written by an earlier version of grpo; replay it with that version")
        out.append((batch, prepared, kl_coef))
    return out


def examine(
    model: torch.nn.Module,
    head: heads.LogprobHead,
    config: Config,
    batch: Batch,
    prepared: Prepared,
    kl_coef: float,
    device: torch.device,
) -> dict[str, str]:
    """Return quantity -> description of its non-finite values, in the order of computation.

    If everything is finite, the only entry is the loss.
    """
    model.zero_grad()
    tokens = trained_tokens(batch, device)
    with head.targets(batch.target_ids.to(device), config.sampling.temperature, batch.completion_mask.to(device)):
        at_tokens = heads.unpack(model(input_ids=batch.input_ids.to(device), use_cache=False).logits)
    logprobs, entropy = (tokens.select(padded) for padded in at_tokens)
    given = {
        "sampler_logprobs": tokens.sampler_logprobs,
        "old_logprobs": prepared.old_logprobs,
        "ref_logprobs": prepared.ref_logprobs,
        "advantages": prepared.advantages,
    }
    at = {name: tensor.to(device) for name, tensor in given.items() if tensor is not None}
    terms = objective_terms(
        logprobs=logprobs, entropy=entropy, old_logprobs=at.get("old_logprobs", logprobs.detach()),
        ref_logprobs=at.get("ref_logprobs"), sampler_logprobs=at["sampler_logprobs"], advantages=at["advantages"],
        rows=tokens.rows, kl_coef=kl_coef, algorithm=config.algorithm,
    )  # fmt: skip
    loss = (tokens.weights * terms.total).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = _wrong_tokens({
        **at, "logprobs": logprobs, "entropy": entropy, "importance weight": terms.raw_weight,
        "policy loss": terms.policy.loss, "total": terms.total,
    }, tokens, batch)  # fmt: skip
    found |= _wrong_gradients(model)
    return found or {"loss": f"{float(loss.detach()):.6g}, finite, and so is its gradient"}


def examine_critic(
    critic: torch.nn.Module, config: Config, batch: Batch, prepared: Prepared, device: torch.device
) -> dict[str, str]:
    """Return the non-finite quantities of the value loss, as `examine` does; empty if everything is finite."""
    assert prepared.old_values is not None
    assert prepared.returns is not None
    critic.zero_grad()
    tokens = trained_tokens(batch, device)
    old, returns = prepared.old_values.to(device), prepared.returns.to(device)
    values = critic(input_ids=critic_ids(batch).to(device), use_cache=False).logits[..., 0]
    values = tokens.select(values.float()[:, :-1])
    token_loss, _ = clipped_value_loss(values, old, returns, eps=config.critic.clip)
    (tokens.weights * token_loss).sum().backward()  # type: ignore[no-untyped-call]
    quantities = {"old_values": old, "returns": returns, "values": values, "value loss": token_loss}
    return _wrong_tokens(quantities, tokens, batch) | _wrong_gradients(critic)


def _wrong_tokens(quantities: dict[str, torch.Tensor], tokens: TrainedTokens, batch: Batch) -> dict[str, str]:
    found = {}
    for name, tensor in quantities.items():
        wrong = ~torch.isfinite(tensor)
        if wrong.any():
            rows = batch.rollout_index[tokens.rows.ids[wrong].unique().cpu()].tolist()
            found[name] = f"not finite at {int(wrong.sum())} of {wrong.numel()} tokens, of rollouts {rows[:8]}"
    return found


def _wrong_gradients(model: torch.nn.Module) -> dict[str, str]:
    wrong = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)}
    return {f"gradient of {name}": _counted(gradient) for name, gradient in wrong.items()}


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _counted(tensor: torch.Tensor) -> str:
    return f"not finite in {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers"


MAX_DUMPS = 3
"""Maximum number of dumps of a process; each dump holds the weights."""


def write_dump(
    folder: Path, minibatch: Sequence[Batch], prepared: Sequence[Prepared], *, rank: int, step: int, kl_coef: float
) -> None:
    """Write one rank's inputs of an update to `folder`, which is created."""
    tensors = {
        f"{i}/{field.name}": getattr(part, field.name)
        .contiguous()
        .cpu()
        .clone()  # a filler shares tensors, which safetensors refuses
        for i, parts in enumerate(zip(minibatch, prepared, strict=True))
        for part in parts
        for field in dataclasses.fields(part)
        if getattr(part, field.name) is not None and not (part is parts[0] and field.name == "advantages")
    }
    about = {"step": str(step), "kl_coef": repr(kl_coef), "microbatches": str(len(minibatch))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"rank-{rank}.safetensors", about)
