"""The learning-rate schedule and weights that are missing, by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from grpo.config import AlgorithmConfig, Config, CriticConfig, DataConfig, ModelConfig, RunConfig
from grpo.learner.heads import load_critic, load_policy, refuse_dropout
from grpo.learner.zero.setup import lr_factor
from grpo.types import UserError


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, (1 + 3**0.5 / 2) / 2, 0.75, 0.5, 0.25, (1 - 3**0.5 / 2) / 2]),
    ],
)
def test_warm_up_then_decay(schedule: str, expected: list[float]) -> None:
    factors = [lr_factor(step, schedule=schedule, warmup=4, total=10) for step in range(10)]
    assert factors == pytest.approx(expected)


def test_without_warm_up_the_first_step_is_whole() -> None:
    assert lr_factor(0, schedule="linear", warmup=0, total=4) == 1.0


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_model_that_lacks_weights_is_refused(family: str, make_model: Callable[..., Path]) -> None:
    folder = make_model(family)
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32"),
        data=DataConfig(train=[]),
        algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2),
        run=RunConfig(steps=1),
    )
    load_policy(config)  # tied embeddings are no missing weight
    load_critic(config)  # and a head of zeros is put on
    file = folder / "model.safetensors"
    weights = load_file(file)
    gone = "model.layers.1.mlp.down_proj.weight" if family == "qwen2" else "lm_head.weight"
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 of the model's weights: {gone}"):
        load_policy(config)
    if family == "qwen2":
        with pytest.raises(UserError, match=f"critic.path={folder} lacks 1 of the model's weights: {gone}"):
            load_critic(config)


def test_the_dropout_of_other_heads_is_no_obstacle() -> None:
    """GPT-2 declares that of a summary, GPT-NeoX that of a classifier; the published models have both above 0."""
    settings = {"attn_pdrop": 0.0, "summary_first_dropout": 0.1, "classifier_dropout": 0.1}
    refuse_dropout(SimpleNamespace(to_dict=lambda: settings), "model.path")
    settings["resid_pdrop"] = 0.1
    with pytest.raises(UserError, match=r"model\.path: the model's config\.json has resid_pdrop=0\.1"):
        refuse_dropout(SimpleNamespace(to_dict=lambda: settings), "model.path")


def test_a_critic_with_dropout_is_refused(make_model: Callable[..., Path]) -> None:
    folder, critic = make_model("llama"), make_model("llama", attention_dropout=0.3)
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32"),
        data=DataConfig(train=[]),
        algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2, advantage="gae"),
        critic=CriticConfig(path=str(critic)),
        run=RunConfig(steps=1),
    )
    with pytest.raises(UserError, match=r"critic\.path: the model's config\.json has attention_dropout=0\.3"):
        load_critic(config)
    assert not load_critic(dataclasses.replace(config, critic=CriticConfig())).score.weight.any()
