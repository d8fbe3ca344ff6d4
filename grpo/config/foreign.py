"""Table of the options of TRL, verl, OpenRLHF and open-instruct and their counterparts here. It is the source of error
messages (`grpo.config.aliases`) and of docs/migrating.md (`grpo.config.migrating`).

The names come from TRL's GRPOConfig and its base class TrainingArguments, from verl's ppo_trainer.yaml, from OpenRLHF's
train_ppo_ray (the older flags with underscores and the later ones with dots), and from open-instruct's grpo_fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEAVE = "leave it out"
"""Used instead of options: nothing has to be set here."""
NO = "no: "
"""Prefix of the counterpart of an unsupported value; the reason follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """One setting, with its names in each trainer."""

    here: str = ""
    """Counterpart in our options. `option={}` takes the value unchanged, `[i]` takes each item of a list, `{0}` and
    `{1}` take the items of a pair. Without braces, the user has to compute the value as `why` states. LEAVE: nothing to
    set. Empty: not supported, for the reason in `why`, or only the values in `values` are known."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Value there -> options here (with a remark after `; `), LEAVE, or NO followed by the reason. `here` applies to
    all other values."""
    why: str = ""
    """Reason, formula, or remark."""
    trl: str = ""
    verl: str = ""
    """`~` stands for `actor_rollout_ref.`; `.*` for everything below."""
    openrlhf: str = ""
    open_instruct: str = ""
    words: str = ""
    """Names that no trainer uses but that users try."""


def _same(option: str, values: Mapping[str, str] | None = None, **names: str) -> Alias:
    """Return the alias of an option that differs only in its name, except for some `values`."""
    return Alias(here=f"{option}={{}}", values=values or {}, **names)  # type: ignore[arg-type]


def _on_off(on: str, off: str, **names: str) -> Alias:
    """Return the alias of a boolean option, with the counterparts of true and false."""
    return Alias(values={"true": on, "false": off}, **names)  # type: ignore[arg-type]


_ALL_WEIGHTS = (
    "all weights are trained; for less memory: learner.zero_stage=3, learner.offload=optimizer or "
    "learner.gradient_checkpointing=true"
)
_REPLAY = "the learner replays only the temperature, so the ratio would be wrong; data.eval has top_p, top_k and min_p"
_MICROBATCHES = (
    "microbatches are a budget of tokens, filled with rows of any length; what they add up to is a minibatch: "
    "algorithm.prompts_per_step / algorithm.minibatches_per_step prompts"
)
_RATIO = "in optimizer steps: the ratio x run.steps x algorithm.minibatches_per_step x algorithm.epochs_per_step"
_EPOCHS = "the epochs x the prompts of data.train / algorithm.prompts_per_step"
_OPTIMIZER_STEPS = (
    "in steps of sampling: the optimizer steps / (algorithm.minibatches_per_step x algorithm.epochs_per_step)"
)
_TRL_COUNTS = (
    "in steps of sampling; TRL counts optimizer steps, of which one of these makes "
    "algorithm.minibatches_per_step x algorithm.epochs_per_step"
)
_SHARDING = "the learner is DeepSpeed: learner.zero_stage shards, learner.offload moves to host memory"
_ONE_TURN = "a completion is one turn, without tools"
_OWN_FILE = "a reward is a Python function in a file: rewards"

_OPTIMIZERS = "the optimizers are adamw and sgd; learner.offload=optimizer saves the memory of adamw"
_NO_GRADIENT = (
    "in the loss the expected gradient of k1 is 0; nearest: algorithm.kl_estimator=k1 algorithm.kl_gradient=k2"
)
_NEVER = {"-1": LEAVE}

