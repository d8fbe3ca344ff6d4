"""`grpo plan`: parameters against transformers, bytes by hand and against torch, hours against published runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from documented import RECIPES, ROOT

from benchmarks import recipe_hours, tiny_families
from grpo.commands.cli import main
from grpo.config import Config, load
from grpo.planning.estimate import (
    REST,
    Estimate,
    Lengths,
    estimate,
    exchange_bytes,
    pass_seconds,
    sampling_seconds,
)  # fmt: skip
from grpo.planning.memory import (
    Parts,
    activation_bytes,
    head_bytes,
    layer_bytes,
    learner_memory,
    model_states,
    sampler_memory,
)
from grpo.planning.report import LEARNING, changes, in_flight, layouts, quicker
from grpo.planning.shapes import GPUS, Shape, gpu_of, known_as, model_inside, shape_of, split_problems
from grpo.types import UserError

SMALL = Shape(
    vocab=100, hidden=8, intermediate=20, layers=2, heads=4, kv_heads=2, head_dim=4, body=1768, embedding=800, head=800,
    kv_head=128,
)  # fmt: skip
"""A layer: 8 x 16 queries, 8 x 8 keys, 8 x 8 values, 16 x 8 back; 3 x 8 x 20; two norms of 8. In each
of two layers, 8 x 4 for the keys of a head and as many for its values."""


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers(family: str, tied: bool, make_model: Callable[..., Path]) -> None:
    folder = make_model(family, tie_word_embeddings=tied, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    shape = shape_of(str(folder))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    lookups = model.get_input_embeddings().weight.numel()
    assert shape.multiplied == shape.parameters - (0 if tied else lookups)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-Math-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("allenai/Llama-3.1-Tulu-3-8B-DPO", 8_030_261_248 + 2 * 8 * 4096),  # eight more tokens, untied
    ],
)
def test_known_models_have_the_parameters_of_their_weights_on_the_hub(name: str, parameters: int) -> None:
    assert shape_of(name).parameters == parameters


def write_config(folder: Path, **settings: Any) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def test_a_small_model_of_the_hub_in_its_folder(tmp_path: Path) -> None:
    """SmolLM2-135M: 134,515,008 parameters on the hub, of which the tied embedding has 49,152 x 576."""
    shape = shape_of(write_config(
        tmp_path, model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ))  # fmt: skip
    assert (shape.parameters, shape.embedding, shape.head) == (134_515_008, 28_311_552, 0)
    assert shape.multiplied == shape.parameters  # the embedding is the projection, too


GEMMA2 = {
    "model_type": "gemma2", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip


def test_other_families_by_hand(tmp_path: Path) -> None:
    """Gemma 2 has heads of their own width and four norms in a layer; attention_bias adds one to each of four
    projections."""
    shape = shape_of(write_config(tmp_path, **GEMMA2))
    layer = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 20 + 4 * 16
    assert (shape.body, shape.embedding, shape.head, shape.head_dim) == (2 * layer + 16, 1600, 0, 8)
    assert (shape.queries, shape.keys, shape.kv_head) == (32, 16, 2 * 2 * 16 * 8)
    assert shape.over(4).parameters - shape.parameters == 2 * (2 * 2 * 16 * 8)
    biased = shape_of(write_config(tmp_path, **GEMMA2, attention_bias=True))
    assert biased.body - shape.body == 2 * (32 + 16 + 16 + 16)
    # untied: the projection is counted once more, and the embedding is a lookup
    untied = shape_of(write_config(tmp_path, **(GEMMA2 | {"tie_word_embeddings": False})))
    assert (untied.head, untied.parameters) == (1600, shape.parameters + 1600)
    assert untied.multiplied == shape.multiplied == shape.body + 1600


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",  # experts
        "minicpm3",  # compressed keys and values
        "zamba2",  # states
        "gpt_neox",  # keys and values of all heads: there are no num_key_value_heads to count them by
    ],
)
def test_models_for_which_the_formulas_do_not_hold(family: str, tmp_path: Path) -> None:
    settings = tiny_families.settings_of(family, 100)
    settings.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"model_type={family} is not planned: a plan is for text models with dense"):
        shape_of(str(tmp_path))


def test_a_model_without_attention_is_not_planned(tmp_path: Path) -> None:
    tiny_families.settings_of("mamba", 100).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks num_attention_heads"):
        shape_of(str(tmp_path))


def test_a_config_that_transformers_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_type=vit is not planned: transformers does not build it: .*ViTConfig"):
        shape_of(write_config(tmp_path, **(GEMMA2 | {"model_type": "vit"})))
    with pytest.raises(UserError, match="model_type=qwen22 is not planned: transformers has no such model; nearest: q"):
        shape_of(write_config(tmp_path, **(GEMMA2 | {"model_type": "qwen22"})))


def test_a_small_shape_by_hand() -> None:
    layer = 8 * 16 + 8 * 8 + 8 * 8 + 16 * 8 + 3 * 8 * 20 + 2 * 8
    assert SMALL.parameters == 2 * layer + 8 + 2 * 800
    assert SMALL.kv_bytes(2) == 2 * 2 * 8 * 2  # keys and values x layers x two heads of 4 x bytes


def test_what_cannot_be_planned_is_said(make_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=models/Qwen2\.5-Math-7B-32k.*model\.path=Qwen/Qwen2\.5-Math-7B"):
        shape_of("models/Qwen2.5-Math-7B-32k")
    settings = json.loads((make_model("qwen2") / "config.json").read_text())
    for change, words in (
        ({"model_type": "mixtral"}, "model_type=mixtral is not planned"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not planned: weights are counted"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=words):
            shape_of(str(tmp_path))
    del settings["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="lacks hidden_size"):
        shape_of(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", '"a"', "null", "3"])
def test_a_config_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        shape_of(str(tmp_path))
    assert str(raised.value) == f"{file} must hold a mapping, as save_pretrained writes it, not {text}"


SIZES = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be a whole number, at least 1"),
        ({"hidden_size": "256"}, 'hidden_size="256" must be a whole number, at least 1'),
        ({"hidden_size": -256}, "hidden_size=-256 must be a whole number, at least 1"),
        ({"intermediate_size": [20]}, "intermediate_size=[20] must be a whole number, at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers=true must be a whole number, at least 1"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 must be a whole number, at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number, at least 1"),
        ({"num_attention_heads": None}, "num_attention_heads=null must be a whole number, at least 1"),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2 must be a whole number, at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number, at least 1"),
        ({"head_dim": 0}, "head_dim=0 must be a whole number, at least 1"),
        ({"num_attention_heads": 6}, "num_attention_heads=6 must divide hidden_size=16: there is no head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        (
            {"model_type": ["llama"]},
            "model_type=['llama'] is not planned: transformers has no such model; nearest: llama",
        ),
    ],
)
def test_sizes_that_no_model_has(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SIZES | change))
    with pytest.raises(UserError) as raised:
        shape_of(str(tmp_path))
    assert str(raised.value) == f"{file}: {said}"


def test_sizes_that_may_be_left_out(tmp_path: Path) -> None:
    for change, (kv_heads, head_dim) in (
        ({}, (2, 4)),
        ({"num_key_value_heads": None, "head_dim": None}, (4, 4)),
        ({"num_attention_heads": 6, "head_dim": 8, "model_type": "qwen3"}, (2, 8)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(SIZES | change))
        shape = shape_of(str(tmp_path))
        assert (shape.kv_heads, shape.head_dim) == (kv_heads, head_dim)


# Of 1000 parameters, four ranks. bfloat16: 2 weights; gradients 2 + 4 whole at stage 1, 4 sharded above; 4 + 4 + 4
# optimizer, sharded. float32 at stage 0: 4, 4 and 8 whole, no master copy.
@pytest.mark.parametrize(
    ("stage", "width", "weights", "gradients", "optimizer"),
    [
        (0, 4, 4000, 4000, 8000),
        (1, 4, 4000, 4000, 3000),
        (1, 2, 2000, 6000, 3000),
        (2, 2, 2000, 1000, 3000),
        (3, 2, 500, 1000, 3000),
    ],
)
def test_zero_by_hand(stage: int, width: int, weights: float, gradients: float, optimizer: float) -> None:
    device, host = model_states(1000, stage=stage, ranks=4, width=width)
    assert [device[name] for name in ("weights", "gradients", "optimizer")] == [weights, gradients, optimizer]
    assert not host


def test_offload_by_hand() -> None:
    """ZeRO 3 on four ranks with parameters in host memory: 500 of weights, 1000 of gradients, 3000 of optimizer."""
    device, host = model_states(1000, stage=3, ranks=4, width=2, offload="parameters")
    assert host == {"optimizer": 4000, "weights": 500}
    assert device == {"reduce bucket": 1e9, "gathered weights": 2000}
    device, host = model_states(1000, stage=2, ranks=4, width=2, moments=0, offload="optimizer")
    assert host == {"optimizer": 2000}
    assert device == {"weights": 2000, "reduce bucket": 1e9}


def kept_by_torch(folder: Path, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that autograd keeps in the layers of a forward of `tokens`, each storage once, without the weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() >= tokens * 64:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.ones(1, tokens, dtype=torch.int64), use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_activations_are_what_torch_keeps(dtype: str, family: str, make_model: Callable[..., Path]) -> None:
    """The difference of four layers and two, so that neither embedding nor head counts."""
    width, tokens = {"float32": 4, "bfloat16": 2}[dtype], 128
    found = []
    for layers in (2, 4):
        folder = make_model(
            family, num_hidden_layers=layers, hidden_size=256, intermediate_size=512, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256,
        )  # fmt: skip
        found.append(kept_by_torch(folder, getattr(torch, dtype), tokens))
    expected = 2 * tokens * layer_bytes(shape_of(str(folder)), width)
    assert (found[1] - found[0]) == pytest.approx(expected, rel=0.03)


def test_checkpointing_keeps_a_row_of_hidden_a_layer_and_one_layer_whole() -> None:
    """2 layers x 8 x 2 bytes, one layer, and 8 x (4 + 2 x 2) of the last norm, for ten tokens. A layer: two norms of 8
    x (4 + 2 x 2); 2 x (16 + 8) x 2 of attention; 4 x 20 x 2."""
    layer = 128 + 96 + 160
    assert layer_bytes(SMALL, 2) == layer
    assert activation_bytes(SMALL, 10, 2, checkpointing=True) == 10 * (2 * 16 + layer + 64)
    assert activation_bytes(SMALL, 10, 2, checkpointing=False) == 10 * (2 * layer + 64)


def test_logits_by_hand() -> None:
    """Ten tokens of a vocabulary of 100 in bfloat16, all in one chunk: forward 1000 x 8 bytes; backward 1000 x (4 + 2),
    the projection's gradient 800 x (4 + 2) and that of the hidden states 10 x 8 x 2."""
    assert head_bytes(SMALL, 10, 2, float32_head=False, entropy=False) == 6000 + 4800 + 160
    assert head_bytes(SMALL, 10, 2, float32_head=False, entropy=True) == 10_000 + 4800 + 160
    wide = head_bytes(SMALL, 10, 2, float32_head=True, entropy=False)
    assert wide == 8000 + 3200  # a forward: its chunk, and the float32 copy of the projection beside it
    assert head_bytes(SMALL, 10**7, 4, float32_head=False, entropy=False) < 6e8 + 10**7 * 8 * 4 + 3200


