"""The reasoning recipe's data, and the table and figure of its benchmark."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import arithmetic
import pytest
import reasoning as recipe
import yaml

from benchmarks import curves
from benchmarks import reasoning as bench
from grpo import config as config_module
from reward_fns.gsm8k import gsm8k

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "reasoning_cpu.yaml"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return recipe.problems()


def test_no_pair_of_numbers_is_in_two_splits_or_twice_in_one(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == recipe.SPLITS
    seen = [frozenset(row["question"].split("+")) for rows in splits.values() for row in rows]
    assert len(set(seen)) == len(seen)
    assert all(re.fullmatch(r"[1-9]\d{3}\+[1-9]\d{3}", row["question"]) for row in splits["eval"])


@pytest.mark.parametrize(
    ("a", "b", "written"),
    [
        (4827, 3596, "7+6=13 2+9+1=12 8+5+1=14 4+3+1=8"),
        (1000, 1000, "0+0=0 0+0=0 0+0=0 1+1=2"),
        (9999, 1, ""),
        (9999, 1001, "9+1=10 9+0+1=10 9+0+1=10 9+1+1=11"),
    ],
)
def test_the_working_is_written_as_on_paper(a: int, b: int, written: str) -> None:
    if not written:
        with pytest.raises(ValueError):  # numbers of different lengths have no such columns
            recipe.working(a, b)
        return
    assert recipe.working(a, b) == written


def test_the_working_of_every_row_leads_to_its_answer(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row in splits["train"]:
        a, b = row["question"].split("+")
        assert int(row["answer"]) == int(a) + int(b)
        digits, carry = "", "0"
        for (x, y), column in zip(zip(a[::-1], b[::-1], strict=True), row["working"].split(" "), strict=True):
            terms, total = column.split("=")
            assert terms == f"{x}+{y}" + ("+1" if carry == "1" else "")
            assert eval(terms) == int(total)
            digits, carry = total[-1] + digits, total[:-1] or "0"
        assert row["answer"] == (carry if carry == "1" else "") + digits


def test_a_row_fits_the_recipes_lengths_exactly(splits: dict[str, list[dict[str, Any]]]) -> None:
    config = config_module.load(RECIPE)
    ids, mask = recipe.encode(splits["pretrain"], recipe.COMPLETION)
    assert ids.shape[1] == recipe.PROMPT_TOKENS + recipe.COMPLETION_TOKENS
    assert mask.sum(1).max() == recipe.COMPLETION_TOKENS == 44
    assert config.data.max_prompt_tokens == recipe.PROMPT_TOKENS
    assert config.sampling.max_tokens >= recipe.COMPLETION_TOKENS
    assert config.data.gold_template == recipe.COMPLETION
    row, kept = ids[0].tolist(), mask[0].tolist()
    text = arithmetic.make_tokenizer(recipe.CHARACTERS).decode([i for i, k in zip(row, kept, strict=True) if k])
    assert text == recipe.COMPLETION.format(**splits["pretrain"][0]) + "<eos>"


def test_the_reward_reads_the_answer_and_nothing_of_the_working(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row in splits["eval"][:50]:
        gold = recipe.COMPLETION.format(**row)
        wrong = str(int(row["answer"]) + 10)
        assert gsm8k(gold, row) == 1.0
        assert gsm8k(recipe.COMPLETION.format(working=row["working"], answer=wrong), row) == 0.0
        assert gsm8k(recipe.COMPLETION.format(working="0+0=9 9+9=1", answer=row["answer"]), row) == 1.0
        assert gsm8k(row["working"], row) == 0.0  # cut short before the answer


LIST = {"base": {"title": "Base"}, "other": {"title": "Other"}}


def write_run(folder: Path, name: str, seed: int, accuracy: Sequence[float], wall: float = 100.0) -> None:
    """A run of two steps as `grpo train` leaves it: accuracy before, after one step, after two."""
    run = folder / name
    run.mkdir(parents=True)
    step = {"tokens/sampled": 1000.0, "time/step_s": 40.0, "optim/optimizer_steps": 8.0, "sync/seconds": 0.123}
    lines: list[dict[str, Any]] = [
        {"step": 0, "time": "2026-01-01", "eval/accuracy": accuracy[0]},
        {"step": 1, "time": "2026-01-01", "eval/accuracy": accuracy[1], "policy/clip_fraction": 0.01, **step},
        {"step": 2, "time": "2026-01-01", "eval/accuracy": accuracy[2], "policy/clip_fraction": 0.03, **step},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gain = accuracy[2] - accuracy[0]
    summary = {
        "accuracy_before": accuracy[0], "accuracy_after": accuracy[2], "accuracy_gain": gain,
        "accuracy_gain_interval": [gain - 0.02, gain + 0.03], "wall_s": wall, "exit_reason": "done",
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(dumped(seed))


def dumped(seed: int, *options: str) -> str:
    seeds = [f"run.seed={seed}", f"data.seed={seed}", f"run.name=any-{seed}", f"run.dir=runs/{seed}"]
    return config_module.dump(config_module.load(RECIPE, [*seeds, *options]))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two seeds of one variant and one of the other, kept."""
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    write_run(runs, "base-1", 1, [0.4, 0.6, 0.7])
    write_run(runs, "base-2", 2, [0.5, 0.7, 0.8], wall=50.0)
    write_run(runs, "other-2", 2, [0.4, 0.7, 0.9])
    for run in runs.iterdir():
        bench.keep(run, kept / run.name, (run / "config.yaml").read_text())
    return kept


