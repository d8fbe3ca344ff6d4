"""Recipes: what loads, and the sentence that a mistake gets."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from grpo import config as module
from grpo.config import Config, EvalSetConfig, TrainSetConfig, dump, load
from grpo.config.validate import ENGINE_ARGUMENTS_TAKEN
from grpo.types import UserError

RECIPE = """
model: {path: some/folder, dtype: float32}
data: {train: train.jsonl}
algorithm: {prompts_per_step: 8, group_size: 4}
rewards: [{file: reward.py, weight: 2}]
run: {steps: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(recipe, overrides)
    return str(caught.value)


def test_values_defaults_and_overrides(recipe: Path) -> None:
    config = load(
        recipe, ["algorithm.group_size=16", "optimizer.lr=3e-4", "sampling.stop=[a,b]", "rewards.0.weight=0.5"]
    )
    assert config.algorithm.group_size == 16
    assert config.optimizer.lr == 3e-4
    assert config.sampling.stop == ("a", "b")
    assert config.rewards[0].weight == 0.5
    assert config.algorithm.eps_high == 0.2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.algorithm.group_size = 2  # type: ignore[misc]


@pytest.mark.parametrize("layout", ["colocated", "disaggregated"])
def test_defaults_on_each_device(recipe: Path, layout: str) -> None:
    """CUDA graphs on GPUs; no turns where samplers and learner have memory of their own; seeds everywhere. What is not
    given in bfloat16 goes together."""
    cpu, gpu = (
        load(recipe, [f"cluster.device={device}", f"cluster.layout={layout}", "model.dtype=bfloat16"])
        for device in ("cpu", "gpu")
    )
    assert (cpu.enforce_eager, gpu.enforce_eager) == (True, False)
    assert (cpu.takes_turns, gpu.takes_turns) == (False, layout == "colocated")
    assert cpu.sampling.seeded
    assert gpu.sampling.seeded
    assert cpu.learner.zero_stage == gpu.learner.zero_stage == 2
    assert load(recipe, ["cluster.device=gpu", "sampler.enforce_eager=true"]).enforce_eager
    assert not load(recipe, ["sampler.enforce_eager=false"]).enforce_eager


def test_text_overrides_are_taken_as_they_stand(recipe: Path) -> None:
    config = load(recipe, ["data.template={question}= :", "rewards[0].name=on", "run.name=7", "data.eval.sets=x: y"])
    assert config.data.template == "{question}= :"
    assert config.rewards[0].name == "on"
    assert config.run.name == "7"
    assert [dataset.path for dataset in config.data.eval.sets] == ["x: y"]
    assert load(recipe, ["run.name=a", "run.name=null"]).run.name is None


def test_the_saved_config_loads_to_the_same_config(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("{train: train.jsonl}", "{train: [a, {path: b, columns: {q: '{x}'}}]}"))
    config = load(
        recipe,
        [
            "sampling.stop_token_ids=[3,4]",
            "data.train.1.between.n=[0,1]",
            "rewards[0].sets=[a]",
            "data.eval.sets=x.jsonl",
            "data.eval.top_p=0.7",
        ],
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


def test_data_sets_are_lists_and_a_path_is_the_list_of_one(recipe: Path) -> None:
    one = load(recipe).data
    assert one.train == [TrainSetConfig(path="train.jsonl", split="train")]
    assert one.eval.sets == []
    text = RECIPE.replace(
        "train: train.jsonl", "train: [a, {path: b, weight: 2, columns: {q: '{x} {y[z]}'}}], eval: {sets: o/n:main}"
    )
    recipe.write_text(text)
    data = load(recipe, ["data.train.0.weight=0.5", "data.train[1].columns.answer={a}: {b}",
                         "data.train[1].between.level=[3,5]", "data.eval.sets[0].limit=10"]).data  # fmt: skip
    assert data.train[0] == TrainSetConfig(path="a", weight=0.5)
    assert data.train[1] == TrainSetConfig(
        path="b", weight=2.0, columns={"q": "{x} {y[z]}", "answer": "{a}: {b}"}, between={"level": [3.0, 5.0]}
    )
    assert data.eval.sets == [EvalSetConfig(path="o/n:main", split="test", limit=10)]
    again = load(recipe, ["data.train=[{path: c, split: x}, d]", "data.train.1.limit=3", "data.eval.sets=[]"]).data
    assert again.train == [TrainSetConfig(path="c", split="x"), TrainSetConfig(path="d", limit=3)]
    assert again.eval.sets == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train[0].colums={}", "unknown option data.train[0].colums; did you mean data.train[0].columns?"),
        ("data.train[0].columns={q: 1}", "data.train[0].columns.q must be a string, not 1"),
        ("data.train[0].columns=q", "data.train[0].columns must be of type dict[str, str], not 'q'"),
        ("data.train[0].columns=[q]", "data.train[0].columns must be of type dict[str, str], not ['q']"),
        ("sampler.engine=[1]", "sampler.engine must be of type dict[str, Any], not [1]"),
        ("data.train[0].limit=many", "data.train[0].limit must be of type int | None, not 'many'"),
        ("data.train[0].limit=0", "data.train[0].limit must be at least 1"),
        ("data.train[0].between.level=[5,3]", "data.train[0].between.level must be [lowest, highest], not [5.0, 3.0]"),
        ("data.train[0].between.level=[5]", "data.train[0].between.level must be [lowest, highest]"),
        ("data.train[0].between.level=[5,.inf]", "data.train[0].between.level[1] must be a finite number"),
        ("data.train[0].weight=2", "data.train[0].weight has no effect with one data set"),
        ("data.train[0].name=", "data.train[0].name must not be empty"),
        ("data.train[1].split=x", "the recipe has 1 data.train, counted from 0"),
        ("data.train={path: x}", "data.train must be a path or a list of {path, split, name, ...}"),
        ("data.train=[7]", "data.train[0] must be a mapping, not 7"),
        ("data.train=[{split: x}]", "data.train[0].path is required and not set"),
        ("data.train=[]", "data.train is empty: give at least one data set"),
        ("rewards.0.weight=0", "rewards[0].weight: no reward has a weight other than 0"),
        ("rewards.0.weight=.nan", "rewards[0].weight must be a finite number"),
        ("data.split=x", "unknown option data.split; did you mean data.train[i].split?"),
        ("data.eval.path=x", "unknown option data.eval.path; did you mean data.eval.sets[i].path?"),
        ("data.eval.sets=null", "data.eval.sets must be a path or a list of"),
        ("data.contaminated=drop", "data.contaminated=drop has no effect without data.eval.sets"),
        ("data.overlap_ngram=5", "data.overlap_ngram=5 has no effect without data.eval.sets"),
        ("data.contaminated=remove", "data.contaminated must be one of report, drop"),
        ("data.overlap_ngram=-1", "data.overlap_ngram must not be negative"),
        ("rewards[0].sets=gsm8k", "rewards[0].sets must be of type tuple[str, ...]"),
        ("algorithm.group_sise=4", "unknown option algorithm.group_sise; did you mean algorithm.group_size?"),
        ("algorithm.lr=1", "did you mean optimizer.lr?"),
        ("sampler.temperature=1", "did you mean sampling.temperature?"),
        ("algoritm.group_size=4", "did you mean algorithm?"),
        ("rewards.0.wieght=1", "did you mean rewards[0].weight?"),
        ("sampling.top_p=0.9", "sampling.top_p cannot be used in training"),
        ("sampling.repetition_penalty=1.1", "cannot be used in training"),
        ("algorithm.group_size=four", "algorithm.group_size"),
        ("algorithm.group_size=1", "algorithm.group_size must be at least 2"),
        ("model.dtype=float16", "model.dtype"),
        ("algorithm.aggregation=mean", "algorithm.aggregation"),
        ("algorithm.minibatches_per_step=3", "does not divide algorithm.prompts_per_step=8; nearest that does: 2"),
        ("learner.tokens_per_microbatch=100", "set it to 2048 or more"),
        ("sampling.temperature=0", "sampling.temperature must be above 0, not 0.0: greedy completions have no"),
        (
            "rewards.0.memory_gib=0.1",
            "rewards[0].memory_gib must be at least 0.25, not 0.1: Python itself needs that much",
        ),
        ("optimizer.betas=[0.9,1]", "optimizer.betas[1] must be at least 0 and below 1, not 1.0"),
        ("algorithm.max_failed_of.timeout=-1", "algorithm.max_failed_of.timeout must not be negative, not -1.0"),
        ("learner.zero_stage=4", "learner.zero_stage must lie between 0 and 3, not 4"),
        ("learner.offload=parameters", "needs learner.zero_stage=3"),
        ("learner.reference_offload=true", "has no effect without a reference (algorithm.kl_coef is 0)"),
        ("cluster.device=cuda", "cluster.device"),
        ("data.eval.every=5", "data.eval.every=5 has no effect without data.eval.sets"),
        ("data.system_prompt=hi", "data.system_prompt=hi has no effect with data.style=template, only with chat"),
        ("data.date=2024-07-26", "data.date=2024-07-26 has no effect with data.style=template, only with chat"),
        ("algorithm.importance_high=0.5", "algorithm.importance_high must be at least 1, not 0.5"),
        ("algorithm.rejection_low=1.5", "algorithm.rejection_low must be above 0 and below 1, not 1.5"),
        ("algorithm.dual_clip=0.5", "algorithm.dual_clip must be above 1"),
        ("algorithm.gamma=0.9", "algorithm.gamma=0.9 has no effect with algorithm.advantage=group_normalized"),
        ("algorithm.pass_k=2", "algorithm.pass_k=2 has no effect"),
        ("algorithm.sapo_tau_negative=2", "has no effect with algorithm.loss=ppo_clip"),
        ("algorithm.constant_length=9", "has no effect with algorithm.aggregation=token_mean"),
        ("algorithm.max_kl_old=0.1", "has no effect with one optimizer step per step"),
        ("algorithm.kl_estimator=k1", "has no effect without a reference"),
        ("algorithm.kl_target=0.1", "has no effect without a reference"),
        ("algorithm.reference_refresh_every=5", "has no effect without a reference"),
        ("algorithm.length_penalty=2", "has no effect without algorithm.length_penalty_tokens"),
        ("algorithm.length_penalty_tokens=2000", "must lie between 0 and sampling.max_tokens"),
        ("critic.coef=0.5", "critic.coef=0.5 has no effect with algorithm.advantage=group_normalized, only with gae"),
        ("critic.optimizer.lr=1", "critic.optimizer.lr=1.0 has no effect with algorithm.advantage=group_normalized"),
        ("rewards=[]", "rewards is empty"),
        ("run.steps", "not of the form section.option=value"),
        ("optimizer.lr=inf", "optimizer.lr must be a finite number"),
        ("rewards.0.weight=nan", "rewards[0].weight must be a finite number"),
        ("optimizer.betas=[2,3]", "optimizer.betas[0] must be at least 0 and below 1"),
        ("optimizer.eps=-1", "optimizer.eps must be above 0"),
        ("data.seed=-1", "data.seed must lie between 0 and 4294967295, not -1"),
        ("cluster.sampler_cpus=-3", "cluster.sampler_cpus must not be negative"),
        ("sampler.engine={logprobs_mode: raw_logprobs}", "sampler.engine.logprobs_mode is set by other options"),
        ("run.wandb_project=p", "run.wandb_project=p has no effect without run.wandb=true"),
        ("sampler.gpu_memory_utilization=0.5", "has no effect with cluster.device=cpu, only with gpu"),
        ("algorithm.eps_low=1.5", "algorithm.eps_low must be above 0 and at most 1"),
        ("algorithm.eps_low=0", "algorithm.eps_low must be above 0 and at most 1"),
        ("model.attention=flash_attention_2", "runs on GPUs only; nearest on CPU: model.attention=sdpa"),
        ("run.seed=4294967296", "run.seed must lie between 0 and 4294967295, not 4294967296"),
        ("data.seed=99999999999999999999", "data.seed"),
        ("run.name=../../etc", "without slashes; nearest: run.name=etc"),
        ("run.name=..", "must be the name of a folder inside run.dir"),
        ("rewards.0.weight=heavy", "rewards[0].weight must be of type float, not 'heavy'"),
        ("rewards[3].weight=1", "the recipe has 1 rewards, counted from 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be of type tuple[float, float], not [0.9]"),
        ("data.eval.every=often", "data.eval.every must be of type int, not 'often'"),
        ("optimizer.betas=[0.9,[0.95]]", "optimizer.betas[1] must be a single value, not [0.95]"),
        ("sampling.stop=[a,{b: c}]", "sampling.stop[1] must be a single value, not {'b': 'c'}"),
        ("algorithm.loss=ppo", "not 'ppo'; did you mean ppo_clip?"),
        ("algorithm.aggregation=token-mean", "did you mean token_mean?"),
    ],
)
def test_mistakes_name_the_option_and_the_way_out(recipe: Path, override: str, words: str) -> None:
    assert words in refusal(recipe, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.dtype=bfloat16", "learner.zero_stage=0"], "nearest: learner.zero_stage=1"),
        (
            ["data.gold_template=[{answer}]", "rewards.0.gold=false"],
            "has no effect without a reward that has gold: true",
        ),
        (["optimizer.name=sgd", "optimizer.betas=[0.9,0.99]"], "has no effect with optimizer.name=sgd"),
        (["cluster.address=auto", "cluster.cpus=4"], "cluster.cpus=4 has no effect on a cluster that runs already"),
        (
            ["data.eval.sets=x", "data.eval.sets[0].samples_per_prompt=0"],
            "samples_per_prompt must be at least 1, not 0",
        ),
        (["data.train=[a,b]", "data.train.1.weight=2"], "data.train[0].weight is missing while other data sets have"),
        (
            ["data.train=[a,b]", "data.train.0.weight=2", "data.train.1.weight=0"],
            "data.train[1].weight must be above 0",
        ),
        (["data.eval.sets=x", "data.eval.top_p=7"], "data.eval.top_p must be above 0 and at most 1, not 7.0"),
        (["algorithm.loss=gspo"], "algorithm.aggregation=token_mean cannot be combined with algorithm.loss=gspo"),
        (["algorithm.loss=gmpo", "algorithm.aggregation=sequence_sum"], "it takes sequence_mean"),
        (
            ["algorithm.loss=reinforce", "algorithm.eps_low=0.1"],
            "algorithm.eps_low=0.1 has no effect with algorithm.loss=reinforce, only with ppo_clip, gspo, cispo or "
            "gmpo; leave it out (default: algorithm.eps_low=0.2)",
        ),
        (
            ["algorithm.advantage=gae", "critic.optimizer.name=sgd", "critic.optimizer.eps=1"],
            "critic.optimizer.eps=1.0 has no effect with critic.optimizer.name=sgd, only with adamw",
        ),
        (
            ["data.style=chat", "data.messages_column=turns", "data.system_prompt=hi"],
            "data.system_prompt has no effect when data.messages_column gives the turns",
        ),
        (
            ["algorithm.kl_coef=0.1", "learner.zero_stage=3", "learner.reference_offload=true"],
            "has no effect with learner.zero_stage=3, only with 0, 1 or 2",
        ),
        (
            ["algorithm.loss=gspo", "algorithm.aggregation=sequence_mean", "algorithm.dual_clip=3"],
            "algorithm.loss=gspo",
        ),
        (["algorithm.advantage=leave_one_out", "algorithm.std_eps=0.1"], "with algorithm.advantage=leave_one_out"),
        (["algorithm.advantage=pass_at_k", "algorithm.pass_k=5"], "algorithm.group_size must be at least 5"),
        (["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1"], "its expected gradient is 0"),
        (
            ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k2", "algorithm.kl_gradient=ratio_weighted"],
            "it is not the gradient of the KL",
        ),
        (
            ["algorithm.kl_coef=0.1", "algorithm.kl_place=reward", "algorithm.kl_gradient=k2"],
            "no effect with algorithm.kl_place=reward",
        ),
        (["algorithm.kl_coef=0.1", "algorithm.kl_horizon=5"], "has no effect without algorithm.kl_target"),
        (["algorithm.kl_coef=0.1", "algorithm.kl_place=reward"], "take algorithm.kl_estimator=k1"),
        (["algorithm.kl_coef=0.1", "algorithm.kl_place=reward", "algorithm.kl_estimator=k2"], "kl_estimator=k1"),
        (["algorithm.kl_coef=0.1", "algorithm.reference_refresh_every=3"], "no effect in run.steps=3 steps"),
        (
            ["algorithm.loss=gmpo", "algorithm.aggregation=sequence_mean", "algorithm.advantage=gae"],
            "algorithm.advantage=gae gives each token its own",
        ),
        (
            [
                "algorithm.loss=gmpo",
                "algorithm.aggregation=sequence_mean",
                "algorithm.kl_coef=0.1",
                "algorithm.kl_place=reward",
                "algorithm.kl_estimator=k1",
            ],
            "algorithm.kl_place=reward gives each token its own",
        ),
        (["model.dtype=float32", "model.float32_head=true"], "model.float32_head=true has no effect"),
        (
            ["algorithm.advantage=gae", "critic.truncated=bootstrap", "algorithm.mask_truncated=true"],
            "critic.truncated=bootstrap has no effect",
        ),
        (
            ["algorithm.kl_coef=0.1", "algorithm.reference_refresh_every=2", "algorithm.reference_average=0.1"],
            "both change the reference",
        ),
        (
            ["algorithm.kl_coef=0.1", "algorithm.reference_average=0.1", "model.dtype=bfloat16"],
            "needs model.dtype=float32",
        ),
        (["algorithm.importance_level=none", "algorithm.importance_mode=mask"], "with algorithm.importance_level=none"),
        (["algorithm.mask_truncated=true", "algorithm.length_penalty_tokens=4"], "choose one"),
        (["algorithm.advantage=gae", "algorithm.max_refills=2"], "which algorithm.advantage=gae can learn from"),
        (
            ["cluster.device=gpu", "cluster.samplers=2", "cluster.tensor_parallel=2", "cluster.learner_ranks=2"],
            "2 samplers x 2 tensor_parallel x 1 pipeline_parallel are 4 GPUs, cluster.learner_ranks=2; nearest: "
            "cluster.learner_ranks=4",
        ),
        (["cluster.device=gpu", "learner.zero_stage=0"], "nearest: cluster.sleep=false"),
        (["cluster.sleep=true", "learner.zero_stage=3"], "nearest: cluster.sleep=false"),
        (["cluster.device=gpu", "model.attention=flash_attention_3"], "bfloat16 only; nearest: model.attention=sdpa"),
        (
            ["cluster.sleep=true", "model.dtype=bfloat16", "learner.zero_stage=1"],
            "nearest: learner.zero_stage=2",
        ),
        (["cluster.reward_nodes=3", "cluster.reward_workers=2"], "nearest: cluster.reward_nodes=2"),
        (
            ["cluster.layout=disaggregated", "cluster.sleep=false"],
            "cluster.sleep=false has no effect with cluster.layout=disaggregated",
        ),
        (
            ["cluster.device=gpu", "learner.threads=2"],
            "learner.threads=2 has no effect on a GPU without learner.offload",
        ),
    ],
)
def test_pairs_that_do_not_go_together(recipe: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(recipe, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.advantage=gae", "algorithm.group_size=1", "critic.coef=0.5", "critic.optimizer.lr=1e-3"],
        ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1", "algorithm.kl_gradient=k2"],
        ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1", "algorithm.kl_place=reward"],
        ["algorithm.loss=gspo", "algorithm.aggregation=sequence_mean", "algorithm.eps_low=3e-4"],
        ["algorithm.advantage=pass_at_k", "algorithm.pass_k=2"],
    ],
)
def test_objectives_that_go_together(recipe: Path, overrides: list[str]) -> None:
    load(recipe, overrides)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("  name: no", "run.name must be a string, not False"),
        ("  name: 007", 'run.name must be a string, not 7; write "7"'),
        (
            "  name: $USER",
            "run.name=$USER has $USER, which is not replaced here; write it in the recipe as ${oc.env:USER}",
        ),
        ("  dir: $HOME/runs", "run.dir=$HOME/runs has $HOME, which is not replaced here"),
        ('  name: "a\\nb"', "must be printable"),
        ("\tname: a", "the line is indented with a tab, but YAML needs spaces"),
    ],
)
def test_texts_that_yaml_or_a_shell_would_read_otherwise(recipe: Path, run: str, words: str) -> None:
    tree = {section: value for section, value in yaml.safe_load(recipe.read_text()).items() if section != "run"}
    recipe.write_text(f"{yaml.safe_dump(tree)}run:\n  steps: 1\n{run}\n")
    assert words in refusal(recipe)