def test_seconds_by_hand() -> None:
    """A GPU of 1e6 flops and 1e6 bytes a second. Forward of four rows of 5 + 15 tokens on two ranks, at 0.3 of
    the peak: 40 tokens a rank of 2 x 1768 (two layers of 880 and a norm of 8) + 2 x 2 layers x 16 x 20 flops, and of
    these 30 that are projected to the vocabulary, 2 x 800."""
    gpu = dataclasses.replace(GPUS["h100"], flops=1e6, bandwidth=1e6)
    lengths = Lengths(prompt=10, completion=10, longest=30)
    multiplied = SMALL.parameters - 800
    one = ((3536 + 1280) * 40 + 1600 * 30) / 0.3e6
    uneven = Lengths(prompt=5, completion=15, longest=30)
    assert pass_seconds(SMALL, gpu, uneven, rows=4, ranks=2, passes=3) == pytest.approx(3 * one)
    # eight completions, four at once: 8 x 10 / 4 + 30 - 10 = 40 steps, each reading the weights, each token 15 others
    steps, read = 40, 40 * 2 * multiplied + 80 * 15 * 64
    expected = steps * 5e-3 + max(read / 0.6e6, 2 * multiplied * 80 / 0.3e6) + 2 * multiplied * 2 * 10 / 0.3e6
    given = {"completions": 8, "prompts": 2, "max_num_seqs": 4}
    assert sampling_seconds(SMALL, gpu, lengths, kv=1e9, **given) == pytest.approx(expected)
    # a KV cache of two rows of 15 tokens x 64 bytes: two at once, 60 steps
    slower = sampling_seconds(SMALL, gpu, lengths, kv=2 * 15 * 64, **given)
    assert slower - expected >= 20 * 5e-3