def test_the_config_hash_is_of_what_changes_a_result_but_for_seeds() -> None:
    assert bench.config_hash(dumped(1)) == bench.config_hash(dumped(2))
    assert bench.config_hash(dumped(1)) != bench.config_hash(dumped(1, "optimizer.lr=1e-5"))
    assert bench.config_hash(dumped(1)) != bench.config_hash(dumped(1, "run.steps=7"))
    assert bench.config_hash(dumped(1)) == bench.config_hash(
        dumped(1, "cluster.cpus=7", "learner.zero_stage=2", "run.name=other")
    )
    assert re.fullmatch("[0-9a-f]{12}", bench.config_hash(dumped(1)))


def test_the_table_of_runs(results: Path) -> None:
    text = bench.page(bench.EMPTY_PAGE, bench.kept(results, LIST), LIST)
    name = bench.config_hash(dumped(1))
    rows = text.split("<!-- runs -->\n")[1].split("<!-- end of runs -->")[0].splitlines()
    assert rows[2:] == [
        f"| Base | 1 | 0.400 | 0.700 | 0.300 | 0.280 to 0.330 | 2,000 | 100 | `{name}` |",
        # 50 s of wall time, but the steps took 80: what ran before the interruption is not in it
        f"| Base | 2 | 0.500 | 0.800 | 0.300 | 0.280 to 0.330 | 2,000 | above 80 (resumed) | `{name}` |",
        f"| Other | 2 | 0.400 | 0.900 | 0.500 | 0.480 to 0.530 | 2,000 | 100 | `{name}` |",
    ]


def test_the_table_of_variants_compares_the_same_seeds(results: Path) -> None:
    text = bench.page(bench.EMPTY_PAGE, bench.kept(results, LIST), LIST)
    rows = text.split("<!-- variants -->\n")[1].split("<!-- end of variants -->")[0].splitlines()
    assert rows[2:] == [
        "| Base | 2 | 0.750 (0.700 to 0.800) | 0.300 (0.300 to 0.300) |  | 0.00 M | 100 | 8 | 0.0200 |",
        # 0.9 less the base's 0.8 of seed 2; not less its mean
        "| Other | 1 | 0.900 (0.900 to 0.900) | 0.500 (0.500 to 0.500) | 0.100 (0.100 to 0.100) | 0.00 M | 100 | 8 "
        "| 0.0200 |",
    ]


