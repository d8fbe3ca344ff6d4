"""Options of TRL, verl, OpenRLHF and open-instruct: each has an answer, and the answer is an option that loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documented import ROOT, SMALL

from grpo.commands.cli import main
from grpo.config import aliases, load, migrating, options_text, refuse_flags
from grpo.config.foreign import LEAVE, NO, Alias, table
from grpo.types import UserError

OWN = {line.split(" = ")[0] for line in options_text().splitlines()}
SECTIONS = {"data.train", "data.eval.sets", "rewards"}
"""Lists, which are options without a value of their own."""
ALIASES = [alias for topic in table().values() for alias in topic]


def refusal(tmp_path: Path, *overrides: str, more: str = "") -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL + more)
    with pytest.raises(UserError) as caught:
        load(recipe, overrides)
    return str(caught.value).removeprefix(f"{recipe}: ")


@pytest.mark.parametrize(
    ("given", "here"),
    [
        # TRL
        ("num_generations=8", "algorithm.group_size=8"),
        ("beta=0.04", "algorithm.kl_coef=0.04"),
        ("learning_rate=0.5", "optimizer.lr=0.5"),
        ("epsilon=0.1", "algorithm.eps_low=0.1 algorithm.eps_high=0.1"),
        ("epsilon_high=0.28", "algorithm.eps_high=0.28"),
        ("max_completion_length=512", "sampling.max_tokens=512"),
        ("max_prompt_length=256", "data.max_prompt_tokens=256"),
        ("num_iterations=2", "algorithm.epochs_per_step=2"),
        ("loss_type=grpo", "algorithm.loss=ppo_clip algorithm.aggregation=sequence_mean"),
        ("loss_type=dapo", "algorithm.loss=ppo_clip algorithm.aggregation=token_mean"),
        ("loss=bnpo", "algorithm.loss=ppo_clip algorithm.aggregation=token_mean"),
        ("loss=dr_grpo", "algorithm.loss=ppo_clip algorithm.aggregation=constant_length"),
        ("scale_rewards=false", "algorithm.advantage=group_centered"),
        ("scale_rewards=batch", "algorithm.advantage=batch_normalized"),
        ("vllm_mode=colocate", "cluster.layout=colocated"),
        ("mask_truncated_completions=true", "algorithm.mask_truncated=true"),
        ("vllm_importance_sampling_mode=sequence_mask",
         "algorithm.importance_level=sequence algorithm.importance_mode=mask"),
        ("reward_weights=[1,0.5]", "rewards[0].weight=1 rewards[1].weight=0.5"),
        ("adam_beta2=0.95", "optimizer.betas=[0.9,0.95]"),
        ("temperature=0.7", "sampling.temperature=0.7"),
        # verl
        ("actor_rollout_ref.rollout.n=5", "algorithm.group_size=5"),
        ("data.train_batch_size=1024", "algorithm.prompts_per_step=1024"),
        ("actor_rollout_ref.actor.kl_loss_type=low_var_kl", "algorithm.kl_estimator=k3"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "algorithm.aggregation=sequence_mean"),
        ("algorithm.adv_estimator=rloo", "algorithm.advantage=leave_one_out"),
        ("algorithm.kl_ctrl.kl_coef=0.001", "algorithm.kl_coef=0.001"),
        ("+trainer.total_training_steps=7", "run.steps=7"),
        ("trainer.logger=[console,wandb]", "run.wandb=true"),
        # OpenRLHF
        ("n_samples_per_prompt=8", "algorithm.group_size=8"),
        ("init_kl_coef=0.01", "algorithm.kl_coef=0.01"),
        ("rollout.n_samples_per_prompt=8", "algorithm.group_size=8"),
        ("advantage_estimator=reinforce_baseline", "algorithm.advantage=reinforce_pp_baseline"),
        # open-instruct
        ("num_samples_per_prompt_rollout=16", "algorithm.group_size=16"),
        ("kl_estimator=2", "algorithm.kl_estimator=k3"),
        ("clip_higher=0.272", "algorithm.eps_high=0.272"),
        # in one of our sections
        ("algorithm.num_generations=8", "algorithm.group_size=8"),
        ("optimizer.learning_rate=0.5", "optimizer.lr=0.5"),
        # one of our options, with another trainer's value
        ("algorithm.loss=dapo", "algorithm.loss=ppo_clip algorithm.aggregation=token_mean"),
        ("algorithm.loss=grpo", "algorithm.loss=ppo_clip algorithm.aggregation=sequence_mean"),
        ("algorithm.loss=dr_grpo", "algorithm.loss=ppo_clip algorithm.aggregation=constant_length"),
        ("algorithm.advantage=grpo", "algorithm.advantage=group_normalized"),
        ("model.dtype=bf16", "model.dtype=bfloat16"),
    ],
)  # fmt: skip
def test_the_answer_is_our_option_with_its_value(given: str, here: str, tmp_path: Path) -> None:
    assert re.search(rf": here {re.escape(here)}(; |$| \()", refusal(tmp_path, given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora_r=16", "lora_r=16 (TRL): not supported, because all weights are trained"),
        ("lora=true", "lora=true: not supported, because all weights are trained"),
        ("lora_rank=0", "lora_rank=0 (OpenRLHF): leave it out"),
        ("top_p=0.9", "not supported, because the learner replays only the temperature"),
        ("top_p=1.0", "top_p=1.0 (TRL, OpenRLHF): leave it out"),
        ("use_vllm=true", "use_vllm=true (TRL): leave it out"),
        ("use_vllm=false", "not supported, because vLLM is the only sampler"),
        ("loss_type=luspo", "not supported, because no loss weights a sequence by its length"),
        ("loss_type=nosuch", "loss_type=nosuch (TRL): one of grpo, dapo, bnpo"),
        ("per_device_train_batch_size=4", "here algorithm.prompts_per_step, the number of prompts over all processes"),
        ("actor_rollout_ref.actor.fsdp_config.fsdp_size=8", "not supported, because the learner is DeepSpeed"),
        ("actor_rollout_ref.rollout.nosuch=8", "actor_rollout_ref.rollout.nosuch (verl): there is no counterpart here"),
        ("loss=ppo_clip", "unknown option loss; did you mean algorithm.loss?"),  # it is ours
        ("num_generation=8", "did you mean num_generations (TRL): here algorithm.group_size?"),
        ("num_generations", "num_generations (TRL): here algorithm.group_size"),
        (
            "learning-rate=0.5",
            "section.option=value; learning_rate=0.5 (TRL, OpenRLHF, open-instruct): here optimizer.lr=0.5",
        ),
        ("optimizer.beta=0.9", "unknown option optimizer.beta; did you mean optimizer.betas?"),  # nearer than TRL's
        ("algorithm.loss=luspo", "luspo (TRL): not supported, because no loss"),
    ],
)
def test_what_has_no_option_here_is_said(given: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, given)


def test_a_recipe_of_another_trainer_is_answered_as_a_whole(tmp_path: Path) -> None:
    more = """