def test_a_variable_in_an_override_is_not_replaced(recipe: Path) -> None:
    assert "run.dir=$SCRATCH/runs has $SCRATCH, which is not replaced" in refusal(recipe, "run.dir=$SCRATCH/runs")
    assert load(recipe, ["run.dir=a$/runs"]).run.dir == "a$/runs"
    assert "recipe.yaml is a folder" not in refusal(recipe.parent / "none.yaml")
    assert "is a folder" in refusal(recipe.parent)


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 1),
        (["cluster.samplers=2", "cluster.tensor_parallel=2", "cluster.learner_ranks=4"], 4),
        (["cluster.layout=disaggregated", "cluster.samplers=3", "cluster.pipeline_parallel=2"], 7),
    ],
)
def test_gpu_layouts_that_work(recipe: Path, overrides: list[str], gpus: int) -> None:
    config = load(recipe, ["cluster.device=gpu", *overrides])
    assert config.on_gpu
    assert config.gpus_used == gpus


def listed() -> list[str]:
    """The names that `grpo options` lists."""
    return re.findall(r"^([\w.\[\]]+) = ", module.options_text(), re.MULTILINE)


def test_every_option_misspelt_by_one_letter_is_found(recipe: Path) -> None:
    """Swapping two letters of any option's name must point back at that option."""
    for name in listed():
        name = name.replace("[i]", ".0")
        section, _, option = name.rpartition(".")
        wrong = option[0] + option[2:3] + option[1:2] + option[3:] if option[1:2] != option[2:3] else option + "x"
        if wrong == option:
            continue
        message = refusal(recipe, "data.eval.sets=x", f"{section}.{wrong}=1")
        assert "unknown option" in message
        assert f"{section.replace('.0', '[0]')}.{option}?" in message, message


