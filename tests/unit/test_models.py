"""Whether a model can be trained: families that are refused by name, and what vLLM objects to. Starts no engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import tiny_families as tiny
from grpo import config as module
from grpo.checks import families
from grpo.checks.models import check_served, check_trained, with_cause
from grpo.config import Config
from grpo.types import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configured(make_recipe: Callable[..., Path], make_model: Callable[..., Path]) -> Callable[..., Config]:
    """configured(*overrides) -> the small recipe on a tiny Llama: rows of up to 11 tokens."""
    recipe = make_recipe(make_model("llama"))
    return lambda *overrides: module.load(recipe, overrides)


def test_families_that_fail_on_cpu_are_refused_by_name(configured: Callable[..., Config]) -> None:
    assert families.REFUSED_ON_CPU
    for family, why in families.REFUSED_ON_CPU.items():
        with pytest.raises(
            UserError, match=rf"config\.json has model_type={family} cannot be trained on CPU: "
        ) as refusal:
            check_trained(configured(), tiny.settings_of(family, 13), print)
        assert why in str(refusal.value)


def test_linear_attention_on_cpu_needs_bfloat16(configured: Callable[..., Config]) -> None:
    settings = tiny.settings_of("qwen3_next", 13)
    with pytest.raises(UserError, match=r"qwen3_next cannot be trained in float32 on CPU; nearest: model\.dtype=bf"):
        families.refuse(configured(), settings)
    families.refuse(configured("model.dtype=bfloat16"), settings)


def test_heads_that_are_not_computed_on_cpu_are_refused(make_recipe: Callable[..., Path]) -> None:
    recipe, settings = make_recipe(Path("a/b")), tiny.settings_of("qwen2", 13)
    settings.hidden_size, settings.num_attention_heads, settings.head_dim = 96, 4, None
    with pytest.raises(UserError, match=r"its attention heads have 24 elements, .* nearest: 32 "):
        families.refuse(module.load(recipe), settings)
    families.refuse(module.load(recipe, ["cluster.device=gpu", "model.dtype=bfloat16"]), settings)
    settings.num_attention_heads = 3
    families.refuse(module.load(recipe), settings)
    settings.head_dim = 48
    with pytest.raises(UserError, match=r"have 48 elements, .* nearest: 32 "):
        families.refuse(module.load(recipe), settings)


def test_heads_of_all_layers_are_read(make_recipe: Callable[..., Path]) -> None:
    """Gemma 4 has heads of another size in its global layers."""
    config = module.load(make_recipe(Path("a/b")))
    sizes = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "head_dim": 32}
    families.refuse(config, tiny.settings_of("gemma4_text", 13, **sizes, global_head_dim=64))
    with pytest.raises(UserError, match=r"have 48 elements, .* nearest: 32 "):
        families.refuse(config, tiny.settings_of("gemma4_text", 13, **sizes, global_head_dim=48))


def test_a_window_that_engines_read_differently_must_hold_the_rows(configured: Callable[..., Config]) -> None:
    """vLLM's Cohere 2 sees one token more; rows that the window holds never meet its end."""
    config = configured()
    assert config.max_row_tokens == 11
    families.refuse(config, tiny.settings_of("cohere2", 13, sliding_window=11))
    families.refuse(config, tiny.settings_of("mistral", 13, sliding_window=10))
    with pytest.raises(UserError, match=r"cohere2 .*sliding_window=10, .* are 11, nearest: 10"):
        families.refuse(config, tiny.settings_of("cohere2", 13, sliding_window=10))


def test_vllm_is_asked_about_what_tests_have_not_seen(configured: Callable[..., Config]) -> None:
    said: list[str] = []
    settings = tiny.settings_of("llama", 13)
    check_served(configured(), settings, said.append)
    assert not said
    words = r"sampler\.engine\.max_logprob is not an argument .*; did you mean max_logprobs"
    with pytest.raises(UserError, match=words):
        check_served(configured("sampler.engine={max_logprob: 3}"), settings, said.append)
    [line] = said
    assert line.startswith("asking vLLM whether it can serve")


def test_vllm_is_asked_for_an_evaluation_too_whatever_the_working_directory_has(
    configured: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation has no learner and no training data, which no recipe may lack."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "string.py").write_text("raise RuntimeError('a file of the user')")
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # without the answers of earlier checks
    config = module.load_for_evaluation(
        None, model=configured().model.path, data=["d.jsonl"], rewards=["r.py"],
        overrides=["sampler.engine={block_size: 16}", "model.dtype=float32", "data.max_prompt_tokens=8",
                   "sampling.max_tokens=4"],
    )  # fmt: skip
    assert config.cluster.learner_ranks == 0
    check_served(config, tiny.settings_of("llama", 13), print)


def test_where_vllm_points_to_its_log_the_error_is_taken_from_there() -> None:
    log = "ERROR [registry.py] ValueError: first\nERROR [registry.py] ModuleNotFoundError: No module named 'x'\nend\n"
    pointing = "vLLM cannot serve it: failed to be inspected. Please check the logs for more details"
    assert with_cause(pointing, log) == f"{pointing}: ModuleNotFoundError: No module named 'x'"
    assert with_cause("vLLM cannot serve it: no", log) == "vLLM cannot serve it: no"


@pytest.mark.parametrize("name", sorted({*families.TRAINED, *families.REFUSED_ON_CPU}))
def test_the_documentation_has_every_family(name: str) -> None:
    trained, refused = (ROOT / "docs" / "families.md").read_text().split("## Refused")
    assert f"`{name}`" in (trained if name in families.TRAINED else refused)