actor_rollout_ref:
  rollout: {n: 8, temperature: 0.7, name: vllm}
  actor: {optim: {lr: 0.5}}
trainer: {logger: [console, wandb], nnodes: 1}
"""
    assert refusal(tmp_path, "beta=0", more=more) == (
        "options of another trainer: actor_rollout_ref.rollout.n=8 (verl): here algorithm.group_size=8; "
        "actor_rollout_ref.rollout.temperature=0.7 (verl): here sampling.temperature=0.7; "
        "actor_rollout_ref.rollout.name=vllm (verl): leave it out; "
        "actor_rollout_ref.actor.optim.lr=0.5 (verl): here optimizer.lr=0.5; "
        "trainer.logger=[console,wandb] (verl): here run.wandb=true; "
        "trainer.nnodes (verl): here cluster.learner_ranks, the number of the learner's GPUs on all nodes; with "
        "cluster.layout=colocated, the number of the samplers' GPUs; "
        "beta=0 (TRL, open-instruct): here algorithm.kl_coef=0"
    )
    many = "\n".join(f"  key{i}: 1" for i in range(20))
    assert refusal(tmp_path, more=f"\ntrainer:\n{many}\n").endswith("; and 8 more: docs/migrating.md")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--n_samples_per_prompt 8 --init_kl_coef=0.01 run.steps=3 --use_kl_loss",
         "options of another trainer: n_samples_per_prompt=8 (OpenRLHF): here algorithm.group_size=8; "
         "init_kl_coef=0.01 (OpenRLHF): here algorithm.kl_coef=0.01; "
         "use_kl_loss=true (OpenRLHF): here algorithm.kl_place=loss"),
        ("--eps_clip_low_high 0.2 0.28", "here algorithm.eps_low=0.2 algorithm.eps_high=0.28"),
        ("--learning-rate 0.5", "here optimizer.lr=0.5"),
        ("--run.steps 10", "--run.steps: options are given without dashes: run.steps=10"),
        ("--rewards[0].weight=2", "options are given without dashes: rewards[0].weight=2"),
    ],
)  # fmt: skip
def test_flags_are_answered(flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(SMALL)
    assert main(["train", str(tmp_path / "recipe.yaml"), *flags.split()]) == 2
    assert said in capsys.readouterr().err


def test_flags_that_nobody_knows_are_left_to_the_parser() -> None:
    refuse_flags(["--nonsense", "3"])


def test_the_table_holds_texts_only() -> None:
    """In YAML, an unquoted true, null, 1 or -1 is no text."""
    for alias in ALIASES:
        names = [name for field in (*aliases.TRAINERS, "words") for name in getattr(alias, field)]
        assert names
        assert {type(text) for text in (alias.here, alias.why, *alias.values, *alias.values.values(), *names)} == {str}
        assert alias.here or alias.values or alias.why


def test_every_name_stands_in_the_table_once() -> None:
    found = [
        (name, alias) for alias in ALIASES for field in (*aliases.TRAINERS, "words")
        for name in set(aliases.names_of(alias, field))
    ]  # fmt: skip
    rows = {name: {id(alias) for other, alias in found if other == name} for name, _ in found}
    assert len(rows) > 500
    assert [name for name, of in rows.items() if len(of) > 1] == []


def outcomes(alias: Alias) -> list[str]:
    """What an alias names of ours, with a value where it gives one."""
    return [text for text in (alias.here, *alias.values.values()) if text and text != LEAVE]


def test_every_option_that_is_named_is_ours() -> None:
    for alias in ALIASES:
        for text in [*outcomes(alias), alias.why]:
            for option in re.findall(r"(?<![\w./])((?:[a-z]+\.)+[a-z0-9_]+(?:\[i\]\.[a-z]+)?)", text):
                section = option.split(".")[0]
                if (
                    section in {name.split(".")[0].removesuffix("[i]") for name in OWN}
                    and option != "data.train_batch_size"
                ):
                    assert option in OWN | SECTIONS or any(
                        own.startswith((f"{option}.", f"{option}[i].")) for own in OWN
                    ), option


SAMPLE: dict[str, object] = {
    "model.path": "some/model", "model.trust_remote_code": True, "model.float32_head": True, "data.train": "x.jsonl",
    "data.eval.sets": "x.jsonl", "data.system_prompt": "Be brief.", "algorithm.retire_reward": 1.0,
    "optimizer.betas": [0.9, 0.95], "sampling.stop": ["a"], "run.name": "a", "run.wandb_project": "p",
    "cluster.tensor_parallel": 1, "cluster.sleep": False, "critic.path": "some/model", "algorithm.dual_clip": 3.0,
    "algorithm.importance_high": 2.0, "algorithm.rejection_high": 1.1, "resume": "runs/x",
    "algorithm.epochs_per_step": 2, "algorithm.gamma": 1, "algorithm.gae_lambda": 1,
    **dict.fromkeys(
        ("algorithm.mask_truncated", "learner.gradient_checkpointing", "learner.reference_offload", "run.save_model",
         "sampler.enforce_eager", "sampler.prefix_caching", "run.wandb"), True),
    **dict.fromkeys(
        ("learner.tokens_per_microbatch", "data.max_prompt_tokens", "sampling.max_tokens", "algorithm.constant_length"),
        2048),
    **dict.fromkeys(
        ("algorithm.group_size", "algorithm.prompts_per_step", "run.steps", "cluster.samplers",
         "cluster.pipeline_parallel", "sampler.max_num_seqs", "algorithm.length_penalty_tokens",
         "algorithm.reference_refresh_every", "run.save_every", "run.keep_last", "data.eval.every",
         "data.eval.samples_per_prompt", "run.seed", "data.seed", "learner.zero_stage", "data.eval.top_k",
         "data.eval.max_tokens", "algorithm.minibatches_per_step"), 2),
}  # fmt: skip
"""A value for every option that takes the other trainer's as it is; 0.5 for what is not here."""
NEEDS = {
    "algorithm.kl_": ["algorithm.kl_coef=0.01"], "algorithm.reference": ["algorithm.kl_coef=0.01"],
    "learner.reference": ["algorithm.kl_coef=0.01"], "data.system_prompt": ["data.style=chat"],
    "data.eval": ["data.eval.sets=x.jsonl"], "critic.": ["algorithm.advantage=gae"],
    "algorithm.length_penalty": ["algorithm.length_penalty_tokens=4"],
    "algorithm.sapo": ["algorithm.loss=sapo"], "algorithm.constant": ["algorithm.aggregation=constant_length"],
    "run.wandb_project": ["run.wandb=true"], "run.keep": ["run.save_every=2"],
    "run.save_model": ["run.save_every=2"], "sampler.gpu": ["cluster.device=gpu"],
    "model.attention": ["cluster.device=gpu"],
    "learner.offload": ["learner.zero_stage=3", "cluster.sleep=false"], "learner.zero_stage": ["cluster.sleep=false"],
    "algorithm.gae": ["algorithm.advantage=gae"], "algorithm.gamma": ["algorithm.advantage=gae"],
    "algorithm.loss=gspo": ["algorithm.aggregation=sequence_mean"],
    "algorithm.reference_average": ["model.dtype=float32"],
    "algorithm.kl_gradient=ratio_weighted": ["algorithm.minibatches_per_step=2"],
}  # fmt: skip
"""Options without which others have no effect, which is refused."""