@pytest.mark.slow
def test_every_letter_of_every_option_left_out_or_replaced(recipe: Path) -> None:
    """The suggestion may be the option itself or, where another is as near, that one; it is always a real one."""
    names = [name.replace("[i]", ".0") for name in listed()]
    missed = []
    for name in names:
        section, _, option = name.rpartition(".")
        for i in range(len(option)):
            for wrong in {option[:i] + option[i + 1 :], option[:i] + "x" + option[i + 1 :]} - {""}:
                if f"{section}.{wrong}" in names or not wrong.isidentifier():
                    continue
                message = refusal(recipe, "data.eval.sets=x", f"{section}.{wrong}=1")
                assert "unknown option" in message
                suggested = re.search(r"did you mean ([\w.\[\]]+)\?", message)
                if suggested is None or re.sub(r"\[.\]", ".0", suggested[1]) != name:
                    missed.append((wrong, suggested and suggested[1]))
                    assert suggested is None or re.sub(r"\[.\]", ".0", suggested[1]) in names
    assert len(missed) < 40, missed


def test_a_missing_required_option_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("group_size: 4", ""))
    assert "algorithm.group_size is required" in refusal(path)


def test_a_missing_recipe_names_the_nearest(recipe: Path) -> None:
    assert "did you mean" in refusal(recipe.with_name("recipes.yaml"))


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: 3", "model: {path: a}\nmodel: {path: b}"])
def test_broken_yaml_is_a_user_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert str(path) in refusal(path)