# fmt: off
# fmt: off
TABLE: dict[str, tuple[Alias, ...]] = {
    "Model": (
        _same("model.path", trl="model_name_or_path", verl="~model.path", openrlhf="pretrain actor.model_name_or_path",
            open_instruct="model_name_or_path"),
        Alias(values={**dict.fromkeys(("bfloat16", "bf16", "torch.bfloat16"), "model.dtype=bfloat16"),
            **dict.fromkeys(("float32", "fp32", "torch.float32"), "model.dtype=float32"),
            **dict.fromkeys(("float16", "fp16"), f"{NO}float16 has no range for gradients without loss scaling"),
            "auto": "model.dtype=bfloat16"}, trl="dtype torch_dtype", verl="~rollout.dtype", openrlhf="ds.param_dtype",
            open_instruct="model_dtype"),
        _on_off("model.dtype=bfloat16", "model.dtype=float32", trl="bf16", openrlhf="bf16"),
        _on_off(f"{NO}float16 has no range for gradients without loss scaling", LEAVE, trl="fp16"),
        Alias(values={
            **{name: f"model.attention={name}" for name in ("sdpa", "eager", "flash_attention_2", "flash_attention_3")},
            "kernels-community/vllm-flash-attn3": "model.attention=flash_attention_3"}, trl="attn_implementation",
            openrlhf="attn_implementation ds.attn_implementation", open_instruct="attn_implementation"),
        _same("model.trust_remote_code", trl="trust_remote_code",
            verl="~model.trust_remote_code data.trust_remote_code"),
        _same("model.float32_head", trl="cast_lm_head_to_fp32", open_instruct="lm_head_fp32"),
        Alias(here=LEAVE, why="a model whose config has dropout above 0 is refused", trl="disable_dropout"),
        Alias(why=_ALL_WEIGHTS, trl="use_peft peft_config lora_r lora_alpha lora_dropout lora_target_modules "
            "lora_task_type use_rslora use_dora load_in_4bit load_in_8bit",
            verl="~model.lora_rank ~model.lora_alpha ~model.target_modules ~model.exclude_modules ~model.lora.*",
            openrlhf="lora_rank lora_dropout target_modules load_in_4bit ds.lora.* ds.load_in_4bit",
            words="lora qlora peft adapter lora_config"),
        Alias(here=LEAVE, why="logits are computed by chunks and never held whole",
            trl="use_liger_kernel use_liger_loss", verl="~model.use_liger ~model.use_fused_kernels "
            "~actor.use_fused_kernels ~actor.entropy_from_logits_with_chunking",
            openrlhf="use_liger_kernel ds.use_liger_kernel", open_instruct="use_liger_grpo_loss"),
        Alias(why="models are transformers' own classes with their own settings; change the folder's config.json",
            trl="model_init_kwargs", verl="~model.override_config ~model.external_lib",
            open_instruct="rope_scaling_factor config_name"),
    ),
    "Data": (
        _same("data.train", trl="dataset_name", verl="data.train_files", openrlhf="prompt_data data.prompt_dataset",
            open_instruct="dataset_name", words="train_dataset train_data train_file"),
        _same("data.eval.sets", verl="data.val_files", openrlhf="eval_dataset eval.dataset",
            words="eval_data val_dataset"),
        Alias(here="data.train", why="a list of {path, weight}; weights are shares of the prompts that are drawn",
            openrlhf="prompt_data_probs data.prompt_probs", open_instruct="dataset_mixer_list"),
        Alias(here="data.eval.sets", why="a list of {path, split, limit}", open_instruct="dataset_mixer_eval_list"),
        Alias(here="data.train[i].split", why="each data set's own; data.eval.sets[i].split of held-out ones",
            trl="dataset_train_split dataset_test_split dataset_config",
            openrlhf="prompt_split eval_split data.prompt_split eval.split",
            open_instruct="dataset_mixer_list_splits dataset_mixer_eval_list_splits"),
        Alias(here="data.messages_column",
            why="with data.style=chat where the column holds turns; where it is a text: data.template",
            verl="data.prompt_key", openrlhf="input_key data.input_key"),
        Alias(here="data.answer_column", why="where gold answers are tried; reward functions see every column",
            verl="data.reward_fn_key", openrlhf="label_key data.label_key"),
        Alias(here="data.template", why="a Python format string over the row's columns: \"{question}\"",
            openrlhf="input_template data.input_template"),
        _on_off("data.style=chat", "data.style=template", openrlhf="apply_chat_template data.apply_chat_template"),
        Alias(why="the chat template is the tokenizer's own; change the folder's chat_template.jinja",
            trl="chat_template_path chat_template_kwargs",
            verl="~model.custom_chat_template data.apply_chat_template_kwargs", open_instruct="chat_template_name"),
        _same("data.system_prompt", words="system_prompt"),
        _same("data.max_prompt_tokens", trl="max_prompt_length", verl="data.max_prompt_length ~rollout.prompt_length",
            openrlhf="prompt_max_len", open_instruct="max_prompt_token_length"),
        _on_off("data.overlong_prompts=drop", "data.overlong_prompts=refuse", verl="data.filter_overlong_prompts"),
        Alias(values={"error": "data.overlong_prompts=refuse"}, why="prompts are refused or dropped, never cut",
            verl="data.truncation"),
        _on_off(LEAVE, f"{NO}prompts are always shuffled, by data.seed", trl="shuffle_dataset", verl="data.shuffle"),
        _same("data.seed", trl="data_seed", open_instruct="data_loader_seed"),
        Alias(here="data.train[i].limit", why="each data set's own", openrlhf="max_samples data.max_samples",
            words="max_train_samples"),
        Alias(here=LEAVE, why="reward functions see every column of the row", trl="remove_unused_columns"),
    ),
    "Batch": (
        _same("algorithm.group_size", trl="num_generations", verl="~rollout.n",
            openrlhf="n_samples_per_prompt rollout.n_samples_per_prompt",
            open_instruct="num_samples_per_prompt_rollout",
            words="n_samples n_generations group_size rollouts_per_prompt rollout_n"),
        _same("algorithm.prompts_per_step", verl="data.train_batch_size",
            openrlhf="rollout_batch_size rollout.batch_size", open_instruct="num_unique_prompts_rollout"),
        Alias(here=LEAVE, verl="data.gen_batch_size",
            why="a step samples what it learns from; algorithm.max_refills replaces groups without spread"),
        Alias(here="algorithm.prompts_per_step", why="in prompts and of all processes, so TRL's "
            "per_device_train_batch_size x processes x gradient_accumulation_steps / num_generations (or "
            "generation_batch_size / num_generations); a microbatch is learner.tokens_per_microbatch",
            trl="per_device_train_batch_size gradient_accumulation_steps generation_batch_size",
            words="batch_size per_device_batch_size"),
        Alias(here="algorithm.minibatches_per_step", why="optimizer steps of one pass over a step's completions: "
            "steps_per_generation / gradient_accumulation_steps at TRL, data.train_batch_size / ppo_mini_batch_size "
            "at verl, rollout_batch_size x n_samples_per_prompt / train_batch_size at OpenRLHF",
            trl="steps_per_generation", verl="~actor.ppo_mini_batch_size",
            openrlhf="train_batch_size train.batch_size"),
        _same("algorithm.minibatches_per_step", open_instruct="num_mini_batches"),
        _same("algorithm.epochs_per_step", trl="num_iterations", verl="~actor.ppo_epochs",
            openrlhf="max_epochs train.max_epochs", open_instruct="num_epochs", words="ppo_epochs"),
        Alias(here="learner.tokens_per_microbatch", why=_MICROBATCHES,
            verl="~actor.ppo_micro_batch_size_per_gpu ~actor.ppo_micro_batch_size "
            "~rollout.log_prob_micro_batch_size_per_gpu ~rollout.log_prob_micro_batch_size "
            "~ref.log_prob_micro_batch_size_per_gpu ~ref.log_prob_micro_batch_size",
            openrlhf="micro_train_batch_size micro_rollout_batch_size train.micro_batch_size rollout.micro_batch_size",
            words="micro_batch_size"),
        _same("learner.tokens_per_microbatch", verl="~actor.ppo_max_token_len_per_gpu "
            "~rollout.log_prob_max_token_len_per_gpu ~ref.log_prob_max_token_len_per_gpu",
            openrlhf="train_max_tokens_per_gpu rollout_max_tokens_per_gpu train.max_tokens_per_gpu "
            "rollout.max_tokens_per_gpu", open_instruct="pack_length"),
        Alias(here=LEAVE, why="rows are always packed up to learner.tokens_per_microbatch",
            verl="~actor.use_dynamic_bsz ~model.use_remove_padding ~actor.use_remove_padding "
            "~rollout.log_prob_use_dynamic_bsz ~ref.log_prob_use_dynamic_bsz trainer.balance_batch",
            openrlhf="packing_samples use_dynamic_batch ds.packing_samples train.dynamic_batch_enable"),
        Alias(here="run.steps", why=_OPTIMIZER_STEPS, trl="max_steps"),
        _same("run.steps", _NEVER, verl="trainer.total_training_steps", open_instruct="max_train_steps",
            words="num_steps total_steps training_steps n_steps"),
        Alias(here="run.steps", why=_EPOCHS, trl="num_train_epochs", verl="trainer.total_epochs",
            openrlhf="num_episodes train.num_episodes", words="epochs"),
        Alias(here="run.steps", why="the episodes / (algorithm.prompts_per_step x algorithm.group_size)",
            open_instruct="total_episodes"),
    ),
    "Sampling": (
        _same("sampling.max_tokens", trl="max_completion_length",
            verl="data.max_response_length ~rollout.response_length",
            openrlhf="generate_max_len rollout.max_new_tokens", open_instruct="response_length",
            words="max_new_tokens max_response_tokens"),
        Alias(here="sampling.max_tokens",
            why="the limit of prompt and completion together is data.max_prompt_tokens + sampling.max_tokens",
            trl="vllm_max_model_length max_length", verl="~rollout.max_model_len", openrlhf="max_len data.max_len",
            open_instruct="max_token_length max_seq_length"),
        _same("sampling.temperature", trl="temperature", verl="~rollout.temperature",
            openrlhf="temperature rollout.temperature", open_instruct="temperature"),
        Alias(values={"1.0": LEAVE, "1": LEAVE}, why=_REPLAY, trl="top_p repetition_penalty", verl="~rollout.top_p",
            openrlhf="top_p rollout.top_p", open_instruct="vllm_top_p"),
        Alias(values={"0": LEAVE, "-1": LEAVE, "0.0": LEAVE}, why=_REPLAY, trl="top_k min_p", verl="~rollout.top_k"),
        Alias(why=_REPLAY, trl="generation_kwargs"),
        _on_off(LEAVE, f"{NO}greedy completions have no distribution to learn from", verl="~rollout.do_sample"),
        _same("sampling.stop", open_instruct="stop_strings"),
        Alias(why="a completion ends at its end token, a stop string or sampling.max_tokens",
            verl="~rollout.ignore_eos"),
        Alias(why=_ONE_TURN, trl="max_tool_calling_iterations", verl="~rollout.multi_turn.* ~rollout.agent.*",
            openrlhf="agent_func_path train.agent_func_path", open_instruct="tools max_tool_calls"),
        Alias(why="steps are synchronous: a step samples with the weights of the step before",
            openrlhf="async_train async_queue_size train.async_enable train.async_queue_size "
            "train.partial_rollout_enable", open_instruct="async_steps inflight_updates async_mode"),
    ),
    "Advantages and rewards": (
        Alias(values={
            **dict.fromkeys(("grpo", "group_norm", "grpo_vectorized"), "algorithm.advantage=group_normalized"),
            "dr_grpo": "algorithm.advantage=group_centered",
            **dict.fromkeys(("rloo", "rloo_vectorized"), "algorithm.advantage=leave_one_out"),
            **dict.fromkeys(("reinforce", "reinforce_plus_plus", "reinforce++"), "algorithm.advantage=reinforce_pp"),
            "reinforce_baseline": "algorithm.advantage=reinforce_pp_baseline",
            "reinforce_plus_plus_baseline": "algorithm.advantage=reinforce_pp_baseline",
            "gae": "algorithm.advantage=gae", "opo": "algorithm.advantage=optimal_baseline",
            "remax": f"{NO}no greedy completion is sampled as a baseline; nearest: algorithm.advantage=leave_one_out",
            "grpo_passk": f"{NO}it is another estimator; nearest: algorithm.advantage=pass_at_k",
            "gpg": f"{NO}nearest: algorithm.advantage=group_centered with algorithm.loss=reinforce"},
            verl="algorithm.adv_estimator", openrlhf="advantage_estimator algo.advantage.estimator"),
        Alias(values={**dict.fromkeys(("true", "group", "standard"), "algorithm.advantage=group_normalized"),
            **dict.fromkeys(("false", "none", "centered"), "algorithm.advantage=group_centered"),
            "batch": "algorithm.advantage=batch_normalized",
            **dict.fromkeys(("mean", "max_rl"), f"{NO}rewards are not divided by their group's mean")},
            trl="scale_rewards", verl="algorithm.norm_adv_by_std_in_grpo",
            open_instruct="advantage_normalization_type"),
        _on_off("algorithm.advantage=group_centered", "algorithm.advantage=group_normalized",
            openrlhf="no_advantage_std_norm algo.advantage.no_std_norm"),
        _same("algorithm.gamma", openrlhf="gamma algo.advantage.gamma"),
        _same("algorithm.gae_lambda", verl="algorithm.lam", openrlhf="lambd algo.advantage.lambd"),
        _same("rewards[i].weight", trl="reward_weights"),
        Alias(values={"sum_then_normalize": LEAVE}, why="rewards are summed with their weights before advantages",
            trl="multi_objective_aggregation"),
        Alias(here="rewards", why="a list of {file, name, style: trl}", trl="reward_funcs", words="reward_functions"),
        Alias(here="rewards", why="a list of {file, name, style: verl}",
            verl="custom_reward_function.path custom_reward_function.name reward.custom_reward_function.path "
            "reward.custom_reward_function.name"),
        Alias(here="rewards", why="a list of {file}; reward_fns/remote.py asks a service over HTTP",
            openrlhf="remote_rm_url reward.remote_url"),
        Alias(here="rewards", why="a list of {file, weight}; reward_fns/ has graders and a format reward",
            open_instruct="apply_verifiable_reward verification_reward apply_r1_style_format_reward "
            "r1_style_format_reward additive_format_reward"),
        Alias(why=f"there is no reward model: {_OWN_FILE} (reward_fns/remote.py asks a service over HTTP)",
            verl="reward_model.enable reward_model.model.*",
            openrlhf="reward_pretrain reward.model_name_or_path normalize_reward reward.normalize_enable"),
        Alias(why=f"rewards are taken as they are; {_OWN_FILE}", openrlhf="reward_clip_range reward.clip_range"),
        _same("algorithm.mask_truncated", trl="mask_truncated_completions", open_instruct="mask_truncated_completions"),
        Alias(why="what ran out of tokens is left out (algorithm.mask_truncated) or punished by degrees "
            "(algorithm.length_penalty_tokens)", openrlhf="reward.stop_properly_penalty_coef",
            open_instruct="non_stop_penalty non_stop_penalty_value"),
        _same("algorithm.length_penalty_tokens",
            verl="reward_model.overlong_buffer.len reward_model.reward_kwargs.overlong_buffer_cfg.len",
            openrlhf="overlong_buffer_len reward.overlong_buffer_len"),
        _same("algorithm.length_penalty", verl="reward_model.overlong_buffer.penalty_factor "
            "reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor",
            openrlhf="overlong_penalty_factor reward.overlong_penalty_factor"),
        Alias(here="algorithm.max_refills", why="rounds of further prompts a step may take to replace groups without "
            "spread: the generation batches less one",
            verl="algorithm.filter_groups.enable algorithm.filter_groups.max_num_gen_batches",
            openrlhf="dynamic_filtering algo.dynamic_filtering_enable", open_instruct="active_sampling"),
        Alias(here=LEAVE, why="groups whose rewards are all equal have advantage 0 and no gradient; "
            "algorithm.max_refills replaces them", verl="algorithm.filter_groups.metric",
            open_instruct="filter_zero_std_samples"),
        Alias(here="algorithm.retire_reward", why="a prompt whose completions all reach this reward is not drawn again",
            open_instruct="no_resampling_pass_rate"),
        Alias(why="nearest: algorithm.max_refills, which replaces groups without spread",
            openrlhf="dynamic_filtering_reward_range algo.dynamic_filtering_range"),
    ),
    "Loss": (
        Alias(values={"grpo": "algorithm.loss=ppo_clip algorithm.aggregation=sequence_mean",
            "dapo": "algorithm.loss=ppo_clip algorithm.aggregation=token_mean",
            "bnpo": "algorithm.loss=ppo_clip algorithm.aggregation=token_mean; over all "
            "tokens of the optimizer step",
            "dr_grpo": "algorithm.loss=ppo_clip algorithm.aggregation=constant_length; and, "
            "as TRL's scale_rewards=false, algorithm.advantage=group_centered",
            "cispo": "algorithm.loss=cispo algorithm.aggregation=token_mean algorithm.eps_low=1; epsilon_high "
            "is the bound itself in TRL, algorithm.eps_high one less",
            "sapo": "algorithm.loss=sapo algorithm.aggregation=sequence_mean",
            "gspo": "algorithm.loss=gspo algorithm.aggregation=sequence_mean",
            "luspo": f"{NO}no loss weights a sequence by its length; nearest: algorithm.loss=gspo",
            "vespo": f"{NO}it is not among the losses; nearest: algorithm.loss=cispo",
            "dppo": f"{NO}no divergence masks tokens; nearest: algorithm.loss=ppo_clip",
            "tvpo": f"{NO}no divergence masks tokens; nearest: algorithm.loss=ppo_clip"}, trl="loss_type",
            open_instruct="loss_fn", words="loss"),
        Alias(values={**dict.fromkeys(("vanilla", "ppo"), "algorithm.loss=ppo_clip"),
            "gspo": "algorithm.loss=gspo algorithm.aggregation=sequence_mean",
            "geo_mean": "algorithm.loss=gmpo algorithm.aggregation=sequence_mean", "cispo": "algorithm.loss=cispo",
            "sapo": "algorithm.loss=sapo", "gpg": "algorithm.loss=reinforce",
            **dict.fromkeys(("clip_cov", "kl_cov"), f"{NO}no token is chosen by its covariance")},
            verl="~actor.policy_loss.loss_mode", openrlhf="policy_loss_type actor.policy_loss_type"),
        Alias(values={"token": "algorithm.loss=ppo_clip",
            "sequence": "algorithm.loss=gspo algorithm.aggregation=sequence_mean"},
            why="algorithm.importance_level is another thing: the correction of sampler against learner",
            trl="importance_sampling_level"),
        Alias(values={"token-mean": "algorithm.aggregation=token_mean",
            "seq-mean-token-mean": "algorithm.aggregation=sequence_mean",
            "seq-mean-token-sum": "algorithm.aggregation=sequence_sum",
            "seq-mean-token-sum-norm": "algorithm.aggregation=constant_length"}, verl="~actor.loss_agg_mode"),
        Alias(values={"token": "algorithm.aggregation=token_mean"}, here="algorithm.aggregation",
            why="constant_length divides by algorithm.constant_length times the rows",
            open_instruct="loss_denominator"),
        Alias(here="algorithm.eps_low={} algorithm.eps_high={}", trl="epsilon", verl="~actor.clip_ratio",
            openrlhf="eps_clip actor.eps_clip", open_instruct="cliprange", words="clip_eps clip_range cliprange"),
        _same("algorithm.eps_low", verl="~actor.clip_ratio_low", open_instruct="clip_lower",
            words="epsilon_low clip_low"),
        _same("algorithm.eps_high", trl="epsilon_high", verl="~actor.clip_ratio_high", open_instruct="clip_higher",
            words="clip_high"),
        Alias(here="algorithm.eps_low={0} algorithm.eps_high={1}",
            openrlhf="eps_clip_low_high actor.eps_clip_low_high"),
        _same("algorithm.dual_clip", trl="delta", verl="~actor.clip_ratio_c", openrlhf="dual_clip actor.dual_clip"),
        _same("algorithm.sapo_tau_positive", trl="sapo_temperature_pos"),
        _same("algorithm.sapo_tau_negative", trl="sapo_temperature_neg"),
        _same("algorithm.entropy_coef", verl="~actor.entropy_coeff", openrlhf="entropy_loss_coef actor.entropy_coef",
            words="entropy_bonus ent_coef"),
        Alias(values={"1.0": LEAVE, "1": LEAVE}, why="every token of a completion is trained, whatever its entropy",
            trl="top_entropy_quantile"),
        _same("algorithm.constant_length", verl="~actor.loss_scale_factor"),
        Alias(why="it has no counterpart; rows far from the sampler are left out by algorithm.rejection_low and "
            "algorithm.rejection_high", trl="off_policy_mask_threshold"),
    ),
    "KL to the reference": (
        _same("algorithm.kl_coef", trl="beta", verl="~actor.kl_loss_coef algorithm.kl_ctrl.kl_coef",
            openrlhf="init_kl_coef algo.kl.init_coef", open_instruct="beta", words="kl_loss_coef kl_beta kl_coeff"),
        _on_off("algorithm.kl_place=loss", "algorithm.kl_place=reward algorithm.kl_estimator=k1",
            openrlhf="use_kl_loss algo.kl.use_loss"),
        _on_off("algorithm.kl_place=loss", "algorithm.kl_coef=0", verl="~actor.use_kl_loss",
            why="whatever the coefficient beside it says"),
        _on_off("algorithm.kl_place=reward algorithm.kl_estimator=k1", "algorithm.kl_coef=0",
            verl="algorithm.use_kl_in_reward", why="whatever the coefficient beside it says"),
        Alias(values={**dict.fromkeys(("low_var_kl", "k3"), "algorithm.kl_estimator=k3"),
            **dict.fromkeys(("mse", "k2"), "algorithm.kl_estimator=k2"),
            **dict.fromkeys(("kl", "k1"), f"{NO}{_NO_GRADIENT}"),
            "k1+": "algorithm.kl_estimator=k1 algorithm.kl_gradient=k2",
            "k3+": "algorithm.kl_estimator=k3 algorithm.kl_gradient=k2",
            **dict.fromkeys(("abs", "full"), f"{NO}the estimators are k1, k2 and k3")}, verl="~actor.kl_loss_type"),
        Alias(values={**dict.fromkeys(("kl", "k1"), "algorithm.kl_place=reward algorithm.kl_estimator=k1"),
            **dict.fromkeys(("abs", "mse", "low_var_kl", "full"), f"{NO}in the reward the KL is k1")},
            verl="algorithm.kl_penalty"),
        Alias(values={"k1": "algorithm.kl_place=reward algorithm.kl_estimator=k1",
            **dict.fromkeys(("k2", "1"), "algorithm.kl_estimator=k2"),
            **dict.fromkeys(("k3", "2"), "algorithm.kl_estimator=k3"), "0": f"{NO}{_NO_GRADIENT}",
            "3": "algorithm.kl_estimator=k3 algorithm.kl_gradient=ratio_weighted"},
            openrlhf="kl_estimator algo.kl.estimator", open_instruct="kl_estimator"),
        _on_off("algorithm.kl_gradient=ratio_weighted", LEAVE, trl="use_bias_correction_kl"),
        _same("algorithm.kl_target", verl="algorithm.kl_ctrl.target_kl", openrlhf="kl_target algo.kl.target"),
        Alias(here="algorithm.kl_horizon", why="in steps: the horizon / the completions of a step",
            verl="algorithm.kl_ctrl.horizon", openrlhf="kl_horizon algo.kl.horizon"),
        Alias(values={"fixed": LEAVE}, here="algorithm.kl_target", why="algorithm.kl_target adapts the coefficient",
            verl="algorithm.kl_ctrl.type"),
        Alias(values={"false": LEAVE}, here="algorithm.reference_refresh_every",
            why="a copy every so many steps (a mixup of 1); algorithm.reference_average mixes a share in after "
            "every step", trl="sync_ref_model"),
        Alias(here="algorithm.reference_refresh_every", why=_OPTIMIZER_STEPS, trl="ref_model_sync_steps"),
        _same("algorithm.reference_refresh_every", open_instruct="ref_policy_update_freq"),
        Alias(here="algorithm.reference_average={}", trl="ref_model_mixup_alpha", open_instruct="alpha",
            why="mixed in after every step; every so many steps there is only a copy"),
        _on_off(LEAVE, "algorithm.kl_coef=0", open_instruct="load_ref_policy"),
    ),
    "Sampler against learner": (
        _on_off("algorithm.importance_level=token", "algorithm.importance_level=none",
            trl="vllm_importance_sampling_correction",
            openrlhf="enable_vllm_is_correction algo.advantage.is_correction_enable"),
        Alias(values={"token_truncate": "algorithm.importance_level=token algorithm.importance_mode=truncate",
            "token_mask": "algorithm.importance_level=token algorithm.importance_mode=mask",
            "sequence_truncate": "algorithm.importance_level=sequence algorithm.importance_mode=truncate",
            "sequence_mask": "algorithm.importance_level=sequence algorithm.importance_mode=mask"},
            trl="vllm_importance_sampling_mode"),
        Alias(values={"tis": "algorithm.importance_level=token algorithm.importance_mode=truncate",
            "icepop": "algorithm.importance_level=token algorithm.importance_mode=mask",
            "seq-mask-tis": f"{NO}nearest: algorithm.rejection_low and algorithm.rejection_high"},
            openrlhf="algo.advantage.is_correction_type"),
        Alias(values={"token": "algorithm.importance_level=token", "sequence": "algorithm.importance_level=sequence",
            "null": "algorithm.importance_level=none"}, verl="algorithm.rollout_correction.rollout_is"),
        _same("algorithm.importance_high", {"0": "algorithm.importance_level=none"}, trl="vllm_importance_sampling_cap",
            verl="~actor.tis_imp_ratio_cap algorithm.rollout_correction.rollout_is_threshold",
            openrlhf="vllm_is_truncated_threshold", open_instruct="truncated_importance_sampling_ratio_cap"),
        Alias(here="algorithm.importance_low={0} algorithm.importance_high={1}",
            openrlhf="algo.advantage.is_correction_threshold"),
        _same("algorithm.rejection_high", verl="algorithm.rollout_correction.rollout_rs_threshold"),
        _same("algorithm.rejection_low", verl="algorithm.rollout_correction.rollout_rs_threshold_lower"),
        Alias(here="algorithm.rejection_low", why="rows are left out by the geometric mean of their weights, once "
            "algorithm.rejection_low or algorithm.rejection_high is set",
            verl="algorithm.rollout_correction.rollout_rs"),
        Alias(why="the learner computes the old logprobs itself", open_instruct="use_vllm_logprobs",
            verl="algorithm.rollout_correction.bypass_mode"),
    ),
    "Optimizer": (
        _same("optimizer.lr", trl="learning_rate", verl="~actor.optim.lr",
            openrlhf="actor_learning_rate actor.adam.lr learning_rate", open_instruct="learning_rate", words="lr"),
        Alias(values={
            **dict.fromkeys(("adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "optimizer.name=adamw"),
            "sgd": "optimizer.name=sgd",
            **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit", "muon", "adafactor"), NO + _OPTIMIZERS)
            }, trl="optim", openrlhf="actor.optim"),
        _same("optimizer.weight_decay", trl="weight_decay", verl="~actor.optim.weight_decay",
            openrlhf="l2 actor.adam.weight_decay", open_instruct="weight_decay"),
        _same("optimizer.betas", verl="~actor.optim.betas", openrlhf="adam_betas actor.adam.betas"),
        Alias(here="optimizer.betas=[{},0.999]", trl="adam_beta1"),
        Alias(here="optimizer.betas=[0.9,{}]", trl="adam_beta2"),
        _same("optimizer.eps", trl="adam_epsilon", openrlhf="actor.adam.eps"),
        _same("optimizer.max_grad_norm", trl="max_grad_norm", verl="~actor.grad_clip",
            openrlhf="max_norm actor.max_norm", open_instruct="max_grad_norm"),
        Alias(values={**dict.fromkeys(("constant", "constant_with_warmup"), "optimizer.schedule=constant"),
            "linear": "optimizer.schedule=linear", "cosine": "optimizer.schedule=cosine",
            "cosine_with_min_lr": f"{NO}the schedules end at 0; nearest: optimizer.schedule=cosine"},
            trl="lr_scheduler_type", verl="~actor.optim.warmup_style ~actor.optim.lr_scheduler_type",
            openrlhf="lr_scheduler actor.lr_scheduler", open_instruct="lr_scheduler_type",
            words="lr_schedule scheduler"),
        Alias(values=_NEVER, here="optimizer.warmup_steps",
            why="in optimizer steps, of which a step makes algorithm.minibatches_per_step x algorithm.epochs_per_step",
            trl="warmup_steps", verl="~actor.optim.lr_warmup_steps", open_instruct="warm_up_steps"),
        Alias(values={"0": LEAVE, "0.0": LEAVE}, here="optimizer.warmup_steps", why=_RATIO, trl="warmup_ratio",
            verl="~actor.optim.lr_warmup_steps_ratio", openrlhf="lr_warmup_ratio actor.lr_warmup_ratio",
            open_instruct="warmup_ratio"),
        Alias(why="the schedules end at 0", verl="~actor.optim.min_lr_ratio", openrlhf="actor.min_lr_ratio"),
    ),
    "Critic (`algorithm.advantage=gae`)": (
        _same("critic.path", verl="critic.model.path", openrlhf="critic_pretrain critic.model_name_or_path"),
        _same("critic.optimizer.lr", verl="critic.optim.lr", openrlhf="critic_learning_rate critic.adam.lr"),
        _same("critic.clip", verl="critic.cliprange_value", openrlhf="value_clip critic.value_clip",
            open_instruct="cliprange_value"),
        _same("critic.coef", open_instruct="vf_coef"),
        Alias(why="critic and policy learn from the first step on", verl="trainer.critic_warmup",
            openrlhf="freezing_actor_steps critic.freezing_steps"),
    ),
    "Memory and GPUs": (
        _same("learner.gradient_checkpointing", trl="gradient_checkpointing",
            verl="~model.enable_gradient_checkpointing",
            openrlhf="gradient_checkpointing actor.gradient_checkpointing_enable",
            open_instruct="gradient_checkpointing"),
        _same("learner.zero_stage", openrlhf="zero_stage ds.zero_stage", open_instruct="deepspeed_stage", words="zero"),
        Alias(here="learner.zero_stage", why="0 to 3, in the place of a file; learner.offload moves to host memory",
            trl="deepspeed"),
        _on_off("learner.offload=optimizer", "learner.offload=none", verl="~actor.fsdp_config.optimizer_offload",
            openrlhf="adam_offload ds.adam_offload", open_instruct="deepspeed_offload_optimizer"),
        _on_off("learner.zero_stage=3 learner.offload=parameters", "learner.offload=none",
            verl="~actor.fsdp_config.param_offload", open_instruct="deepspeed_offload_param"),
        _same("learner.reference_offload", verl="~ref.fsdp_config.param_offload",
            openrlhf="ref_reward_offload ref.offload"),
        Alias(why=_SHARDING, trl="fsdp fsdp_config",
            verl="~actor.strategy ~ref.strategy ~actor.fsdp_config.* ~ref.fsdp_config.* ~actor.megatron.*",
            open_instruct="fsdp_shard_degree fsdp_num_replicas"),
        Alias(here=LEAVE, why="weights are gathered by buckets of bounded size", trl="ds3_gather_for_generation",
            open_instruct="gather_whole_model", verl="~rollout.layered_summon"),
        Alias(values={"1": LEAVE}, why="rows are not split over GPUs, and neither are the learner's layers",
            verl="~actor.ulysses_sequence_parallel_size ~ref.ulysses_sequence_parallel_size",
            openrlhf="ring_attn_size ds_tensor_parallel_size ds.ring_attn_size ds.tensor_parallel_size",
            open_instruct="sequence_parallel_size"),
        Alias(why="the learner's model is not compiled", trl="torch_compile",
            verl="~actor.use_torch_compile ~ref.use_torch_compile", openrlhf="deepcompile ds.deepcompile",
            open_instruct="compile_model"),
        _on_off(LEAVE, f"{NO}vLLM samples always", trl="use_vllm"),
        Alias(values={"vllm": LEAVE}, why="vLLM samples always", trl="vllm_model_impl", verl="~rollout.name"),
        Alias(values={**dict.fromkeys(("colocate", "colocated"), "cluster.layout=colocated"),
            "server": "cluster.layout=disaggregated"}, why="no server has to be started", trl="vllm_mode"),
        _on_off("cluster.layout=colocated", "cluster.layout=disaggregated", verl="~hybrid_engine",
            openrlhf="colocate_all_models train.colocate_all", open_instruct="single_gpu_mode"),
        Alias(here=LEAVE, why="samplers are started by the run itself",
            trl="vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port"),
        _same("cluster.sleep", trl="vllm_enable_sleep_mode", verl="~rollout.free_cache_engine",
            openrlhf="vllm_enable_sleep vllm.enable_sleep deepspeed_enable_sleep ds.enable_sleep"),
        _same("sampler.gpu_memory_utilization", trl="vllm_gpu_memory_utilization",
            verl="~rollout.gpu_memory_utilization", openrlhf="vllm_gpu_memory_utilization vllm.gpu_memory_utilization",
            open_instruct="vllm_gpu_memory_utilization", words="gpu_memory_utilization"),
        _same("cluster.tensor_parallel", trl="vllm_tensor_parallel_size", verl="~rollout.tensor_model_parallel_size",
            openrlhf="vllm_tensor_parallel_size vllm.tensor_parallel_size", open_instruct="vllm_tensor_parallel_size",
            words="tensor_parallel_size tp"),
        _same("cluster.pipeline_parallel", verl="~rollout.pipeline_model_parallel_size"),
        _same("cluster.samplers", openrlhf="vllm_num_engines vllm.num_engines", open_instruct="vllm_num_engines"),
        Alias(here="cluster.learner_ranks", why="the GPUs of the learner on all nodes together; with "
            "cluster.layout=colocated as many as samplers x cluster.tensor_parallel",
            verl="trainer.n_gpus_per_node trainer.nnodes", openrlhf="actor_num_gpus_per_node actor_num_nodes "
            "actor.num_gpus_per_node actor.num_nodes ref_num_gpus_per_node ref_num_nodes ref.num_gpus_per_node "
            "ref.num_nodes", open_instruct="num_learners_per_node num_nodes", words="num_gpus n_gpus"),
        Alias(here=LEAVE, why="the reference is on the learner's ranks",
            openrlhf="colocate_actor_ref train.colocate_actor_ref"),
        _same("sampler.max_num_seqs", verl="~rollout.max_num_seqs"),
        _same("sampler.enforce_eager", verl="~rollout.enforce_eager", openrlhf="enforce_eager vllm.enforce_eager",
            open_instruct="vllm_enforce_eager"),
        _same("sampler.prefix_caching", verl="~rollout.enable_prefix_caching",
            openrlhf="enable_prefix_caching vllm.enable_prefix_caching", open_instruct="vllm_enable_prefix_caching"),
        Alias(here="sampler.engine", why="a mapping of vLLM's EngineArgs by their own names",
            verl="~rollout.engine_kwargs.*"),
        Alias(here=LEAVE,
            why="weights travel within the GPU, over NCCL or over gloo, by cluster.layout and cluster.device",
            openrlhf="vllm_sync_backend vllm_sync_with_ray vllm.sync_backend vllm.sync_with_ray",
            open_instruct="vllm_sync_backend", verl="~rollout.update_weights_bucket_megabytes"),
    ),
    "The run": (
        Alias(here="run.name", why="a run is the folder run.dir/run.name", trl="output_dir",
            verl="trainer.default_local_dir", openrlhf="save_path ckpt_path ckpt.output_dir ckpt.path",
            open_instruct="output_dir checkpoint_state_dir"),
        _same("run.name", trl="run_name", verl="trainer.experiment_name",
            openrlhf="wandb_run_name logger.wandb.run_name", open_instruct="exp_name run_name"),
        _same("run.seed", trl="seed", openrlhf="seed train.seed", open_instruct="seed"),
        Alias(values={"-1": "run.save_every=0"}, here="run.save_every={}", why=_TRL_COUNTS, trl="save_steps",
            verl="trainer.save_freq", openrlhf="save_steps ckpt.save_steps",
            open_instruct="save_freq checkpoint_state_freq"),
        _same("run.keep_last", trl="save_total_limit", verl="trainer.max_actor_ckpt_to_keep",
            openrlhf="max_ckpt_num ckpt.max_num", open_instruct="keep_last_n_checkpoints"),
        _same("run.save_model", openrlhf="save_hf_ckpt ckpt.save_hf"),
        Alias(values={"true": "resume=auto", "auto": "resume=auto", **dict.fromkeys(("false", "disable", "none"), LEAVE)
            }, here="resume={}", why="behind the recipe on the command line, it is no option of a recipe",
            trl="resume_from_checkpoint", verl="trainer.resume_from_path",
            openrlhf="load_checkpoint ckpt.load_enable"),
        Alias(values={"auto": "resume=auto", "disable": LEAVE, "resume_path": LEAVE},
            why="behind the recipe on the command line, it is no option of a recipe", verl="trainer.resume_mode"),
        Alias(values={"-1": "data.eval.every=0"}, here="data.eval.every={}", why=_TRL_COUNTS, trl="eval_steps",
            verl="trainer.test_freq", openrlhf="eval_steps eval.steps", open_instruct="local_eval_every"),
        Alias(values={"no": LEAVE}, here="data.eval.every", why="steps between evaluations", trl="eval_strategy"),
        _same("data.eval.samples_per_prompt", trl="num_generations_eval", verl="~rollout.val_kwargs.n",
            openrlhf="eval_n_samples_per_prompt eval.n_samples_per_prompt", open_instruct="eval_pass_at_k"),
        _same("data.eval.temperature", verl="~rollout.val_kwargs.temperature",
            openrlhf="eval_temperature eval.temperature"),
        _same("data.eval.top_p", verl="~rollout.val_kwargs.top_p"),
        _same("data.eval.top_k", verl="~rollout.val_kwargs.top_k"),
        _on_off(LEAVE, "data.eval.temperature=0", verl="~rollout.val_kwargs.do_sample"),
        _same("data.eval.max_tokens", open_instruct="eval_response_length"),
        Alias(here=LEAVE, why="held-out data are evaluated before the first step and after the last",
            verl="trainer.val_before_train", open_instruct="eval_on_step_0"),
        Alias(here="data.eval.sets", why="grpo eval evaluates a model by itself", verl="trainer.val_only"),
        Alias(values={"console": LEAVE, "wandb": "run.wandb=true", "tensorboard": "run.tensorboard=true",
            "none": "run.tensorboard=false", "all": "run.wandb=true run.tensorboard=true"},
            why="metrics.jsonl is always written; run.wandb, run.tensorboard and run.prometheus add to it",
            trl="report_to", verl="trainer.logger", open_instruct="report_to"),
        _same("run.wandb", open_instruct="with_tracking"),
        Alias(here="run.wandb", why="true or false; the key is in WANDB_API_KEY",
            openrlhf="use_wandb logger.wandb.key"),
        _same("run.wandb_project", trl="project", verl="trainer.project_name",
            openrlhf="wandb_project logger.wandb.project", open_instruct="wandb_project"),
        Alias(values={"null": LEAVE}, here="run.tensorboard", why="true or false; it is in the run's folder",
            openrlhf="use_tensorboard logger.tensorboard_dir"),
        Alias(here=LEAVE, why="every step is recorded", trl="logging_steps logging_strategy logging_first_step",
            openrlhf="logging_steps logger.logging_steps", open_instruct="logging_steps"),
        Alias(here=LEAVE, why="every completion is in the run's folder, in samples/",
            trl="log_completions num_completions_to_print log_unique_prompts",
            verl="trainer.log_val_generations trainer.rollout_data_dir trainer.validation_data_dir",
            open_instruct="save_traces rollouts_save_path"),
        Alias(why="the final model is a folder, model/; upload it with the hub's own tool",
            trl="push_to_hub hub_model_id", open_instruct="push_to_hub hf_entity hf_repo_id"),
        Alias(here="run.trace", why="true writes a timeline of every step", verl="global_profiler.*"),
        Alias(here="cluster.cpus", why="of the private Ray; a cluster that runs already: cluster.address",
            verl="ray_kwargs.ray_init.num_cpus ray_init.num_cpus"),
    ),
}
# fmt: on
# fmt: on
"""Topic -> aliases."""
