"""What model families do to logits and attention: found, computed by our head, or refused. Starts no engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import tanh

from benchmarks import tiny_families as families
from grpo.config import AlgorithmConfig, Config, DataConfig, ModelConfig, RunConfig
from grpo.learner import heads
from grpo.learner.changes import find_change
from grpo.learner.paper import check_models
from grpo.objective.logprobs import UNCHANGED, LogitChange
from grpo.types import UserError

CHANGED = {
    "cohere": LogitChange(scale=0.25),
    "cohere2": LogitChange(scale=0.25),
    "falcon_h1": LogitChange(scale=0.4),
    "gemma2": LogitChange(cap=2.0),
    "gemma3_text": LogitChange(cap=2.0),
    "granite": LogitChange(scale=0.125),
    "nanochat": LogitChange(cap=15.0),
    "vaultgemma": LogitChange(cap=2.0),
}
PLAIN = (
    "deepseek_v3", "falcon", "gpt2", "llama", "llama4_text", "mamba", "minicpm3", "mistral", "mixtral", "olmo2", "opt",
    "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])


def tiny(family: str, **changes: Any) -> Any:
    own: dict[str, Any] = {}
    if family == "falcon_h1":
        own = {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "lm_head_multiplier": 0.4,
        }
    return families.settings_of(family, 13, **own, **changes)


@pytest.fixture
def make_family(tmp_path: Path) -> Callable[..., Path]:
    """make_family(family, **changes) -> folder of a tiny model without a tokenizer."""

    def make(family: str, **changes: Any) -> Path:
        folder = tmp_path / family
        families.build(families.settings_of(family, 13, **changes)).save_pretrained(folder)
        return folder

    return make


def config_of(folder: Path, *, attention: str = "auto", advantage: str = "group") -> Config:
    return Config(
        model=ModelConfig(path=str(folder), dtype="float32", attention=attention),  # type: ignore[arg-type]
        data=DataConfig(train=[]),
        algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2, advantage=advantage),  # type: ignore[arg-type]
        run=RunConfig(steps=1),
    )


@pytest.mark.parametrize("family", [*CHANGED, *PLAIN])
def test_what_a_family_does_to_its_logits_is_found_without_weights(family: str) -> None:
    with torch.device("meta"):
        model = families.AutoModelForCausalLM.from_config(tiny(family))
    assert find_change(model) == CHANGED.get(family, UNCHANGED)
    assert "forward" not in model.__dict__  # nothing is left of the trial
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("family", ["cohere", "gemma2", "gemma3_text", "granite", "llama", "vaultgemma"])
def test_the_head_gives_what_the_model_itself_does(family: str, make_family: Callable[..., Path]) -> None:
    """Logprobs and the gradients of all parameters in float64, against the model's own logits and autograd."""
    config = config_of(make_family(family))
    ours = heads.load_policy(config).double()
    theirs = copy.deepcopy(ours)
    head = heads.install(ours, config)
    with head.targets(TOKENS[:, 1:], 0.7):
        logprobs, entropy = heads.unpack(ours(input_ids=TOKENS[:, :-1], use_cache=False).logits)
    every = torch.log_softmax(theirs(input_ids=TOKENS[:, :-1], use_cache=False).logits.double() / 0.7, -1)
    expected = every.gather(-1, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, -(every.exp() * every).sum(-1), rtol=0, atol=1e-10)
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    (expected.sum() - 0.3 * (every.exp() * every).sum()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert q.grad is not None
        assert q.grad.abs().max() > 1e-6


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_the_head_projects_only_what_is_wanted(family: str, make_family: Callable[..., Path]) -> None:
    """The wanted positions get the values and the gradients that they get among all; a filler row adds gradients of 0,
    since every rank must take part in the sum of all gradients."""
    config = config_of(make_family(family))
    model = heads.load_policy(config).double()
    head = heads.install(model, config)
    projected: list[int] = []
    linear = heads.selected_logprobs

    def counted(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        projected.append(hidden.shape[:-1].numel())
        return linear(hidden, *arguments, **options)

    def gradients(wanted: torch.Tensor, given: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        with head.targets(TOKENS[:, 1:], 0.7, given):
            logprobs, entropy = heads.unpack(model(input_ids=TOKENS[:, :-1], use_cache=False).logits)
        torch.where(wanted, logprobs + 0.3 * entropy, 0.0).sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(found) == len([*model.parameters()])
        return torch.where(wanted, logprobs, 0.0), found

    some = torch.zeros(TOKENS[:, 1:].shape, dtype=torch.bool)
    some[0, 2:5] = some[0, 8] = True
    for wanted in (some, torch.zeros_like(some)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "selected_logprobs", counted)
            ours, our_gradients = gradients(wanted, wanted)
        assert projected.pop() == int(wanted.sum())
        every, all_gradients = gradients(wanted, None)
        torch.testing.assert_close(ours, every, rtol=0, atol=1e-12)
        for p, q in zip(our_gradients, all_gradients, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        assert any(bool(p.any()) for p in our_gradients) == bool(wanted.any())


@pytest.mark.parametrize("family", ["cohere", "gemma2", "gemma3_text", "granite"])
def test_the_saved_config_is_the_models_own(family: str, make_family: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_family(family)
    model = heads.load_policy(config_of(folder))
    heads.install(model, config_of(folder))
    model.save_pretrained(tmp_path / "saved")
    before, after = (json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "saved"))
    assert after == before


@pytest.mark.parametrize(
    ("family", "feature"),
    [
        ("cohere", "logit_scale"),
        ("gemma2", "final_logit_softcapping"), ("gemma2", "attn_logit_softcapping"), ("gemma2", "sliding_window"),
        ("gemma3_text", "final_logit_softcapping"), ("gemma3_text", "sliding_window"),
        ("granite", "logits_scaling"), ("mistral", "sliding_window"), ("mixtral", "sliding_window"),
        ("phi3", "sliding_window"),
        ("vaultgemma", "final_logit_softcapping"), ("vaultgemma", "attn_logit_softcapping"),
    ],
)  # fmt: skip
def test_a_feature_of_a_tiny_model_counts(family: str, feature: str) -> None:
    """Switched off, it moves logprobs by a hundred times what integration/test_family_runs.py allows."""
    logprobs = []
    for changes in ({}, {feature: families.OFF[feature]}):
        model = families.build(tiny(family, **changes), attention="eager")
        with torch.no_grad():
            every = torch.log_softmax(model(input_ids=TOKENS, use_cache=False).logits, -1)
        logprobs.append(every[:, :-1].gather(-1, TOKENS[:, 1:, None]))
    assert (logprobs[0] - logprobs[1]).abs().max() > 100 * families.TOLERANCE


def test_a_cap_on_attention_is_computed_or_refused(make_family: Callable[..., Path]) -> None:
    folder = make_family("gemma2")
    for attention in ("auto", "eager"):
        model = heads.load_policy(config_of(folder, attention=attention))
        assert model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"model\.attention=sdpa .*attn_logit_softcapping=0\.5 .*nearest: eager"):
        check_models(config_of(folder, attention="sdpa"))


def test_a_family_without_pytorchs_attention_gets_eager(make_family: Callable[..., Path]) -> None:
    config = config_of(make_family("llama"))
    assert heads.attention_of(config, families.settings_of("gpt_oss", 13)) == "eager"
    assert heads.attention_of(config, families.settings_of("llama", 13)) == "sdpa"


def test_other_changes_of_logits_are_refused_by_their_name(
    make_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that shifts logits, one that leaves some out, and one with a scale in front of the projection, too."""
    config = config_of(make_family("granite"))
    cls = families.transformers.GraniteForCausalLM
    own, project = cls.forward, torch.nn.Linear.forward

    def altered(how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        def forward(self: Any, **given: Any) -> Any:
            out = own(self, **given)
            out.logits = how(out.logits)
            return out

        return forward

    for how in (lambda logits: logits + 1, tanh, torch.sin, lambda logits: logits[..., :-1]):
        monkeypatch.setattr(cls, "forward", altered(how))
        if how is tanh:
            assert find_change(heads.load_policy(config)) == LogitChange(scale=0.125, cap=8.0)
            continue
        with pytest.raises(UserError, match=r"config\.json's logits_scaling=8\.0 change"):
            check_models(config)

    def in_front(self: Any, input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=use_cache)[0]
        return families.transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden / 2) / 8)

    monkeypatch.setattr(cls, "forward", in_front)
    with pytest.raises(UserError, match="in front of the projection, too"):
        check_models(config)
    assert torch.nn.Linear.forward is project


def test_what_the_learner_would_refuse_is_refused_from_files(make_family: Callable[..., Path]) -> None:
    folder = make_family("llama")
    check_models(config_of(folder))
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": torch.zeros(12, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight has the shape \[12, 64\], but config\.json gives \[13, 64\]"):
        check_models(config_of(folder))
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights: model\.norm\.weight"):
        check_models(config_of(folder))


def test_a_buffer_that_would_not_travel_is_refused_from_files(make_family: Callable[..., Path]) -> None:
    check_models(config_of(make_family("qwen2_moe")))
    with pytest.raises(UserError, match=r"\.1\.mlp\.gate\.e_score_correction_bias is a buffer, .*Glm4MoeForCausalLM"):
        check_models(config_of(make_family("glm4_moe")))


def test_a_critic_that_the_family_has_not_is_refused_from_files(make_family: Callable[..., Path]) -> None:
    folder = make_family("granite")
    check_models(config_of(folder))
    with pytest.raises(UserError, match=r"critic\.path=.* has no model of the type granite with a value head"):
        check_models(config_of(folder, advantage="gae"))


def test_a_model_that_transformers_cannot_build_is_refused_from_files(make_family: Callable[..., Path]) -> None:
    folder = make_family("llama")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"model_type": "clip_text_model"}))
    with pytest.raises(UserError, match=r"model\.path=.*: the learner cannot load it: "):
        check_models(config_of(folder))


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe", "phi3", "qwen3_moe"])
def test_weights_are_named_as_in_the_models_folder(family: str, make_family: Callable[..., Path]) -> None:
    """Those that vLLM has loaded from it: the experts of a layer are many tensors there, and one in transformers."""
    folder = make_family(family)
    model = heads.load_policy(config_of(folder))
    found = {}
    for name, p in model.named_parameters():
        found |= heads.as_in_folder(model, name, p.detach())
    stored = load_file(folder / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor), name
    assert (found.keys() == dict(model.named_parameters()).keys()) == (family in ("llama", "phi3"))