def test_two_rewards_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("{file: reward.py, weight: 2}", "{file: a.py, name: f}, {file: b/a.py, name: f}"))
    assert "rewards[0] and rewards[1] are both a.f" in refusal(path)


def test_functions_of_one_name_in_two_files_are_told_apart_by_the_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    rewards = "{file: gsm.py, name: compute_score}, {file: b/math.py, name: compute_score}, {file: polite.py}"
    path.write_text(RECIPE.replace("{file: reward.py, weight: 2}", rewards))
    assert module.part_names(load(path).rewards) == ["gsm.compute_score", "math.compute_score", "polite"]


def test_options_lists_every_option_once() -> None:
    names = listed()
    assert len(names) == len(set(names))
    assert {"model.path", "data.eval.top_k", "rewards[i].gold", "run.steps"} <= set(names)
    assert len(Config.__dataclass_fields__) == 11


@pytest.mark.parametrize(
    "template",
    [
        "Cost ${a}: {question}",
        "\\${a}",
        "$${{question}}",
        "${oc.env:HOME}",
        "\\\\${a}",
        "${",
        "a: b # c\n- {question}",
        "no",
    ],
)
def test_a_dumped_config_loads_as_it_was(template: str, recipe: Path, tmp_path: Path) -> None:
    """Nothing in it is taken for an interpolation: ${oc.env:...} would put an environment's value in."""
    loaded = load(recipe)
    changed = dataclasses.replace(loaded, data=dataclasses.replace(loaded.data, template=template))
    path = tmp_path / "config.yaml"
    path.write_text(dump(changed))
    assert load(path) == changed


