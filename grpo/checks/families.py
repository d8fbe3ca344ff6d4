"""Model families by transformers' model type: those that tests train, and those that are refused, with the reason.

Other families are accepted here: vLLM is queried for support, the learner's models are loaded without weights, and the
first weight sync proves that sampler and learner compute the same. docs/families.md documents this table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.config import Config
from grpo.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TRAINED = frozenset(
    {
        "cohere", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3",
        "qwen3_moe",
    }
)  # fmt: skip
"""Families of which tests/integration/test_family_runs.py trains a tiny model for two steps. The logprobs of sampler
and learner differ only by rounding."""

BFLOAT16_ON_CPU = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Families whose linear attention vLLM computes on CPU only in bfloat16."""

WINDOW_PLUS_ONE = frozenset({"cohere2", "cohere2_moe"})
"""Families whose sliding window is one token longer in vLLM than in transformers."""

REFUSED_ON_CPU: dict[str, str] = {
    "bloom": "vLLM and transformers compute different logprobs",
    "deepseek_v2": "vLLM's compressed attention cannot load new weights",
    "ernie4_5_moe": "after a weight sync, vLLM samples from a distribution that differs from the learner's",
    "falcon_mamba": "vLLM computes its states on GPUs only",
    "gemma3n_text": "vLLM and transformers compute different logprobs",
    "gpt_oss": "vLLM reloads its experts differently from the first load, and would use the old ones after a step",
    "hrm_text": "vLLM cannot load new weights of its fused projections",
    "jamba": "vLLM computes its states on GPUs only",
    "laguna": "vLLM's router on CPU does not compute what this family requires",
    "lfm2": "vLLM and transformers compute different logprobs",
    "llama4_text": "vLLM's experts on CPU cannot weight their inputs",
    "mamba": "vLLM computes its states on GPUs only",
    "mellum": "vLLM does not report which of its router's weights a sync has filled",
    "olmo_hybrid": "vLLM's linear attention for this family needs Triton",
}
"""Family -> reason, as the end of a sentence. Each was tried with a tiny random model on CPU. None was tried on GPUs;
there the first weight sync decides."""


CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Elements of an attention head that vLLM computes on CPU."""


def refuse(config: Config, settings: PreTrainedConfig) -> None:
    """Raise UserError if training the model's family is known to fail. `settings`: the model's config.json."""
    own = settings.get_text_config()
    where = f"model.path: models whose config.json has model_type={own.model_type} cannot be trained"
    if own.model_type in REFUSED_ON_CPU and not config.on_gpu:
        raise UserError(f"{where} on CPU: {REFUSED_ON_CPU[own.model_type]}")
    if own.model_type in BFLOAT16_ON_CPU and not config.on_gpu and config.model.dtype != "bfloat16":
        raise UserError(f"{where} in {config.model.dtype} on CPU; nearest: model.dtype=bfloat16")
    other_sizes = head_sizes(own) - {*CPU_HEAD_SIZES}
    if other_sizes and not config.on_gpu:
        size = min(other_sizes)
        near = min(CPU_HEAD_SIZES, key=lambda known: abs(known - size))
        raise UserError(
            f"model.path: its attention heads have {size} elements, and vLLM computes only those of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))} on CPU; nearest: {near} (config.json's head_dim, or hidden_size / "
            "num_attention_heads)"
        )
    window = getattr(own, "sliding_window", None) if own.model_type in WINDOW_PLUS_ONE else None
    if window is not None and config.max_row_tokens > window:
        raise UserError(
            f"{where} on rows longer than config.json's sliding_window={window}, which vLLM makes a token longer than "
            f"transformers does; data.max_prompt_tokens + max_tokens are {config.max_row_tokens}, nearest: {window}"
        )


def head_sizes(own: PreTrainedConfig) -> set[int]:
    """Return the numbers of elements of an attention head, over all layers; none for a model without heads, or with
    compressed keys."""
    # transformers refuses to read from the whole model what its layers have each for themselves
    layers = [*own.per_layer_config] if own.is_heterogeneous else [own]
    return {size for layer in layers if (size := _head_size(layer)) is not None}


def _head_size(layer: PreTrainedConfig) -> int | None:
    heads = getattr(layer, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or getattr(layer, "kv_lora_rank", None):
        return None
    size = getattr(layer, "head_dim", None) or getattr(layer, "hidden_size", 0) // heads
    return size if isinstance(size, int) and size > 0 else None