def test_exchange_by_hand() -> None:
    """Four ranks: three quarters of each. ZeRO 3 gathers the weights twice and reduces once, a microbatch."""
    p = SMALL.parameters * 0.75
    how = {"ranks": 4, "width": 2, "microbatches": 5, "updates": 2}
    assert exchange_bytes(SMALL, stage=3, **how) == p * 3 * 2 * 5
    assert exchange_bytes(SMALL, stage=2, **how) == p * (2 * 5 + 2 * 2)
    assert exchange_bytes(SMALL, stage=1, **how) == p * (2 * 4 * 2 + 2 * 2)
    assert exchange_bytes(SMALL, stage=1, **(how | {"ranks": 1})) == 0


def config_of(name: str, *overrides: str) -> Config:
    model = recipe_hours.ASSUMED[name].model
    return load(RECIPES[name], [*overrides, *([f"model.path={model}"] if model else [])])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_gpus_on_paper(name: str) -> None:
    config, (count, gpu) = config_of(name), recipe_hours.gpus_of(RECIPES[name])
    assumed = recipe_hours.ASSUMED[name]
    lengths = Lengths(prompt=assumed.prompt, completion=assumed.completion, longest=config.sampling.max_tokens)
    shape = shape_of(config.model.path)
    found = estimate(config, shape, GPUS[recipe_hours.NAMES[gpu]], lengths, nodes=-(-count // 8), gpus_per_node=8)
    assert found.problems == ()
    assert found.gpus == count
    assert 0.1 < found.hours < 500


APART = (
    "cluster.layout=disaggregated", "cluster.samplers=4", "cluster.learner_ranks=4",
    "sampler.gpu_memory_utilization=0.9",
)  # fmt: skip
"""Another layout for the recipes on eight GPUs."""


def total(parts: Parts) -> float:
    return sum(parts.values())


def test_memory_grows_with_tokens_and_falls_with_the_stage() -> None:
    shape = shape_of("Qwen/Qwen2.5-Math-7B")

    def taken(*overrides: str) -> float:
        return total(learner_memory(config_of("math_drgrpo_7b", *APART, *overrides), shape)[0])

    assert taken() < taken("learner.tokens_per_microbatch=32768") < taken("learner.tokens_per_microbatch=65536")
    assert taken() < taken("learner.gradient_checkpointing=false")
    stages = [taken(f"learner.zero_stage={stage}", "cluster.learner_ranks=8") for stage in (3, 2, 1)]
    assert stages == sorted(stages)
    assert taken("learner.offload=optimizer") < taken()
    with_reference = taken("algorithm.kl_coef=0.001")
    assert with_reference - taken() == pytest.approx(2 * shape.parameters)
    assert taken("algorithm.kl_coef=0.001", "learner.reference_offload=true") == taken()
    assert taken("algorithm.advantage=gae") > 1.5 * taken()


def test_a_kv_cache_takes_what_its_share_leaves() -> None:
    config, shape = config_of("math_drgrpo_7b"), shape_of("Qwen/Qwen2.5-Math-7B")
    parts = sampler_memory(config, shape, 80e9)
    assert total(parts) - parts["transfer"] == pytest.approx(0.8 * 80e9)
    fixed = sampler_memory(config_of("math_drgrpo_7b", "sampler.kv_cache_gib=3"), shape, 80e9)
    assert fixed["KV cache"] == 3 * 2**30
    assert sampler_memory(config, shape, 10e9)["KV cache"] == 0


# The settings are the sources' own; what they do not give is assumed. Constants are the plan's, for all alike.


@pytest.mark.parametrize(
    ("run", "published"),
    [
        # understand-r1-zero, README and examples/qwen2.5-math-7b.sh: 8 A100 that sample and train in turn, 128 prompts
        # x 8, checkpointing, 1560 greedy completions every 16 steps, vLLM with 35 % of the memory. Assumed: 500 steps
        # (a reader in its issue 19), completions of 900 tokens, a pass of old logprobs.
        (("Qwen/Qwen2.5-Math-7B", "a100-80", 8, 1024, 5, 500, (900, 3000), 0.35 * 80e9 - 15.2e9, 32, 1560), 27),
        # simpleRL-reason, train_grpo_math_tune_ray.sh and README: 16 H100 in turn, 1024 prompts x 8, four minibatches,
        # a reference, evaluation every 5 steps. Assumed: completions of 1000 tokens, checkpointing.
        (("Qwen/Qwen2.5-7B", "h100", 16, 8192, 6, 100, (1000, 8192), 30e9, 21, 3766), 15),
    ],
)
def test_published_hours(run: tuple[Any, ...], published: float) -> None:
    """`run`: model, GPU and how many, rollouts and passes of a step, steps, lengths, KV cache, evaluations and the
    completions of each."""
    model, gpu_name, gpus, rows, passes, steps, (completion, longest), kv, evaluations, evaluated = run
    shape, gpu = shape_of(model), GPUS[gpu_name]
    lengths = Lengths(prompt=120, completion=completion, longest=longest)

    def sampling(completions: float, prompts: float) -> float:
        return sampling_seconds(
            shape, gpu, lengths, completions=completions / gpus, prompts=prompts / gpus, kv=kv, max_num_seqs=256
        )

    step = sampling(rows, rows / 8) + pass_seconds(shape, gpu, lengths, rows=rows, ranks=gpus, passes=passes)
    hours = REST * (steps * step + evaluations * sampling(evaluated, evaluated)) / 3600
    print(f"{model}: {hours:.1f} h, published {published}")
    assert published / 1.5 < hours < published * 1.5


def test_published_minutes_of_areal() -> None:
    """AReaL examples/math/gsm8k_grpo.yaml and README.md: about 35 minutes on 8 H800, of which 4 sample without a pause
    while 4 train (staleness 2): 256 prompts x 4, up to 1024 tokens, checkpointing, old logprobs; 10 epochs of 7473 rows
    are 290 steps. Assumed: completions of 250 tokens."""
    shape, gpu = shape_of("Qwen/Qwen2.5-1.5B"), GPUS["h800"]
    lengths = Lengths(prompt=120, completion=250, longest=250)  # without a pause, none is decoded alone
    sampling = sampling_seconds(shape, gpu, lengths, completions=256, prompts=64, kv=60e9, max_num_seqs=256)
    learning = pass_seconds(shape, gpu, lengths, rows=1024, ranks=4, passes=5)
    minutes = REST * 290 * max(sampling, learning) / 60
    assert 35 / 1.5 < minutes < 35 * 1.5


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "math_drgrpo_7b.yaml")
    arguments = ["plan", recipe, "--gpu", "a100-80", "--completion-tokens", "900"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for words in ("8 of 1 x 8 a100-80", "7.62 B parameters", "completions of 900", "500 steps: 26 hours", "fits "):
        assert words in out, words
    assert main([*arguments, *APART]) == 0  # as docs/scale.md gives it
    assert "500 steps: 44 hours" in capsys.readouterr().out
    assert main(["plan", recipe, "--gpu", "h100", "--nodes", "2", *APART, "cluster.samplers=16"]) == 2
    assert "20 GPUs are asked for and there are 16" in capsys.readouterr().out
    assert main(["plan", recipe, "--gpu", "a100-40", *APART]) == 2
    out = capsys.readouterr().out
    assert "a learner rank takes" in out
    assert "learner.zero_stage=3, learner.offload=optimizer" in out
    for arguments, words in (
        (["--gpu", "a100"], "did you mean a100-40 or a100-80?"),
        (["--gpu", "h100", "--nodes", "0"], "--nodes must be at least 1, not 0"),
        (["--gpu", "h100", "--completion-tokens", "4000"], "between 1 and sampling.max_tokens=3000"),
        (["--gpu", "h100", "model.path=Qwen/Qwen3-9B"], "model.path=Qwen/Qwen3-9B: no folder"),
    ):
        assert main(["plan", recipe, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["plan", str(ROOT / "recipes" / "arithmetic_cpu.yaml"), "--gpu", "h100"]) == 2
    assert "runs on CPUs" in capsys.readouterr().err


def test_a_step_has_the_parts_that_the_options_ask_for() -> None:
    shape, lengths = shape_of("Qwen/Qwen2.5-Math-7B"), Lengths(prompt=120, completion=900, longest=3000)

    def seconds(*overrides: str, rounds: float = 1) -> Parts:
        config = config_of("math_drgrpo_7b", *APART, *overrides)
        plan = estimate(config, shape, GPUS["a100-80"], lengths, nodes=1, gpus_per_node=8, rounds=rounds)
        assert plan.hours == pytest.approx(config.run.steps * sum(plan.seconds.values()) / 3600)
        return plan.seconds

    plain = seconds()
    one_pass = plain["old logprobs"]  # eight minibatches
    assert plain["update"] == pytest.approx(4 * one_pass)  # forward, backward and the forward again of checkpointing
    assert plain["reference"] == plain["values"] == plain["host optimizer"] == 0
    assert plain["rest"] == pytest.approx(0.2 * (sum(plain.values()) - plain["rest"]))
    assert plain["sync"] == pytest.approx(2 * shape.parameters / (0.7 * 300e9))
    assert seconds("algorithm.minibatches_per_step=1")["old logprobs"] == 0
    assert seconds("algorithm.kl_coef=0.01")["reference"] == pytest.approx(one_pass)
    assert seconds("algorithm.advantage=gae")["update"] == pytest.approx(8 * one_pass)
    assert seconds("algorithm.epochs_per_step=2")["update"] == pytest.approx(8 * one_pass)
    assert seconds(rounds=2)["sampling"] == pytest.approx(2 * plain["sampling"])
    assert seconds("sampler.enforce_eager=true")["sampling"] > plain["sampling"] + 2100 * 28 * 0.5e-3
    # twice 12 P / 4 in host memory and 4 P / 4 of gradients, eight times, at 50e9 a second
    offloaded = seconds("learner.offload=optimizer")["host optimizer"]
    assert offloaded == pytest.approx(8 * 2 * 4 * shape.parameters / 50e9)
    assert seconds("cluster.learner_ranks=5")["sync"] == pytest.approx(2 * shape.parameters / (0.7 * 25e9))  # nine GPUs


def test_one_gpu_that_both_share_and_a_cache_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES["gsm8k_qwen2.5_0.5b"])
    assert main(["plan", recipe, "--gpu", "h100"]) == 0
    assert "1 samplers, 1 learner ranks, colocated" in capsys.readouterr().out
    assert main(["plan", recipe, "--gpu", "h100", "sampler.gpu_memory_utilization=0.9"]) == 2
    assert "with its sampler: change, in this order, learner.gradient_checkpointing=true" in capsys.readouterr().out
    # in turns each has it whole, and 0.5 B parameters of 14 bytes cross to host memory and back
    assert main(["plan", recipe, "--gpu", "h100", "sampler.gpu_memory_utilization=0.9", "cluster.sleep=true"]) == 0
    assert "colocated, in turns" in capsys.readouterr().out
    alone = ["cluster.samplers=64", "cluster.tensor_parallel=1"]  # 65 GB of weights on one GPU
    assert main(["plan", str(RECIPES["dapo_32b"]), "--gpu", "h100", "--nodes", "16", *alone]) == 2
    assert "a sampler's KV cache has" in capsys.readouterr().out


COLOCATED = ("cluster.layout=colocated", "cluster.samplers=8", "cluster.learner_ranks=8")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("math_drgrpo_7b", ()),
        ("math_drgrpo_7b", COLOCATED),
        ("math_drgrpo_7b", (*COLOCATED, "cluster.sleep=false")),
        ("math_drgrpo_7b", (*COLOCATED, "cluster.sleep=false", "learner.zero_stage=3")),
        ("math_drgrpo_7b", ("learner.tokens_per_microbatch=4024",)),  # the longest row of an evaluation
        ("math_drgrpo_7b", ("learner.tokens_per_microbatch=4025",)),
        ("gsm8k_qwen2.5_7b", ()),
        ("dapo_32b", ()),
        ("gsm8k_qwen2.5_0.5b", ("model.dtype=float32", "learner.zero_stage=0", "cluster.sleep=false")),
    ],
)
def test_each_option_that_a_plan_names_is_taken_by_the_command(name: str, overrides: tuple[str, ...]) -> None:
    """In the order in which they are named, each with those before."""
    config, small = config_of(name, *overrides), dataclasses.replace(GPUS["a100-40"], memory=2e9)
    lengths = Lengths(prompt=9, completion=9, longest=9)
    plan = estimate(config, shape_of(config.model.path), small, lengths, nodes=16, gpus_per_node=8)
    [problem] = [each for each in plan.problems if "a learner rank takes" in each]
    options = [option for option in problem.partition("in this order, ")[2].split(", ") if "=" in option]
    assert options
    for count in range(1, len(options) + 1):
        assert config_of(name, *overrides, *options[:count]) != config_of(name, *overrides, *options[: count - 1])