@pytest.mark.parametrize(
    "name",
    ["70e8761", "1e5", "-1.5E3", "1_0e4", ".5e3", "1.e9", "0x1f", "017", "1:30", "1_000", "+12", ".inf", ".NaN", "true",
     "off", "~", "null", "2026-01-31", "70e", "e5"],
)  # fmt: skip
def test_a_text_that_looks_like_another_value_stays_a_text(name: str, recipe: Path, tmp_path: Path) -> None:
    """In a dumped config, as a key and as a value, and in a recipe that is given as a mapping."""
    loaded = load(recipe)
    [train] = loaded.data.train
    data = dataclasses.replace(loaded.data, train=[dataclasses.replace(train, columns={name: "x"})], template=name)
    changed = dataclasses.replace(loaded, data=data, run=dataclasses.replace(loaded.run, name=name))
    path = tmp_path / "config.yaml"
    path.write_text(dump(changed))
    assert load(path) == changed
    tree = yaml.safe_load(recipe.read_text())
    assert load({**tree, "run": {**tree["run"], "name": name}}).run.name == name


def test_what_the_sampler_gives_vllm_itself_cannot_be_given_twice() -> None:
    """Else it would be refused, in other words, by a process on another node."""
    tree = ast.parse((Path(module.__file__).parents[1] / "sampler" / "vllm" / "engine.py").read_text())
    [call] = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "EngineArgs"]
    given = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    assert len(given) > 15
    assert given <= ENGINE_ARGUMENTS_TAKEN


@pytest.mark.parametrize(
    "name", ["data.train", "data.train[0].path", "rewards[1].file", "rewards", "optimizer", "rewards[2]"]
)
def test_options_and_their_sections_may_be_named(name: str) -> None:
    module.refuse_unknown(name, f"allow={name}")


@pytest.mark.parametrize(
    ("name", "near"),
    [("data.trian", "data.train"), ("optimizer.rl", "optimizer.lr"), ("rewards[0].fil", "rewards[i].file")],
)
def test_an_option_that_is_none_is_named_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as raised:
        module.refuse_unknown(name, f"allow={name}")
    assert str(raised.value) == f"allow={name}: unknown option {name}; did you mean {near}?"
