"""Load the models and set up their heads: a projection that returns logprobs, and a critic head of zeros.

The projection's module keeps its place and its parameters and gets another `forward`. ZeRO 3 gathers its weight, in
forward and backward, only because the module itself is called. Chunks computed outside of the module would find the
weight empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from grpo.config import Config
from grpo.learner.changes import bypass, find_change
from grpo.objective.logprobs import UNCHANGED, LogitChange, selected_logprobs
from grpo.sync.weights import torch_dtype
from grpo.types import UserError


class LogprobHead:
    """Replaces the projection's `forward`: hidden [B,T,H] -> [B,T,2] logprob of the target and entropy.

    Only the wanted positions are projected: nobody uses the logprobs of prompts, and the projection has a large share
    of a small model's weights (28 of the 135 million of SmolLM2-135M).
    """

    def __init__(self, head: torch.nn.Module, *, float32_head: bool, change: LogitChange = UNCHANGED) -> None:
        """`change`: the model family's change to its logits after the projection, which is applied here instead."""
        self.module = head
        self.change = change
        self._float32_head = float32_head
        self._targets: tuple[torch.Tensor, float, torch.Tensor | None] | None = None
        head.forward = self.forward  # type: ignore[method-assign]

    @contextmanager
    def targets(
        self, target_ids: torch.Tensor, temperature: float, wanted: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Set the targets, [B,T], and the temperature for the model's forward within this context.

        `wanted`: [B,T] bool; the other positions get 0. None: all positions.
        """
        self._targets = (target_ids, temperature, wanted)
        yield
        self._targets = None

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute the projection in float32 within this context, whatever the model's dtype."""
        before, self._float32_head = self._float32_head, True
        try:
            yield
        finally:
            self._float32_head = before

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._targets is not None, "the model is called without targets"
        target_ids, temperature, wanted = self._targets
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        if wanted is not None:  # one row of the wanted positions
            hidden, target_ids = hidden[wanted][None], target_ids[wanted][None]
        projected = torch.stack(
            selected_logprobs(
                hidden,
                weight,  # type: ignore[arg-type]
                bias,
                target_ids,
                temperature=temperature,
                float32_head=self._float32_head,
                change=self.change,
            ),
            dim=-1,
        )
        return projected if wanted is None else projected.new_zeros(*wanted.shape, 2).index_put((wanted,), projected[0])


def unpack(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and entropy, [B,T] each, from the "logits" of a model with a `LogprobHead`."""
    return logits[..., 0], logits[..., 1]


def install(model: PreTrainedModel, config: Config) -> LogprobHead:
    """Replace the head of `model` by a `LogprobHead` that also applies the model's own change to its logits.

    Raises UserError for a family whose change the head cannot compute.
    """
    change = find_change(model)
    if change != UNCHANGED:
        bypass(model)
    return LogprobHead(model.get_output_embeddings(), float32_head=config.model.float32_head, change=change)


def refuse_missing(where: str, names: Sequence[str]) -> None:
    """Raise UserError if a folder lacks weights of its model. Transformers only warns, and fills them with random
    numbers."""
    if names:
        shown = ", ".join(sorted(names)[:4])
        raise UserError(
            f"{where} lacks {len(names)} of the model's weights: {shown}{', ...' if len(names) > 4 else ''}"
        )


def refuse_mismatched(where: str, tensors: Collection[tuple[str, torch.Size, torch.Size]]) -> None:
    """Raise UserError if the shapes of a folder's weights differ from its config.json."""
    if tensors:
        name, found, expected = min(tensors)
        raise UserError(
            f"{where}: {name} has the shape {list(found)}, but config.json gives {list(expected)}"
            + (f"; {len(tensors) - 1} more tensors differ" if len(tensors) > 1 else "")
        )


def refuse_buffers(where: str, model: torch.nn.Module) -> None:
    """Raise UserError if a model has persistent buffers: neither a sync nor a saved model would include them.

    Routers that correct their scores have such buffers (DeepSeek 3, GLM 4 MoE).
    """
    names = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if names:
        raise UserError(
            f"{where}: {min(names)} is a buffer, and only parameters are sent to the samplers and saved; "
            f"{type(model).__name__} cannot be trained"
        )


def attention_of(config: Config, settings: PreTrainedConfig) -> str:
    """Return transformers' name of the attention to which `model.attention` resolves in this process.

    `settings`: the model's config.json. Raises UserError if the configured attention would leave out the model's cap
    on attention scores.
    """
    cap = getattr(settings.get_text_config(), "attn_logit_softcapping", None)
    if config.model.attention != "auto":
        if cap is not None and config.model.attention != "eager":
            raise UserError(
                f"model.attention={config.model.attention} omits the cap on attention scores that config.json's "
                f"attn_logit_softcapping={cap} asks for; nearest: eager"
            )
        return config.model.attention
    if cap is not None or not _has_sdpa(settings):
        return "eager"
    if config.on_gpu and config.model.dtype == "bfloat16":
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


def _has_sdpa(settings: PreTrainedConfig) -> bool:
    """Return whether transformers can compute the model's attention with PyTorch's SDPA."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    return bool(getattr(model, "_supports_sdpa", True))


def load_policy(config: Config, *, on_paper: bool = False) -> PreTrainedModel:
    """Return the model of `model.path`, as a causal language model of transformers.

    `on_paper`: load the shapes of the weights without their values. Raises UserError if the folder lacks weights of the
    model or has them in other shapes.
    """
    path = config.model.path
    settings = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    attention, dtype = attention_of(config, settings), torch_dtype(config.model.dtype)
    if on_paper and not torch.cuda.is_available() and attention.startswith("flash"):
        attention = "eager"  # has the same weights and can be loaded without a GPU
    refuse_dropout(settings, "model.path")
    if on_paper and not Path(path).is_dir():  # do not download weights for a check
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=dtype, attn_implementation=attention, trust_remote_code=config.model.trust_remote_code
            )
        refuse_buffers(f"model.path={path}", model)
        return model
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with their names
        device_map="meta" if on_paper else None,
    )
    refuse_missing(f"model.path={path}", report["missing_keys"])
    refuse_mismatched(f"model.path={path}", report["mismatched_keys"])
    refuse_buffers(f"model.path={path}", model)
    return model


def as_in_folder(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter of `model` under the names that a model folder uses and vLLM loads.

    Transformers renames the weights of some families while loading, and merges the experts of a layer into one tensor.
    """
    tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, {name: tensor})
    return tensors


def load_critic(config: Config, *, on_paper: bool = False) -> PreTrainedModel:
    """Return the value model of `critic.path`. A backbone without a head gets a head of zeros: every value starts at 0.

    `on_paper`: as in `load_policy`. Raises UserError if the family has no value model, or the folder lacks weights of
    the backbone or has weights in other shapes.
    """
    path = config.critic.path or config.model.path
    settings = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    settings.num_labels = 1
    settings.classifier_dropout = 0.0
    refuse_dropout(settings, "critic.path")
    if type(settings) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise UserError(
            f"critic.path={path}: transformers has no model of the type {settings.model_type} with a value head"
        )
    if on_paper and not Path(path).is_dir():
        with torch.device("meta"):
            return AutoModelForTokenClassification.from_config(settings)
    critic, report = AutoModelForTokenClassification.from_pretrained(
        path,
        config=settings,
        dtype=torch_dtype(config.model.dtype),
        attn_implementation=attention_of(config, settings),
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        device_map="meta" if on_paper else None,
    )
    refuse_mismatched(f"critic.path={path}", report["mismatched_keys"])
    backbone = f"{critic.base_model_prefix}."
    missing = set(report["missing_keys"])
    refuse_missing(f"critic.path={path}", sorted(name for name in missing if name.startswith(backbone)))
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if name in missing:
                parameter.zero_()
    return critic


def refuse_dropout(config: PreTrainedConfig, option: str) -> None:
    """Raise UserError for a model with dropout: its logprobs would differ between passes, and from the sampler's.

    Dropout of heads that a language model does not have is ignored.
    """
    for name, value in config.to_dict().items():
        if name.startswith(("summary_", "classifier_")):
            continue
        if "drop" in name and isinstance(value, float) and value > 0:
            raise UserError(
                f"{option}: the model's config.json has {name}={value}; the learner needs dropout 0.0, or its "
                "logprobs differ from the sampler's"
            )
