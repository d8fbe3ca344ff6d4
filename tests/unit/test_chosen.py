"""Options of an evaluation without a recipe that nobody gave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo import config as module
from grpo.checks.chosen import choose
from grpo.config import Config
from grpo.lifecycle.evaluate import check_evaluation
from grpo.types import UserError

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}="
REWARD = "def f(completion, row): return 1.0\n"


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with 64 positions and one token per character."""
    return Path(shutil.copytree(make_model("qwen2"), tmp_path / "model"))


def loaded(model: Path, *overrides: str, longest: int = 5) -> Config:
    """The config of `grpo eval MODEL --data FILE --reward FILE` on prompts of 3 to `longest` tokens."""
    rows = [{"question": question, "answer": "2"} for question in ("1+1", "1" * (longest - 2) + "+1")]
    data, reward = model.parent / "d.jsonl", model.parent / "f.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text(REWARD)
    return module.load_for_evaluation(
        None, model=str(model), data=[str(data)], rewards=[str(reward)], overrides=overrides
    )


def chosen(config: Config) -> tuple[str, int, int]:
    return config.data.style, config.data.max_prompt_tokens, config.sampling.max_tokens


def test_lengths_follow_from_the_data_and_the_context(model: Path) -> None:
    config, line = choose(loaded(model), ())
    assert chosen(config) == ("template", 5, 64 - 5)
    assert line == (
        "chosen     data.style=template data.max_prompt_tokens=5 sampling.max_tokens=59; give these options to change "
        "them"
    )
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 9999')
    )
    assert chosen(choose(loaded(model), ())[0]) == ("template", 5, 1024)  # the default


def test_the_style_follows_from_the_tokenizer(model: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert chosen(choose(loaded(model), ())[0]) == ("chat", 6, 64 - 6)
    assert chosen(choose(loaded(model, "data.style=template"), ["data.style"])[0]) == ("template", 5, 64 - 5)


def test_what_is_given_stays(model: Path) -> None:
    given = {"data.max_prompt_tokens": 20, "sampling.max_tokens": 7}
    for name, expected in (("data.max_prompt_tokens", (20, 44)), ("sampling.max_tokens", (5, 7))):
        config, line = choose(loaded(model, f"{name}={given[name]}"), [name])
        assert chosen(config)[1:] == expected
        assert name not in line
    config, line = choose(loaded(model, "data.eval.max_tokens=7"), ["data.eval.max_tokens"])
    assert config.max_row_tokens <= 64
    assert "sampling.max_tokens" not in line
    everything = ["data", "sampling"]
    config = loaded(model, "data.max_prompt_tokens=20")
    assert choose(config, everything) == (config, "")


def test_all_rows_fit_also_those_behind_the_limit(model: Path) -> None:
    assert chosen(choose(loaded(model, "data.eval.sets.0.limit=1"), ["data.eval.sets.0.limit"])[0])[1] == 5


def test_prompts_that_fill_the_context_are_refused(model: Path) -> None:
    with pytest.raises(UserError) as caught:
        choose(loaded(model, longest=64), ())
    assert str(caught.value) == (
        f"prompts of 64 tokens leave no room for a completion in the 64 positions of {model}; leave out the long ones: "
        "data.max_prompt_tokens=N data.overlong_prompts=drop"
    )
    assert chosen(choose(loaded(model, longest=63), ())[0]) == ("template", 63, 1)


def test_a_model_that_does_not_exist_is_left_to_the_check_of_models(model: Path) -> None:
    config = module.load_for_evaluation(None, model="./none", data=["d.jsonl"], rewards=["f.py"], overrides=[])
    assert choose(config, ()) == (config, "")


def test_an_evaluation_without_a_recipe_needs_no_options(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiny model's float32 and CPU, which a recipe would give. With a recipe, nothing is chosen."""
    monkeypatch.setattr("grpo.checks.models.check_served", lambda *arguments: None)
    overrides = ["model.dtype=float32", "cluster.device=cpu"]
    plan = check_evaluation(loaded(model, *overrides), None, overrides)
    assert chosen(plan.config) == ("template", 5, 59)
    assert any(line.startswith("chosen     data.style=template ") for line in plan.lines)
    with pytest.raises(UserError, match="exceed the model's 64 positions"):
        check_evaluation(loaded(model, *overrides), Path("r.yaml"), overrides)


def test_all_that_is_lacking_is_in_one_sentence() -> None:
    data = ("no held-out data (data.eval.sets)", "--data PATH")
    reward = ("no reward (rewards)", "--reward FILE")
    for given, sentence in (
        ({}, f"{data[0]} and {reward[0]}; give them with {data[1]} and {reward[1]}"),
        ({"data": ["d.jsonl"]}, f"{reward[0]}; give it with {reward[1]}"),
        ({"rewards": ["f.py"]}, f"{data[0]}; give it with {data[1]}"),
    ):
        options: Any = {"data": [], "rewards": [], "overrides": [], **given}
        with pytest.raises(UserError) as caught:
            module.load_for_evaluation(None, model="m", **options)
        assert str(caught.value) == f"grpo eval names {sentence}, or a recipe with --recipe"
