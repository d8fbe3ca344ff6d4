"""Check the files of a model: its config, its weights, and whether it fits the options of the run."""

from __future__ import annotations

import importlib.util
import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from grpo import builtin, data
from grpo.config import Config
from grpo.files import fingerprint
from grpo.planning.shapes import refuse_outer_folder, split_problems
from grpo.suggest import one_line
from grpo.types import UserError

READ_BYTES = 16e9
"""Approximate number of bytes of a model's weights to read when checking that they are finite: half a minute on a
shared file system."""


def _made_by(path: Path) -> str | None:
    """Return the command that makes a missing model, if it is that of a built-in recipe, or the result of one."""
    if path.parent.parent.name == "tiny":
        return builtin.script_command(path.parent.name)
    trains = path.name == "model" and builtin.find("recipes", path.parent.name) is not None
    return f"grpo train {path.parent.name}" if trains else None


def check_model(config: Config) -> PreTrainedConfig:
    """Check the model at `model.path` and return its config.

    Its folder, weights, attention package, maximum length and parallel split are checked.

    Raises UserError at the first problem.
    """
    path = Path(config.model.path)
    if not path.is_dir() and data.is_path(config.model.path):
        made_by = _made_by(path)
        close = "" if path.exists() else data.nearest_path(path)
        hint = f"; make it with: {made_by}" if made_by else close
        raise UserError(f"model.path={config.model.path} is not a folder{hint}")
    refuse_adapter("model.path", config.model.path)
    model = read_config(config, "model.path", config.model.path)
    refuse_quantized("model.path", config.model.path, model)
    if path.is_dir():
        check_weights(path)
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    package = packages.get(config.model.attention)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"model.attention={config.model.attention} needs the package {package}, which is not installed; nearest: "
            "model.attention=auto, which uses an installed one"
        )
    limit = getattr(model, "max_position_embeddings", None)
    if limit is not None and config.max_row_tokens > limit:
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + sampling.max_tokens (or data.eval.max_tokens)="
            f"{config.max_row_tokens - config.data.max_prompt_tokens} exceed the model's {limit} positions; lower them"
        )

    def size(name: str) -> int:
        value = getattr(model, name, None)
        return value if isinstance(value, int) else 0

    heads = size("num_attention_heads")
    problems = split_problems(
        config.cluster.tensor_parallel, config.cluster.pipeline_parallel, heads=heads,
        kv_heads=size("num_key_value_heads") or heads, intermediate=size("intermediate_size"),
        vocab=size("vocab_size"), layers=size("num_hidden_layers"),
    )  # fmt: skip
    if problems:
        raise UserError(problems[0])
    return model


def read_config(config: Config, option: str, path: str) -> PreTrainedConfig:
    """Return the config.json of a model.

    Raises UserError if there is none, or if it is not a model config.
    """
    remark = ""
    refuse_outer_folder(option, path)
    try:
        with data.hub_or_cache() if not Path(path).is_dir() else nullcontext("") as remark:
            return AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        local = Path(path)  # a hub id may be a typo of a folder's name, if there is such a folder
        near = data.nearest_path(local) if not local.exists() and local.parent.is_dir() else ""
        raise UserError(f"{option}={path}{remark}: {one_line(error)}{near}") from error
    except Exception as error:  # whatever the config classes raise
        why = one_line(error)
        raise UserError(f"{option}={path}: its config.json is not that of a model: {why}") from error


def refuse_adapter(option: str, path: str) -> None:
    """Raise UserError for a folder with an adapter: transformers would load the base model that the adapter names."""
    file = Path(path).expanduser() / "adapter_config.json"
    if file.is_file():
        try:
            base = json.loads(file.read_text()).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            base = None
        raise UserError(
            f"{option}={path} has an adapter of {base or 'another model'}, which is not a complete model; merge it "
            "into its base model (merge_and_unload of peft) and save that, or remove adapter_config.json if it is "
            "already merged"
        )


def refuse_quantized(option: str, path: str, model: PreTrainedConfig) -> None:
    """Raise UserError for quantized weights: the learner trains unquantized weights, and the sampler must use the
    same."""
    settings = getattr(model, "quantization_config", None)
    if settings:
        how = settings.get("quant_method") if isinstance(settings, dict) else None
        raise UserError(
            f"{option}={path} is quantized ({how or 'by its quantization_config'}); only unquantized weights can be "
            "trained; use the model that it was made from"
        )


def check_critic(config: Config) -> None:
    """Check that `critic.path` is a model with the vocabulary size of the policy.

    Raises UserError at the first problem.
    """
    assert config.critic.path is not None
    refuse_adapter("critic.path", config.critic.path)
    critic = read_config(config, "critic.path", config.critic.path)
    refuse_quantized("critic.path", config.critic.path, critic)
    policy = read_config(config, "model.path", config.model.path)
    if critic.vocab_size != policy.vocab_size:
        raise UserError(
            f"critic.path={config.critic.path} has a vocabulary of {critic.vocab_size} and model.path one of "
            f"{policy.vocab_size}: the token ids of critic and policy would differ"
        )
    if Path(config.critic.path).is_dir():
        check_weights(Path(config.critic.path), "critic.path")


def check_weights(folder: Path, option: str = "model.path") -> None:
    """Check that the safetensors files of the folder exist, are complete, and hold finite numbers.

    If they exceed READ_BYTES, only every n-th tensor is read.

    Raises UserError naming the file.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{option}: {index} is damaged: {error!r}") from error
    every = max(1, math.ceil(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / READ_BYTES))
    for name in names:
        file = folder / name
        if not file.is_file():
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            raise UserError(
                f"{option}: {file} does not exist; weights are read from safetensors only"
                + (f", and {index.name} lists {len(names)} files of them" if len(names) > 1 else "")
                + (
                    f", and {', '.join(others[:3])} is none; transformers' save_pretrained writes them"
                    if others
                    else ""
                )
            )
        try:
            with safe_open(file, "pt") as weights:
                keys = [*weights.keys()][::every]
                broken = next((key for key in keys if not is_finite(weights.get_tensor(key))), None)
        except (SafetensorError, OSError) as error:
            found = data.disguise_of(file)
            what = f"is {found}" if found else f"is damaged or truncated: {error}"
            raise UserError(f"{option}: {file} {what}") from error
        if broken is not None:
            raise UserError(
                f"{option}: {file}: {broken} has numbers that are not finite; the training that wrote it failed"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers of a tensor are finite. Integers and 8-bit floats count as finite."""
    if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel():
        return True
    return all(math.isfinite(float(end)) for end in tensor.aminmax())


def model_fingerprint(path: str) -> str:
    """Return the SHA-256 of the config and weights of a model, given by its folder or hub id."""
    folder = Path(path)
    if not folder.is_dir():
        with data.hub_or_cache():
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "config.json"]))
    return fingerprint([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