def as_overrides(alias: Alias, text: str) -> list[str]:
    option = text.partition("=")[0].replace("[i]", "[0]")
    value = aliases.written(0.5 if "[{}" in text or ",{}" in text else SAMPLE.get(option, 0.5))
    filled = text.split("; ")[0].replace("{}", value).replace("{0}", "0.5").replace("{1}", "1.5").replace("[i]", "[0]")
    return filled.split(" ") if "{" not in text or " algorithm" in text else [filled]


def names(alias: Alias) -> str:
    return next(name for field in (*aliases.TRAINERS, "words") for name in aliases.names_of(alias, field))


@pytest.mark.parametrize("alias", ALIASES, ids=names)
def test_every_value_that_is_named_loads(alias: Alias, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL)
    for text in outcomes(alias):
        if text.startswith(NO) or "=" not in text:
            continue
        given = as_overrides(alias, text)
        needed = [need for start, needs in NEEDS.items() if any(o.startswith(start) for o in given) for need in needs]
        own = [need for need in needed if need.partition("=")[0] not in {o.partition("=")[0] for o in given}]
        load(recipe, [*own, *(o for o in given if not o.startswith("resume="))])


def test_the_page_is_the_table() -> None:
    """python -m grpo.config.migrating > docs/migrating.md"""
    assert (ROOT / "docs" / "migrating.md").read_text() == migrating.page()
    assert "docs/migrating.md" in (ROOT / "README.md").read_text()