def test_what_is_written_around_the_tables_stays(results: Path) -> None:
    runs = bench.kept(results, LIST)
    written = bench.EMPTY_PAGE.replace("# Reasoning\n", "# Reasoning\n\nSeen by hand.\n") + "\nAnd below.\n"
    once = bench.page(written, runs, LIST)
    assert "\nSeen by hand.\n" in once
    assert once.endswith("\nAnd below.\n")
    assert bench.page(once, runs, LIST) == once
    with pytest.raises(SystemExit, match="end of runs"):
        bench.page(written.replace("<!-- end of runs -->\n", ""), runs, LIST)


def test_only_the_named_metrics_are_kept(results: Path) -> None:
    lines = [json.loads(line) for line in (results / "base-1" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["tokens/sampled"] == 1000
    assert not any({"time", "sync/seconds"} & line.keys() for line in lines)


def test_a_kept_run_under_a_wrong_name_is_refused(results: Path) -> None:
    (results / "base-1").rename(results / "base-7")
    with pytest.raises(SystemExit, match="base-7 holds no run"):
        bench.kept(results, LIST)


def test_a_kept_run_is_not_repeated_and_one_of_another_config_is_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: pytest.fail("trained again"))
    options = ["run.seed=1", "data.seed=1"]
    target = results / "base-1"
    kept = config_module.load(RECIPE, [*options, "run.save_every=10", "run.keep_last=1"])
    (target / "config.yaml").write_text(config_module.dump(kept))
    bench.train("base-1", str(RECIPE), options, target)
    with pytest.raises(SystemExit, match="was made with config"):
        bench.train("base-1", str(RECIPE), [*options, "optimizer.lr=1e-5"], target)


def test_every_variant_is_a_recipe_that_loads_with_the_same_budget() -> None:
    listed = yaml.safe_load((ROOT / bench.LIST).read_text())
    base = config_module.load(ROOT / listed["base"])
    assert next(iter(listed["variants"])) == "grpo"
    assert listed["variants"]["grpo"]["options"] == []
    for variant in listed["variants"].values():
        config = config_module.load(ROOT / listed["base"], variant["options"])
        assert config.optimizer == base.optimizer
        assert (config.run, config.data, config.sampling) == (base.run, base.data, base.sampling)
        a, b = config.algorithm, base.algorithm
        names = ("prompts_per_step", "group_size", "minibatches_per_step", "epochs_per_step")
        assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]


def test_the_figure_draws_the_mean_and_the_range() -> None:
    # 500 pixels for steps 0 to 10, 300 for values 1 to 0
    drawn = curves.svg({"a & b": [[(0, 0.0), (10, 0.5)], [(0, 0.5), (10, 1.0)]]}, x="step", y="accuracy")
    assert (curves.WIDTH - curves.LEFT - curves.RIGHT, curves.HEIGHT - curves.TOP - curves.BOTTOM) == (510, 350)
    svg = {"svg": "http://www.w3.org/2000/svg"}
    root = ElementTree.fromstring(drawn)
    [line] = root.findall("svg:polyline", svg)
    assert line.attrib["points"] == "60.0,282.5 570.0,107.5"  # means 0.25 and 0.75 of 350 from the bottom at 370
    [band] = root.findall("svg:polygon", svg)
    assert band.attrib["points"] == "60.0,195.0 570.0,20.0 570.0,195.0 60.0,370.0"
    assert "a & b" in [text.text for text in root.findall("svg:text", svg)]


def test_the_figure_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="same steps"):
        curves.svg({"a": [[(0, 0.0), (10, 0.5)], [(0, 0.5), (20, 1.0)]]}, x="step", y="accuracy")
    with pytest.raises(ValueError, match="not 0"):
        curves.svg({}, x="step", y="accuracy")
