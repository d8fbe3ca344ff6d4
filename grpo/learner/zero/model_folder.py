"""Hugging Face folders that the learner writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from grpo.config import Config
from grpo.learner.zero.models import Models
from grpo.learner.zero.setup import Ranks
from grpo.learner.zero.weights import weights_of

Tensors = dict[str, torch.Tensor]

OTHER_FILES = (".json", ".jinja", ".model", ".txt")


def save(models: Models, folder: Path, config: Config, ranks: Ranks) -> None:
    """Write the policy as a Hugging Face folder (model, config, tokenizer files), with the critic in `critic/`.

    A collective, which returns when the folder is complete.
    """
    zero_stage, rank = config.learner.zero_stage, ranks.rank
    policy = _weights_on_cpu(models.policy, zero_stage, rank)
    critic = None if models.critic is None else _weights_on_cpu(models.critic, zero_stage, rank)
    if rank == 0:
        _write(models, folder, config.model.path, policy, critic)
    if ranks.count > 1:
        ranks.barrier()


def _write(models: Models, folder: Path, source: str, policy: Tensors, critic: Tensors | None) -> None:
    """Write the model folder of the weights `policy` and `critic` to a folder with the suffix `.partial`, and then
    rename it.

    `source`: the folder or hub id of the model that the run started from.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    # a model's sampling settings may fail transformers' checks: generation_config.json is copied unchanged
    models.policy.module.generation_config = GenerationConfig()
    models.policy.module.save_pretrained(aside, state_dict=policy)
    (aside / "generation_config.json").unlink(missing_ok=True)
    copy_other_files(source, aside)
    if critic is not None:
        models.critic.module.save_pretrained(aside / "critic", state_dict=critic)
    os.replace(aside, folder)


def _weights_on_cpu(engine: Any, zero_stage: int, rank: int) -> Tensors:
    """Return the weights on the CPU at rank 0, and nothing on other ranks. A collective."""
    tensors = {}
    for name, tensor in weights_of(engine, zero_stage):
        if rank == 0:
            tensors[name] = tensor.to("cpu", copy=True)
    return tensors


def copy_other_files(source: str, target: Path) -> None:
    """Copy the files besides the weights that a model folder needs: tokenizer, chat template, generation config.

    `source`: the model's folder or hub id.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[f"*{suffix}" for suffix in OTHER_FILES]))
    for file in folder.iterdir():
        wanted = file.suffix in OTHER_FILES and "index" not in file.name
        if file.is_file() and wanted and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
