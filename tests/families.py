"""Tiny random models of every causal language model that vLLM and transformers share, each made so that its features
count: a window is shorter than a row, a cap is as low as the logits are high, a scale is far from 1."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WINDOW = 4
"""Tokens; the rows of the tests have up to 11."""

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "n_embd": 64, "intermediate_size": 128, "n_inner": 128, "ffn_dim": 128,
    "word_embed_proj_dim": 64, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2, "n_head": 2,
    "num_key_value_heads": 1, "head_dim": 32, "rotary_dim": 16, "max_position_embeddings": 64, "n_positions": 64,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2, "sliding_window": WINDOW,
    "partial_rotary_factor": 0.5,
    # no dropout
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
    "num_shared_experts": 1, "topk_group": 1, "first_k_dense_replace": 1, "decoder_sparse_step": 1,
    # compressed attention
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "query_pre_attn_scalar": 32,
    # states instead of attention
    "state_size": 16, "mamba_d_state": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
"""What a config class has of these, it gets."""

TOLERANCE = 1e-4
"""How far logprobs of sampler and learner may be apart, in float32; runs without a mistake are apart by 1e-5."""

OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "num_hidden_layers": 4},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 2.0, "num_hidden_layers": 6},
    "granite": {
        "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
    },
    "vaultgemma": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5},
    "smollm3": {"num_hidden_layers": 4},
}  # fmt: skip

OFF: dict[str, Any] = {
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0,
    "sliding_window": 60,
}  # fmt: skip
"""Features and the values that switch them off, where a family has them."""


def settings_of(family: str, vocabulary: int, **changes: Any) -> Any:
    """The config of a tiny model of `family`, a model type of transformers."""
    cls = CONFIG_MAPPING[family]
    shape = {field.name: SHAPE[field.name] for field in dataclasses.fields(cls) if field.name in SHAPE}
    return cls(**{**shape, **OWN.get(family, {}), "vocab_size": vocabulary, "dtype": "float32", **changes})


def build(settings: Any, attention: str = "sdpa") -> Any:
    """A model with random weights, the same for the same shape."""
    torch.manual_seed(len(settings.model_type))
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases start at 0 and norms at 1; trained models' do not
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def save(family: str, folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """Write a tiny model of `family` as a folder."""
    build(settings_of(family, len(tokenizer), **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
