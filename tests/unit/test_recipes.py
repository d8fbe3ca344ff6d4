"""Every recipe and every YAML in the documentation: loads, says where it comes from, keeps the published numbers, and
is made small by nothing but sizes. tests/integration/test_recipe_runs.py runs them."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import stand_in
from documented import RECIPES, ROOT, blocks, completed
from transformers import AutoTokenizer

from benchmarks import recipe_hours
from grpo.config import Config, EvalConfig, load
from grpo.run.checkpoints import differences


@functools.cache
def loaded(name: str) -> Config:
    return load(RECIPES[name])


def header(name: str) -> str:
    """The comment at the top of a recipe on one line."""
    lines = RECIPES[name].read_text().splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:count])


def test_there_are_the_recipes_of_the_field() -> None:
    assert len(RECIPES) >= 12
    assert len(blocks("yaml")) >= 4


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_yaml_of_the_documentation_loads(block: str, tmp_path: Path) -> None:
    load(completed(block, tmp_path))


@pytest.mark.parametrize("name", RECIPES)
def test_headers_say_source_result_hardware_hours_and_what_is_not_the_source_s(name: str) -> None:
    lines = RECIPES[name].read_text()
    for key in ("Source", "Published", "Hardware", "Hours", "Not given by the source, chosen here", "Deviations"):
        assert re.search(rf"^# {key}: \S.{{20}}", lines, re.M), key
    assert re.search(r"\.(sh|yaml|md|py)\b", re.search(r"^# Source: (.*)", lines, re.M)[1])  # type: ignore[index]


@pytest.mark.parametrize("name", RECIPES)
def test_headers_agree_with_the_options(name: str) -> None:
    """The GPUs and the hours."""
    config = loaded(name)
    assert recipe_hours.gpus_of(RECIPES[name])[0] == config.gpus_used
    assert f"Hours: {recipe_hours.reckoned(RECIPES[name])}, estimated" in header(name)


@pytest.mark.parametrize("name", RECIPES)
def test_overrides_that_a_header_names_load(name: str) -> None:
    """Options that stand side by side belong together."""
    for run in re.findall(r"(?:(?<=\s)[a-z_]+\.[\w.\[\]]+=[^\s:;]+\s?)+", f"{header(name)} "):
        load(RECIPES[name], [word.rstrip(".") for word in run.split()])


def test_hours_are_the_plan_s_with_evaluations() -> None:
    """countdown_3b: 21 evaluations of 512 completions beside its 200 steps."""
    config, assumed = loaded("countdown_3b"), recipe_hours.ASSUMED["countdown_3b"]
    assert recipe_hours.evaluated(config) == (21, 512)
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=EvalConfig()))
    assert recipe_hours.evaluated(without) == (2, 0)
    assert recipe_hours.hours(config, "H100", 2, assumed) > recipe_hours.hours(without, "H100", 2, assumed)


def test_every_recipe_is_documented_and_reckoned() -> None:
    page, readme = (ROOT / "docs" / "recipes.md").read_text(), (ROOT / "README.md").read_text()
    for name in RECIPES:
        assert f"`{name}`" in page
        assert name in readme
        assert name in recipe_hours.ASSUMED
        count, gpu = recipe_hours.gpus_of(RECIPES[name])
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {count} x {gpu} |" in row
        assert f"| {recipe_hours.reckoned(RECIPES[name])} |" in row


# (source, recipe, {option: published value}); batches are written as the sources' own words divide out:
# minibatches_per_step = train batch / mini batch, group_size = n, max_tokens = response length.
PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    (
        "slime scripts/run-qwen2.5-0.5B-reproducibility.sh: 32 x 8, gbs 256, 100 rollouts, lr 1e-6, wd .1, eps .2/.28, "
        "KL 0, 1024, adam beta2 .98",
        "gsm8k_qwen2.5_0.5b",
        {
            "algorithm.prompts_per_step": 32, "algorithm.group_size": 8, "algorithm.minibatches_per_step": 1,
            "run.steps": 100, "optimizer.lr": 1e-6, "optimizer.weight_decay": 0.1, "optimizer.betas": (0.9, 0.98),
            "algorithm.entropy_coef": 0.0, "algorithm.eps_low": 0.2,
            "algorithm.eps_high": 0.28, "algorithm.kl_coef": 0.0, "sampling.max_tokens": 1024,
            "model.path": "Qwen/Qwen2.5-0.5B-Instruct",
        },
    ),
    (
        "SkyRL examples/train/gsm8k/run_gsm8k.sh: bsz 1024, mini 256, n 5, lr 1e-6, KL 0.001 k3, eps 0.2, 512/1024; "
        "140 steps; skyrl_train/config/ppo_base_config.yaml: wd 1e-2",
        "gsm8k_qwen2.5_1.5b",
        {
            "algorithm.prompts_per_step": 1024, "algorithm.group_size": 5, "algorithm.minibatches_per_step": 4,
            "run.steps": 140, "optimizer.lr": 1e-6, "optimizer.weight_decay": 0.01, "optimizer.betas": (0.9, 0.999),
            "algorithm.eps_low": 0.2, "algorithm.eps_high": 0.2,
            "algorithm.kl_coef": 0.001, "algorithm.kl_estimator": "k3", "algorithm.kl_place": "loss",
            "data.max_prompt_tokens": 512, "sampling.max_tokens": 1024, "model.path": "Qwen/Qwen2.5-1.5B-Instruct",
        },
    ),
    (
        "verl examples/grpo_trainer/run_qwen3_8b_fsdp.sh: bsz 1024, mini 256, n 5, lr 1e-6, KL loss 0.001 low_var_kl, "
        "1024/2048, 15 epochs of 7 batches",
        "gsm8k_qwen2.5_7b",
        {
            "algorithm.prompts_per_step": 1024, "algorithm.group_size": 5, "algorithm.minibatches_per_step": 4,
            "run.steps": 105, "optimizer.lr": 1e-6, "algorithm.kl_coef": 0.001, "algorithm.kl_estimator": "k3",
            "algorithm.kl_place": "loss", "data.max_prompt_tokens": 1024, "sampling.max_tokens": 2048,
        },
    ),
    (
        "simpleRL-reason train_grpo_math_tune_ray.sh and README.md: bsz 1024, n 8, lr 5e-7, KL loss 1e-4 low_var, "
        "entropy 0.001, eps 0.2, mini 256, 1024/8192, about 100 steps; evaluation T 1, top_p .95, 16000 tokens, "
        "AIME24 avg@32",
        "math_simplerl_zoo_7b",
        {
            "algorithm.prompts_per_step": 1024, "algorithm.group_size": 8, "algorithm.minibatches_per_step": 4,
            "run.steps": 100, "optimizer.lr": 5e-7, "algorithm.kl_coef": 1e-4, "algorithm.kl_estimator": "k3",
            "algorithm.kl_place": "loss", "algorithm.entropy_coef": 0.001, "algorithm.eps_low": 0.2,
            "algorithm.eps_high": 0.2, "data.max_prompt_tokens": 1024, "sampling.max_tokens": 8192,
            "sampling.temperature": 1.0, "data.train.0.between.level": [3, 5], "data.eval.temperature": 1.0,
            "data.eval.top_p": 0.95, "data.eval.max_tokens": 16000, "data.eval.sets.5.samples_per_prompt": 32,
            "model.path": "Qwen/Qwen2.5-7B",
        },
    ),
    (
        "understand-r1-zero examples/qwen2.5-math-7b.sh: lr 1e-6 const, beta 0, n 8, 128 prompts in updates of 128 "
        "completions, 1024/3000, T 1, ZeRO-2; no std, constant length; evaluation greedy every 16",
        "math_drgrpo_7b",
        {
            "algorithm.prompts_per_step": 128, "algorithm.group_size": 8, "algorithm.minibatches_per_step": 8,
            "optimizer.lr": 1e-6, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0,
            "algorithm.kl_coef": 0.0, "algorithm.advantage": "group_centered",
            "algorithm.aggregation": "constant_length", "algorithm.constant_length": 3000,
            "sampling.max_tokens": 3000, "sampling.temperature": 1.0, "data.max_prompt_tokens": 1024,
            "learner.zero_stage": 2, "data.train.0.between.level": [3, 5], "data.eval.temperature": 0.0,
            "data.eval.max_tokens": 3000, "data.eval.every": 16, "model.path": "Qwen/Qwen2.5-Math-7B",
        },
    ),
    (
        "verl-recipe dapo/test_dapo_7b_math.sh: 512 x 16, mini 32, lr 1e-6 (10 warm: steps, of 16 updates), wd .1, "
        "eps .2/.28, c 10, no KL, token-mean, 2048/8192, buffer 4096, no filter, 200 steps; evaluation top_p .7",
        "dapo_7b",
        {
            "algorithm.prompts_per_step": 512, "algorithm.group_size": 16, "algorithm.minibatches_per_step": 16,
            "run.steps": 200, "optimizer.lr": 1e-6, "optimizer.warmup_steps": 160, "optimizer.weight_decay": 0.1,
            "optimizer.max_grad_norm": 1.0, "algorithm.eps_low": 0.2, "algorithm.eps_high": 0.28,
            "algorithm.dual_clip": 10.0, "algorithm.kl_coef": 0.0, "algorithm.aggregation": "token_mean",
            "data.max_prompt_tokens": 2048, "sampling.max_tokens": 8192, "algorithm.length_penalty_tokens": 4096,
            "algorithm.length_penalty": 1.0, "algorithm.max_refills": 0, "sampling.temperature": 1.0,
            "data.eval.temperature": 1.0, "data.eval.top_p": 0.7, "data.eval.samples_per_prompt": 32,
        },
    ),
    (
        "verl-recipe dapo/run_dapo_qwen2.5_32b.sh: 512 (gen 1536, at most 10 times) x 16, mini 32, lr 1e-6 (10 "
        "warm: steps, of 16 updates), wd .1, eps .2/.28, c 10, no KL, token-mean, 2048/20480, buffer 4096, T 1; "
        "evaluation top_p .7",
        "dapo_32b",
        {
            "algorithm.prompts_per_step": 512, "algorithm.group_size": 16, "algorithm.minibatches_per_step": 16,
            "optimizer.lr": 1e-6, "optimizer.warmup_steps": 160, "optimizer.weight_decay": 0.1,
            "optimizer.max_grad_norm": 1.0, "algorithm.eps_low": 0.2, "algorithm.eps_high": 0.28,
            "algorithm.dual_clip": 10.0, "algorithm.kl_coef": 0.0, "algorithm.aggregation": "token_mean",
            "data.max_prompt_tokens": 2048, "sampling.max_tokens": 20480, "algorithm.length_penalty_tokens": 4096,
            "algorithm.length_penalty": 1.0, "algorithm.max_refills": 9, "sampling.temperature": 1.0,
            "data.eval.temperature": 1.0, "data.eval.top_p": 0.7, "data.eval.samples_per_prompt": 32,
            "model.path": "Qwen/Qwen2.5-32B",
        },
    ),
    (
        "TinyZero scripts/train_tiny_zero_a100_grpo.sh: bsz 128, mini 64, n 5, 256/1024, lr 1e-6, KL loss 0.001 "
        "low_var; verl/utils/reward_score/countdown.py: 0 / 0.1 / 1; "
        "verl/trainer/config/ppo_trainer.yaml: entropy .001",
        "countdown_3b",
        {
            "algorithm.prompts_per_step": 128, "algorithm.group_size": 5, "algorithm.minibatches_per_step": 2,
            "data.max_prompt_tokens": 256, "sampling.max_tokens": 1024, "optimizer.lr": 1e-6,
            "algorithm.kl_coef": 0.001, "algorithm.kl_estimator": "k3", "algorithm.kl_place": "loss",
            "algorithm.entropy_coef": 0.001, "rewards.0.weight": 0.9, "rewards.1.weight": 0.1,
            "model.path": "Qwen/Qwen2.5-3B",
        },
    ),
    *(
        (
            f"rllm scripts/deepscaler/train/deepscaler_1.5b_{stage}.sh: bsz 128, mini 64, lr 1e-6, KL loss 0.001 "
            "low_var, T 0.6, n 8 (8K) or 16 (16K, 24K); README.md: switches at steps 1040 and 1520; "
            "its verl: entropy .001",
            f"deepscaler_1.5b_{stage}",
            {
                "algorithm.prompts_per_step": 128, "algorithm.group_size": group, "algorithm.minibatches_per_step": 2,
                "optimizer.lr": 1e-6, "algorithm.kl_coef": 0.001, "algorithm.kl_estimator": "k3",
                "algorithm.kl_place": "loss", "algorithm.entropy_coef": 0.001, "sampling.temperature": 0.6,
                "data.eval.temperature": 0.6,
                "data.max_prompt_tokens": 1024, "sampling.max_tokens": tokens, **more,
            },
        )
        for stage, group, tokens, more in (
            ("8k", 8, 8192, {"run.steps": 1040, "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}),
            ("16k", 16, 16384, {"run.steps": 1520 - 1040}),
            ("24k", 16, 24576, {"data.eval.samples_per_prompt": 16}),
        )
    ),
    (
        "open-instruct scripts/train/tulu3/grpo_fast_8b.sh: 48 x 16, beta 0.01, k3, lr 5e-7, 2048/2048, 2 minibatches, "
        "2M episodes, 6 learners + 10 engines, seed 1",
        "tulu_rlvr_8b",
        {
            "algorithm.prompts_per_step": 48, "algorithm.group_size": 16, "algorithm.minibatches_per_step": 2,
            "algorithm.kl_coef": 0.01, "algorithm.kl_estimator": "k3", "optimizer.lr": 5e-7,
            "optimizer.schedule": "constant", "data.max_prompt_tokens": 2048, "sampling.max_tokens": 2048,
            "run.steps": 2_000_000 // (48 * 16), "cluster.learner_ranks": 6, "cluster.samplers": 10, "run.seed": 1,
            "sampling.temperature": 1.0, "model.path": "allenai/Llama-3.1-Tulu-3-8B-DPO",
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "values"), PUBLISHED, ids=[name for _, name, _ in PUBLISHED])
def test_published_numbers_stay_what_the_source_has(source: str, name: str, values: dict[str, Any]) -> None:
    config = dataclasses.asdict(loaded(name))
    for option, published in values.items():
        value: Any = config
        for part in option.split("."):
            value = value[int(part)] if part.isdigit() else value[part]
        assert value == published, f"{name}: {option} is {value}; {source}"


def test_every_recipe_has_published_numbers() -> None:
    assert {name for _, name, _ in PUBLISHED} == RECIPES.keys()


SIZES = re.compile(
    r"model\.(path|dtype)|data\.(train|eval\.sets)\[\d+\]\.(path|split|limit|samples_per_prompt)|data\.max_prompt_tokens"
    r"|data\.eval\.(samples_per_prompt|max_tokens|every)|sampling\.max_tokens|sampler\.(max_num_seqs|enforce_eager"
    r"|gpu_memory_utilization)|learner\.tokens_per_microbatch"
    r"|algorithm\.(prompts_per_step|group_size|minibatches_per_step|constant_length|length_penalty_tokens)"
    r"|run\.(steps|save_every|name|tensorboard)"
    r"|cluster\.(reward_workers|reward_nodes|device|sleep|samplers|tensor_parallel|learner_ranks|sampler_cpus|learner_cpus)"
)


@pytest.mark.parametrize("name", RECIPES)
def test_the_stand_in_changes_nothing_but_sizes(name: str) -> None:
    recipe = RECIPES[name]
    small = load(recipe, stand_in.overrides(recipe))
    changed = differences(dataclasses.asdict(loaded(name)), dataclasses.asdict(small))
    assert [option for option in changed if not SIZES.fullmatch(option)] == []
    assert (small.run.steps, small.cluster.device, small.model.dtype) == (2, "cpu", "float32")
    assert small.cluster.learner_ranks <= 2
    assert (small.optimizer_steps_per_step > 1) == (loaded(name).optimizer_steps_per_step > 1)


def test_the_stand_in_is_small_and_takes_any_text() -> None:
    folder = stand_in.make()
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 1_000_000
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = "Gr\u00fc\u00dfe, \u6570\u5b66 \U0001f600\n\\boxed{2}\x00\t</answer>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert ids == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|>")) == 3


def test_an_unknown_data_set_has_no_stand_in() -> None:
    with pytest.raises(SystemExit, match="no stand-in for the data set someone/else"):
        stand_in.stand_in_for("someone/else", "train")
