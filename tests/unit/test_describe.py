"""`grpo options` and `--help`: every option in words, and examples that work."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from grpo import config as module
from grpo.commands.cli import main, make_parser, split_resume_options
from grpo.config.describe import default_text, field_texts, kind_text, options_text, sections
from grpo.types import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
model: {path: some/folder}
data: {train: rows.jsonl}
algorithm: {prompts_per_step: 32, group_size: 4}
rewards: [{file: reward.py}]
run: {steps: 3}
"""
SECTIONS = {section.name: section for section in sections()}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_and_option_says_what_it_is(name: str) -> None:
    section = SECTIONS[name]
    assert section.meaning.endswith(".")
    assert section.examples or name == "critic.optimizer"  # of which critic has one
    for option in section.options:
        meaning = field_texts(option.section)[option.name.rpartition(".")[2]]
        assert re.search(r"[.]$", meaning), option.name
        assert "None" not in meaning + default_text(option.default)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_examples_of_a_section_load_and_set_it(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    before = dataclasses.asdict(module.load(recipe))
    for example in SECTIONS[name].examples:
        _, overrides = split_resume_options(shlex.split(example))
        assert dataclasses.asdict(module.load(recipe, overrides)) != before
        own = SECTIONS[name].name.partition("[")[0]
        assert any(override.startswith(own) for override in overrides), example


def test_a_default_is_written_as_a_recipe_takes_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    sets = ["data.train=[{path: rows.jsonl}]", "data.eval.sets=test.jsonl"]
    defaults = {
        option.name.replace("[i]", "[0]"): default_text(option.default)
        for section in SECTIONS.values()
        for option in section.options
        if default_text(option.default) != "required"
    }
    assert (defaults["data.template"], defaults["run.name"]) == ("'{question}'", "null")
    for name in ("data.template", "data.gold_template"):  # an override takes a text as it stands, without quotes
        del defaults[name]
    given = [*sets, *(f"{name}={default}" for name, default in defaults.items())]
    assert module.load(recipe, given) == module.load(recipe, sets)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bool | None, "true | false | null"),
        (tuple[str, ...], "list of texts"),
        (tuple[float, float], "list of 2 numbers"),
        (dict[str, list[float]], "mapping of text to list of numbers"),
        (dict[str, Any], "mapping of text to value"),
    ],
)
def test_types_in_words(kind: object, words: str) -> None:
    assert kind_text(kind) == words


def test_a_section_is_shown_with_examples_and_what_is_in_it() -> None:
    shown = options_text("data")
    assert "    grpo train RECIPE data.train=train.jsonl 'data.template={question} Answer:'\n" in shown
    names = re.findall(r"^([\w.\[\]]+) = ", shown, re.MULTILINE)
    assert {"data.seed", "data.train[i].weight", "data.eval.top_k"} <= {*names}
    assert all(name.startswith("data.") for name in names)
    assert options_text("algorithm.loss").splitlines() == [
        "algorithm.loss = ppo_clip   (ppo_clip | gspo | cispo | sapo | gmpo | reinforce)",
        "    The policy loss.",
        "    On resume: must have the value of the checkpoint, unless allow= names it.",
    ]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "algorithm.dual_clip",
            [
                "algorithm.dual_clip = null   (number | null, above 1)",
                "    Upper bound of the ratio when the advantage is negative (dual-clip PPO). null: off. Used only "
                "with",
                "    algorithm.loss=ppo_clip.",
                "    On resume: must have the value of the checkpoint, unless allow= names it.",
            ],
        ),
        (
            "critic.coef",
            [
                "critic.coef = 1   (number, above 0)",
                "    Coefficient of the value loss. Used only with algorithm.advantage=gae.",
                "    On resume: must have the value of the checkpoint, unless allow= names it.",
            ],
        ),
        (
            "rewards[0].file",
            [
                "rewards[i].file = required   (text)",
                "    Python file, or the name of a built-in reward function, such as `gsm8k`. Relative paths are "
                "resolved against the",
                "    working directory, then against the folder of the recipe.",
                "    On resume: may change; the content that it selects must be that of the checkpoint, unless allow= "
                "names it.",
                "    On submit: the file is sent with the job.",
            ],
        ),
        (
            "zero_stage",
            [
                "learner.zero_stage = 2   (integer, between 0 and 3)",
                "    ZeRO stage. 0 shards nothing (float32 only), 1 shards optimizer states, 2 also gradients, 3 also "
                "weights.",
                "    On resume: may change; the run is equal up to the order of additions, not bit for bit.",
            ],
        ),
    ],
)
def test_an_option_says_its_bounds_its_use_and_how_it_is_treated(name: str, lines: list[str]) -> None:
    assert options_text(name).splitlines() == lines


def test_two_conditions_of_use_are_joined() -> None:
    text = " ".join(options_text("kl_clamp").split())
    assert "Used only with algorithm.kl_coef and algorithm.kl_place=loss." in text
    assert "Used only with" not in options_text("data.eval.sets.path")  # without a set there is no such option


def test_an_option_is_found_by_its_own_name_and_by_its_place_in_a_list() -> None:
    assert options_text("kl_coef") == options_text("algorithm.kl_coef")
    for name in ("rewards[0].weight", "rewards.0.weight", "rewards[i].weight", "rewards.weight"):
        assert options_text(name).startswith("rewards[i].weight = 1   (number)\n")
    assert options_text("rewards[0]").startswith("rewards[i]: ")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("algoritm", "no section and no option is called algoritm; did you mean algorithm?"),
        ("run.stesp", "no section and no option is called run.stesp; did you mean run.steps?"),
        ("max_token", "no section and no option is called max_token; did you mean sampling.max_tokens?"),
        ("qqq", "no section and no option is called qqq; sections: model, data, "),
    ],
)  # fmt: skip
def test_what_there_is_not_names_the_nearest(asked: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        options_text(asked)
    assert str(raised.value).startswith(words)


def test_sources_are_parsed_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, inside, most = ast.parse, set[int](), list[int]()

    def watched(*arguments: Any, **more: Any) -> ast.AST:
        inside.add(threading.get_ident())
        most.append(len(inside))
        time.sleep(0.01)
        inside.discard(threading.get_ident())
        return parse(*arguments, **more)

    monkeypatch.setattr(ast, "parse", watched)
    with ThreadPoolExecutor(4) as pool:
        classes = list({option.section for section in SECTIONS.values() for option in section.options})
        found = [*pool.map(field_texts.__wrapped__, classes)]
    assert max(most) == 1
    assert all(found)


def test_lines_fit_the_width() -> None:
    for asked in ("", *SECTIONS):
        assert max(map(len, options_text(asked).splitlines())) <= 120


def commands() -> dict[str, Any]:
    [found] = [action for action in make_parser()._actions if action.dest == "command"]
    return dict(found.choices or {})


@pytest.mark.parametrize("name", commands())
def test_the_help_of_a_command_has_examples_that_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    examples = re.findall(r"^  grpo (.+)$", capsys.readouterr().out.partition("examples:\n")[2], re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[0] == name
        parsed, rest = make_parser().parse_known_args(words)
        assert all("=" in text for text in [*rest, *getattr(parsed, "overrides", [])]), example


def test_help_is_there_at_once() -> None:
    """Without the libraries that take seconds; in CPU seconds, as others may use the machine."""
    heavy = {"torch", "ray", "transformers", "datasets", "pyarrow", "rich"}
    code = f"import sys, grpo.commands.cli; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    process = subprocess.Popen([sys.executable, "-m", "grpo", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 0.5