def test_the_options_that_a_plan_names_are_those_that_the_sampler_looks_at(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM does not look at its share of the memory where the KV cache is given."""
    recipe = str(RECIPES["gsm8k_qwen2.5_0.5b"])
    for cache, said in (
        ("100", "a sampler takes 110.1 GB of 80: lower sampler.kv_cache_gib=100"),  # 107.4, 1.0, 0.3, 0.6, 0.8
        ("0.01", "tokens takes 0.0: raise sampler.kv_cache_gib=0.01, or lower sampling.max_tokens="),
    ):
        assert main(["plan", recipe, "--gpu", "h100", "cluster.sleep=true", f"sampler.kv_cache_gib={cache}"]) == 2
        out = capsys.readouterr().out
        assert said in out
        assert "gpu_memory_utilization" not in out
    both = ["sampler.kv_cache_gib=100", "cluster.sleep=false"]
    assert main(["plan", recipe, "--gpu", "h100", *both]) == 2
    assert "cluster.sleep=true, a lower sampler.kv_cache_gib, more cluster.learner_ranks and" in capsys.readouterr().out


def test_in_turns_host_memory_has_the_states_and_the_weights_that_are_set_aside() -> None:
    """0.49 B parameters in bfloat16 on one rank at ZeRO 2: 2 of weights, 4 of gradients, 12 of the optimizer, and 2 of
    the sampler's weights; 2 more of a reference. Pinned buffers are rounded up by 1.46 GB (test_planned_memory.py)."""
    lengths = Lengths(prompt=9, completion=9, longest=9)

    def host(*overrides: str) -> Parts:
        config = config_of("gsm8k_qwen2.5_0.5b", "learner.zero_stage=2", "algorithm.kl_coef=0", *overrides)
        return estimate(config, shape_of(config.model.path), GPUS["h100"], lengths, nodes=1, gpus_per_node=8).host

    rounding = 1_457_305_344
    assert host("cluster.sleep=true") == {"set aside": 20 * 494_032_768, "rounding": rounding}
    with_reference = host("cluster.sleep=true", "algorithm.kl_coef=0.001")
    assert with_reference == {"set aside": 22 * 494_032_768, "rounding": rounding}
    assert host("cluster.sleep=false") == {}


def test_a_sampler_over_four_gpus() -> None:
    """A quarter of the weights on each; the cache of all four holds the completions."""
    shape = shape_of("Qwen/Qwen2.5-32B")
    split = sampler_memory(config_of("dapo_32b"), shape, 80e9)
    whole = sampler_memory(config_of("dapo_32b", "cluster.samplers=64", "cluster.tensor_parallel=1"), shape, 80e9)
    assert split["weights"] == whole["weights"] / 4 == 2 * shape.parameters / 4
    assert split["forward"] < whole["forward"]
    lengths = Lengths(prompt=150, completion=5000, longest=20480)
    plan = estimate(config_of("dapo_32b"), shape, GPUS["h100"], lengths, nodes=16, gpus_per_node=8)
    assert plan.at_once == pytest.approx(4 * split["KV cache"] / (5150 * shape.kv_bytes(2)))
    assert plan.seconds["taking turns"] == 0


def test_key_value_heads_that_are_fewer_than_gpus_are_there_more_than_once() -> None:
    """Two of 128: on four GPUs each has one whole, 2 x 28 x 128 x 2 bytes a token, and holds its completions alone."""
    shape, lengths = shape_of("Qwen/Qwen2.5-1.5B-Instruct"), Lengths(prompt=150, completion=341, longest=1024)
    assert [shape.over(parts).kv_bytes(2) for parts in (1, 2, 4)] == [28_672, 28_672, 57_344]
    # a layer's key-value projections of 2 x 1536 x 256 weights and 2 x 256 biases are there twice
    assert shape.over(4).parameters - shape.parameters == 28 * (2 * 1536 * 256 + 2 * 256)

    def plan(*overrides: str) -> Estimate:
        apart = ["cluster.layout=disaggregated", "cluster.samplers=1", "sampler.gpu_memory_utilization=0.9"]
        config = config_of("gsm8k_qwen2.5_1.5b", *apart, *overrides)
        return estimate(config, shape, GPUS["h100"], lengths, nodes=1, gpus_per_node=8)

    four = plan("cluster.tensor_parallel=4")
    assert four.at_once == pytest.approx(four.sampler["KV cache"] / (491 * 14_336))
    assert 9_800 < four.at_once < 10_000
    assert four.sampler["weights"] == 2 * shape.over(4).parameters / 4
    # pipeline stages share the layers out, not the heads: 2 x 14 x 128 x 2 bytes of one head
    stages = plan("cluster.tensor_parallel=2", "cluster.pipeline_parallel=2")
    assert stages.at_once == pytest.approx(stages.sampler["KV cache"] / (491 * 7_168))
    # of 0.1 GiB on each, 23.4 are in flight at half their length: 1024 x 5 of 341 tokens, 5 ms a step at least
    few = plan("cluster.tensor_parallel=4", "sampler.kv_cache_gib=0.1")
    assert few.seconds["sampling"] > 5120 * 341 / 23.4 * 5e-3
    # a row of 512 + 1024 tokens takes 22e6 bytes of each GPU, and of 0.015 GiB there are 16e6
    small = plan("cluster.tensor_parallel=4", "sampler.kv_cache_gib=0.015")
    assert ["one row of 1536 tokens" in problem for problem in small.problems] == [True]


def test_engines_that_take_turns_move_the_learner_s_states_twice() -> None:
    shape = shape_of("Qwen/Qwen2.5-0.5B-Instruct")
    lengths = Lengths(prompt=100, completion=300, longest=1024)
    config = config_of("gsm8k_qwen2.5_0.5b", "cluster.sleep=true", "algorithm.kl_coef=0", "learner.zero_stage=2")
    plan = estimate(config, shape, GPUS["h100"], lengths, nodes=1, gpus_per_node=8)
    assert plan.seconds["taking turns"] == pytest.approx(2 * (2 + 4 + 12) * shape.parameters / 25e9)
    assert plan.seconds["sync"] == 0  # they are where they are read


@pytest.mark.parametrize(
    ("per_node", "nodes", "room"),
    [(8, 1, 2), (4, 2, 2), (6, 2, 2), (3, 4, 0), (4, 1, 1), (2, 8, 0)],
)
def test_a_sampler_is_on_one_node(per_node: int, nodes: int, room: int) -> None:
    """Two samplers of four GPUs: however many nodes there are, theirs must have four. Ranks may be anywhere."""
    config = config_of(
        "gsm8k_qwen2.5_7b", "cluster.samplers=2", "cluster.tensor_parallel=4", "cluster.layout=disaggregated",
        "cluster.learner_ranks=1",
    )  # fmt: skip
    shape = shape_of("Qwen/Qwen2.5-7B")
    lengths = Lengths(prompt=150, completion=300, longest=2048)
    plan = estimate(config, shape, GPUS["h100"], lengths, nodes=nodes, gpus_per_node=per_node)
    said = [problem for problem in plan.problems if problem.startswith("a sampler's 4 GPUs are on one node")]
    assert len(said) == (room < 2)
    assert all(f"have room for {room} of 2 samplers" in problem for problem in said)


# vLLM's own conditions: QKVParallelLinear, MergedColumnParallelLinear, VocabParallelEmbedding, get_pp_indices. 28 heads
# and 4 key-value heads; a feed-forward width of 18944 = 2^9 x 37; a vocabulary of 152064, of 2^9 x 27 x 11
@pytest.mark.parametrize(
    ("split", "said"),
    [
        ((1, 1), ""),
        ((4, 28), ""),
        ((8, 1), "tensor_parallel=8 does not divide the model's 28 attention heads; nearest: 4"),
        (
            (7, 1),
            "tensor_parallel=7 neither divides the model's 4 key-value heads nor is a multiple of them; nearest: 4",
        ),
        ((28, 1), "tensor_parallel=28 does not divide the model's feed-forward width of 18944; nearest: 4"),
        ((2, 29), "pipeline_parallel=29 is more than the model's 28 layers; nearest: 28"),
    ],
)
def test_a_model_is_split_as_vllm_splits_it(split: tuple[int, int], said: str) -> None:
    tensor, pipeline = split
    config = config_of(
        "gsm8k_qwen2.5_7b", "cluster.samplers=1", f"cluster.tensor_parallel={tensor}",
        f"cluster.pipeline_parallel={pipeline}", "cluster.layout=disaggregated",
    )  # fmt: skip
    lengths = Lengths(prompt=150, completion=300, longest=2048)
    plan = estimate(config, shape_of("Qwen/Qwen2.5-7B"), GPUS["h100"], lengths, nodes=1, gpus_per_node=256)
    found = [problem for problem in plan.problems if "_parallel=" in problem]
    assert found == ([f"cluster.{said}"] if said else [])


def test_sizes_that_are_not_known_forbid_no_split() -> None:
    unknown = {"heads": 0, "kv_heads": 0, "intermediate": 0, "vocab": 0, "layers": 0}
    assert split_problems(3, 5, **unknown) == []
    # 65 are padded to 128
    assert split_problems(3, 1, **(unknown | {"vocab": 65})) == [
        "cluster.tensor_parallel=3 does not divide the model's vocabulary, padded to 128; nearest: 2"
    ]
    assert split_problems(2, 1, **(unknown | {"vocab": 65})) == []
    # key-value heads are there more than once where they are fewer than GPUs
    assert split_problems(4, 1, **(unknown | {"heads": 4, "kv_heads": 2})) == []
    assert split_problems(7, 1, **(unknown | {"heads": 8, "kv_heads": 8})) == [
        "cluster.tensor_parallel=7 does not divide the model's 8 attention heads; nearest: 8"
    ]


def test_gpus_that_share_layers_add_up_their_results() -> None:
    """Two GPUs, 40 decoding steps of 2 layers with 15 us twice a layer; half of twice 8 x 2 bytes a layer's result of
    80 and 20 tokens, over a link of 1000 bytes a second at 0.7."""
    alone = dataclasses.replace(GPUS["h100"], flops=1e6, bandwidth=1e6, link=1000.0)
    lengths = Lengths(prompt=10, completion=10, longest=30)
    given = {"completions": 8, "prompts": 2, "max_num_seqs": 4, "kv": 1e9}
    both = dataclasses.replace(alone, parts=2)
    more = sampling_seconds(SMALL, both, lengths, **given) - sampling_seconds(SMALL, alone, lengths, **given)
    assert more == pytest.approx(40 * 2 * 2 * 15e-6 + 2 * 2 * (2 * 0.5 * 2 * 8) * (80 + 20) / 700)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("4090", None, None, None), "--gpu 4090: it is not known; known are a100-40, a100-80, a800, l40s, h100, h800, "
         "h200; for another one give --gpu-memory, --tflops, --bandwidth of its data sheet"),
        (("4090", 24, 165, None), "for another one give --bandwidth of its data sheet"),
        (("a100", None, None, None), "it is not known; did you mean a100-40 or a100-80?"),
        (("4090", 24, 165, 1008), "--bandwidth 1008 must be above 0 and at most 100: it is in TB/s, and 1000 GB/s are"),
        (("4090", 24e9, 165, 1), "--gpu-memory 2.4e+10 must be above 0 and at most 2000: it is in GB"),
        (("h100", None, float("nan"), None), "--tflops nan must be above 0"),
        ((None, 24, None, None), "--gpu is missing: torch sees no GPU on this machine; known are a100-40"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_known(given: tuple[Any, ...], said: str) -> None:
    if torch.cuda.is_available() and given[0] is None:
        pytest.skip("there is a GPU here")
    name, memory, tflops, bandwidth = given
    with pytest.raises(UserError) as caught:
        gpu_of(name, memory=memory, tflops=tflops, bandwidth=bandwidth)
    assert said in str(caught.value)


def test_a_gpu_by_its_data_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    name, gpu = gpu_of("4090", memory=24, tflops=165, bandwidth=1.008)
    assert (name, gpu.memory, gpu.flops, gpu.bandwidth) == ("4090", 24e9, 165e12, 1.008e12)
    assert gpu_of("H100") == ("h100", GPUS["h100"])
    assert gpu_of("h100", memory=94)[1] == dataclasses.replace(GPUS["h100"], memory=94e9)
    recipe = str(RECIPES["gsm8k_qwen2.5_0.5b"])
    sheet = ["--gpu-memory", "24", "--tflops", "165", "--bandwidth", "1.008"]
    small = ["cluster.sleep=true", "learner.gradient_checkpointing=true", "learner.tokens_per_microbatch=4096"]
    assert main(["plan", recipe, *sheet, *small]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 x 8 GPU:" in out
    assert "GB of 24" in out


@pytest.mark.parametrize(
    ("name", "gibibytes", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A800-SXM4-80GB", 79.2, "a800"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA L40", 44.5, None),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5, None),
        ("NVIDIA GeForce RTX 4090", 23.6, None),
    ],
)
def test_the_gpu_that_torch_sees(name: str, gibibytes: float, known: str | None) -> None:
    assert known_as(name, gibibytes * 2**30) == known


