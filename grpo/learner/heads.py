"""The models as they are loaded, and their ends: a projection that gives logprobs instead of logits, and the critic's
head of zeros.

The projection's module keeps its place and its parameters and gets another `forward`. Calling it as a module is what
makes ZeRO 3 gather its weight, forward and backward; calling the weight by chunks around it would find it empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from grpo.config import Config
from grpo.objective.logprobs import selected_logprobs
from grpo.types import UserError
from grpo.weight_sync import torch_dtype

LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""Settings of model families that change logits behind the projection, with the values that do not."""


class LogprobHead:
    """What replaces the projection's `forward`: hidden [B,T,H] -> [B,T,2] logprob of the target and entropy."""

    def __init__(self, head: torch.nn.Module, *, float32_head: bool) -> None:
        self.module = head
        self._float32_head = float32_head
        self._targets: tuple[torch.Tensor, float] | None = None
        head.forward = self.forward  # type: ignore[method-assign]

    @contextmanager
    def targets(self, target_ids: torch.Tensor, temperature: float) -> Iterator[None]:
        """[B,T] what the model's next forward is asked the logprobs of, and at which temperature."""
        self._targets = (target_ids, temperature)
        yield
        self._targets = None

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within this, the projection is computed in float32 whatever the model's dtype is."""
        before, self._float32_head = self._float32_head, True
        try:
            yield
        finally:
            self._float32_head = before

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._targets is not None, "the model is called without targets"
        target_ids, temperature = self._targets
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        return torch.stack(
            selected_logprobs(
                hidden,
                weight,  # type: ignore[arg-type]
                bias,
                target_ids,
                temperature=temperature,
                float32_head=self._float32_head,
            ),
            dim=-1,
        )


def unpack(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model with a `LogprobHead` calls logits -> logprobs, entropy."""
    return logits[..., 0], logits[..., 1]


def install(model: Any, config: Config) -> LogprobHead:
    """Give `model` a `LogprobHead`. Raises UserError for a family that changes its logits afterwards."""
    for name, harmless in LOGIT_CHANGES.items():
        value = getattr(model.config, name, harmless)
        if value not in (harmless, None):
            raise UserError(
                f"model.path: the model's config has {name}={value}, which changes logits behind the vocabulary "
                "projection; models of this family are not supported"
            )
    return LogprobHead(model.get_output_embeddings(), float32_head=config.model.float32_head)


def refuse_missing(where: str, names: Sequence[str]) -> None:
    """Raises UserError when a folder lacks weights of its model: transformers fills them with random numbers and a
    warning."""
    if names:
        shown = ", ".join(sorted(names)[:4])
        raise UserError(
            f"{where} lacks {len(names)} of the model's weights: {shown}{', ...' if len(names) > 4 else ''}"
        )


def attention_of(config: Config) -> str:
    """Return transformers' name of the attention that `model.attention` stands for in this process."""
    if config.model.attention != "auto":
        return config.model.attention
    if config.on_gpu and config.model.dtype == "bfloat16":
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


def load_policy(config: Config) -> Any:
    """The model of `model.path`, as a causal language model of transformers.

    Raises UserError when the folder lacks weights that the model has.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        dtype=torch_dtype(config.model.dtype),
        attn_implementation=attention_of(config),
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    refuse_missing(f"model.path={config.model.path}", report["missing_keys"])
    refuse_dropout(model.config, "model.path")
    return model


def load_critic(config: Config) -> Any:
    """The value model of `critic.path`; a backbone without a head gets one of zeros: every value starts as 0.

    Raises UserError when the folder lacks weights of the backbone.
    """
    path = config.critic.path or config.model.path
    settings = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    settings.num_labels = 1
    settings.classifier_dropout = 0.0
    critic, report = AutoModelForTokenClassification.from_pretrained(
        path,
        config=settings,
        dtype=torch_dtype(config.model.dtype),
        attn_implementation=attention_of(config),
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    backbone = f"{critic.base_model_prefix}."
    missing = set(report["missing_keys"])
    refuse_missing(f"critic.path={path}", sorted(name for name in missing if name.startswith(backbone)))
    refuse_dropout(critic.config, "critic.path")
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if name in missing:
                parameter.zero_()
    return critic


def refuse_dropout(config: Any, option: str) -> None:
    """Dropout would make a model's numbers differ from one pass to the next, and from the sampler's.

    Raises UserError naming the model's setting.
    """
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float) and value > 0:
            raise UserError(f"{option}: the model's config has {name}={value}; train with dropout 0 (set it to 0.0)")
