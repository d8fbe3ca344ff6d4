"""Tiny random models of all causal language models that vLLM and transformers share.

Their sizes are chosen so that each feature has an effect: a window is shorter than a row, a cap is as low as the
logits, and a scale differs clearly from 1.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SHARED = """
    afmoe apertus arcee axk1 bloom cohere cohere2 cohere2_moe cwm dbrx deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba
    flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified
    glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj
    granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text jais2 jamba kimi_linear
    laguna lfm2 lfm2_moe llama llama4 llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash
    minicpm3 minimax_m2 ministral3 mistral mixtral nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid
    olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
    qwen3_moe qwen3_next qwen4_exp qwen4_exp_text seed_oss smollm3 stablelm starcoder2 vaultgemma
    zamba2
""".split()  # noqa: SIM905
"""Their model types. A test compares them with the installed packages."""

LARGEST = 5_000_000
"""Maximum number of parameters of a tiny model."""

WINDOW = 4
"""Sliding window in tokens. The rows of the tests have up to 11."""

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
    "ffn_hidden_size": 128, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "num_layers": 2, "moe_topk": 2,
    # compressed attention
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "query_pre_attn_scalar": 32,
    # states instead of attention
    "state_size": 16, "mamba_d_state": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    # Gemma 3n and 4
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8,
}  # fmt: skip
"""Settings that are applied to each config class that has them."""

TOLERANCE = 1e-4
"""Allowed difference between logprobs of sampler and learner in float32. Correct runs differ by 1e-5."""

OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "num_hidden_layers": 4, "sliding_window": 60},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.4,
    },
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 2.0, "num_hidden_layers": 6},
    "granite": {
        "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
    },
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "falcon": {"ffn_hidden_size": 256},
    "lfm2": {
        "num_hidden_layers": 4, "conv_dim": 64, "block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
    },
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "gemma4_text": {"num_experts": None},
    "hyperclovax": {"logits_scaling": 0.25},
    "vaultgemma": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5},
    "cwm": {"bos_token_id": 1},
    "exaone4": {"num_hidden_layers": 4},
    "glm4_moe": {"head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "smollm3": {"num_hidden_layers": 4},
}  # fmt: skip

OFF: dict[str, Any] = {
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0,
    "sliding_window": 60,
}  # fmt: skip
"""Features of some families, with the values that disable them."""


def settings_of(family: str, vocabulary: int, **changes: Any) -> Any:
    """Return the config of a tiny model of `family`, a model type of transformers."""
    cls = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(cls)}
    shape = {name: value for name, value in SHAPE.items() if name in fields}
    vocabularies = dict.fromkeys(fields & {"vocab_size", "vocab_size_per_layer_input"}, vocabulary)
    return cls(**{**shape, **OWN.get(family, {}), **vocabularies, "dtype": "float32", **changes})


class Unmade(Exception):
    """No tiny model of a family can be created. The message is the reason."""


def build(settings: Any, attention: str = "sdpa") -> Any:
    """Return a model with random weights, identical for the same settings."""
    torch.manual_seed(len(settings.model_type))
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases are initialized to 0 and norms to 1, from which those of trained models differ
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def save(family: str, folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """Write a tiny model of `family` to `folder`. Raises Unmade."""
    try:
        settings = settings_of(family, len(tokenizer), **changes)
        with torch.device("meta"):
            paper = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    except Exception as error:
        raise Unmade(f"transformers does not take the sizes: {error}") from error
    if settings.get_text_config() is not settings:
        raise Unmade("it has parts besides text, and its text part is a family of its own")
    if sum(p.numel() for p in paper.parameters()) > LARGEST:
        raise Unmade("some of its sizes are other settings than those of the table")
    build(settings, "eager").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