def hours_of(name: str, *overrides: str) -> tuple[Estimate, Any]:
    """The plan of a recipe on its header's GPUs with its assumed lengths, and what would be quicker."""
    config, (count, gpu) = config_of(name, *overrides), recipe_hours.gpus_of(RECIPES[name])
    assumed = recipe_hours.ASSUMED[name]
    lengths = Lengths(prompt=assumed.prompt, completion=assumed.completion, longest=config.sampling.max_tokens)
    given = (config, shape_of(config.model.path), GPUS[recipe_hours.NAMES[gpu]], lengths)
    on = {"nodes": -(-count // 8), "gpus_per_node": 8}
    return estimate(*given, **on), quicker(*given, **on)


def test_a_quicker_layout_is_proposed_as_options_that_keep_the_promise() -> None:
    """Apart, ten samplers and six ranks wait for each other: in turn all sixteen work."""
    plan, found = hours_of("tulu_rlvr_8b")
    options, promised = found
    assert "cluster.layout=colocated" in options
    assert promised.hours < 0.9 * plan.hours
    again, none = hours_of("tulu_rlvr_8b", *options)
    assert again.hours == pytest.approx(promised.hours)
    assert again.gpus == plan.gpus == 16
    assert again.problems == ()
    assert none is None


def test_the_7b_recipe_has_a_layout_that_none_beats_by_a_tenth() -> None:
    plan, found = hours_of("gsm8k_qwen2.5_7b")
    assert found is None
    before, _ = hours_of("gsm8k_qwen2.5_7b", "sampler.max_num_seqs=256")
    assert plan.seconds["sampling"] < 0.9 * before.seconds["sampling"]
    assert plan.hours < before.hours


AS_IN_ITS_SOURCE = {"tulu_rlvr_8b"}
"""Recipes that keep separate GPUs although turns would be quicker; docs/recipes.md says so."""


@pytest.mark.parametrize("name", [name for name in RECIPES if config_of(name).on_gpu])
def test_recipes_take_turns_where_that_is_quicker(name: str) -> None:
    _, found = hours_of(name)
    quicker_in_turn = found is not None and "cluster.layout=colocated" in found[0]
    assert quicker_in_turn == (name in AS_IN_ITS_SOURCE)
    assert not quicker_in_turn or f"`{name}`, as in its source" in (ROOT / "docs" / "recipes.md").read_text()


def test_a_layout_that_fits_is_proposed_for_one_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(RECIPES["math_drgrpo_7b"]), "--gpu", "a100-40"]
    assert main(command) == 2
    found = re.search(r"^better +(.*): .* which fits$", capsys.readouterr().out, re.M)
    assert found
    assert main([*command, *found[1].split()]) == 0
    assert "\nfits " in capsys.readouterr().out


def test_layouts_use_all_gpus_and_may_be_taken() -> None:
    config = config_of("math_drgrpo_7b")
    found = list(layouts(config, 8))
    assert {other.gpus_used for other in found} == {8}
    shapes = {(o.cluster.layout, o.cluster.samplers, o.cluster.tensor_parallel) for o in found}
    assert {("colocated", 4, 2), ("colocated", 8, 1), ("disaggregated", 3, 2), ("disaggregated", 7, 1)} <= shapes
    assert [o for o in found if changes(config, o) == []] == [config]
    assert in_flight(config, 4, 2) == [512]  # 256 on each GPU, and 128 x 8 completions over four samplers are 256
    assert in_flight(config, 2, 1) == [256, 512]


def test_who_works_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    plan, _ = hours_of("math_drgrpo_7b")
    rest = {"sampling", "sync", "taking turns", "rest"}
    assert set(plan.seconds) == {*LEARNING} | rest
    assert main(["plan", str(RECIPES["math_drgrpo_7b"]), "--gpu", "a100-80", "--completion-tokens", "900"]) == 0
    out = capsys.readouterr().out
    assert "samplers work 28% of it, the learner 54%, in turn on the same GPUs" in out


def test_a_folder_around_a_model_names_the_model(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model, run = make_model("qwen2"), tmp_path / "runs" / "a"

    def said(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            shape_of(str(folder))
        return str(caught.value)

    run.mkdir(parents=True)
    assert said(run).endswith("and no folder inside it has one: it is not a model folder")
    (run / "config.yaml").touch()
    assert "is a run folder without a model: model/ is written at the end of the run" in said(run)
    for step in (9, 10):
        shutil.copytree(model, run / "checkpoints" / f"step-{step}" / "model")
    assert said(run).endswith(f"model.path={run}/checkpoints/step-10/model")
    assert said(run / "checkpoints" / "step-9").endswith(f"model.path={run}/checkpoints/step-9/model")
    shutil.copytree(model, run / "model")
    assert said(run) == (
        f"model.path={run} has no config.json, the model is in a folder inside it: model.path={run}/model"
    )
    assert shape_of(str(run / "model")).parameters > 0
    cache = tmp_path / "models--o--n"
    shutil.copytree(model, cache / "snapshots" / "abc")
    assert model_inside(cache) == cache / "snapshots" / "abc"
