"""Everything that can be known before an engine starts: data, batch algebra, rewards, resources. Gives the plan.

`grpo check` stops here; `grpo train` goes through the same door.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from grpo import checkpoint, data
from grpo.config import Config
from grpo.rewards import pool as rewards
from grpo.rewards import preflight
from grpo.rewards.process import secrets
from grpo.types import Prompt, UserError

TRIED_ROWS = 8
SHOWN_DROPPED = 10
MIN_SECRET = 8
"""Characters of a secret that is looked for; shorter ones occur by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do, checked."""

    config: Config
    tokenizer: Any
    prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    end_token_ids: tuple[int, ...]
    reward_files: tuple[Path, ...]
    lines: tuple[str, ...]
    """The plan in words."""
    fingerprints: Mapping[str, str]
    """What was read: data sets and reward files, by the option that names them -> SHA-256."""
    dropped: tuple[str, ...]
    """`<prompt id> (<n> tokens)` of every prompt left out for its length, of training and evaluation."""


def check(config: Config, recipe: Path, log_dir: Path) -> Plan:
    """Check a loaded config against its files.

    Raises UserError at the first thing that would not work.
    """
    refuse_secrets(config)
    check_model(config)
    if config.critic.path is not None:
        check_critic(config)
    check_trackers(config)
    tokenizer = data.load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    ends = data.end_token_ids(tokenizer, config.model.path, config.sampling.stop_token_ids)
    train = prompt_set(config, tokenizer, config.data.train, config.data.split, "data.train")
    held_out = data.PromptSet(prompts=(), dropped=(), fingerprint="")
    if config.data.eval.path is not None:
        held_out = prompt_set(config, tokenizer, config.data.eval.path, config.data.eval.split, "data.eval.path")
    per_step = config.algorithm.prompts_per_step
    if per_step > len(train.prompts):
        raise UserError(
            f"algorithm.prompts_per_step={per_step} is more than data.train has prompts ({len(train.prompts)}); "
            f"nearest: {len(train.prompts)}"
        )
    files = tuple(rewards.locate(config.rewards, recipe))
    tried = try_rewards(config, files, {"data.train": train.prompts, "data.eval.path": held_out.prompts}, log_dir)
    eval_prompts = held_out.prompts[: config.data.eval.limit]
    return Plan(
        config=config,
        tokenizer=tokenizer,
        prompts=train.prompts,
        eval_prompts=eval_prompts,
        end_token_ids=ends,
        reward_files=files,
        lines=tuple(describe(config, train, held_out, ends) + tried),
        fingerprints={
            "data.train": train.fingerprint,
            **({"data.eval.path": held_out.fingerprint} if held_out.prompts else {}),
            **{f"rewards[{i}].file": checkpoint.fingerprint([file]) for i, file in enumerate(files)},
        },
        dropped=train.dropped + held_out.dropped,
    )


def check_evaluation(config: Config, recipe: Path, log_dir: Path) -> Plan:
    """As `check`, for an evaluation alone: no training data, no learner.

    Raises UserError at the first thing that would not work.
    """
    refuse_secrets(config)
    check_model(config)
    tokenizer = data.load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    ends = data.end_token_ids(tokenizer, config.model.path, config.sampling.stop_token_ids)
    assert config.data.eval.path is not None
    held_out = prompt_set(config, tokenizer, config.data.eval.path, config.data.eval.split, "data.eval.path")
    files = tuple(rewards.locate(config.rewards, recipe))
    tried = try_rewards(config, files, {"data.eval.path": held_out.prompts}, log_dir)
    prompts = held_out.prompts[: config.data.eval.limit]
    return Plan(
        config=config,
        tokenizer=tokenizer,
        prompts=(),
        eval_prompts=prompts,
        end_token_ids=ends,
        reward_files=files,
        lines=(f"model      {config.model.path} in {config.model.dtype}", *tried),
        fingerprints={
            "data.eval.path": held_out.fingerprint,
            **{f"rewards[{i}].file": checkpoint.fingerprint([file]) for i, file in enumerate(files)},
        },
        dropped=held_out.dropped,
    )


def refuse_secrets(config: Config) -> None:
    """The config is saved with the run, and so must hold no secret, by ${oc.env:...} or otherwise.

    Raises UserError naming the environment variable whose value it holds.
    """
    texts = list(leaves(dataclasses.asdict(config)))
    for name in secrets(os.environ):
        value = os.environ[name]
        if len(value) >= MIN_SECRET and any(value in text for text in texts):
            raise UserError(
                f"the recipe holds the value of the environment variable {name}, and would be saved with it; a reward "
                f"that needs it gets it by rewards[i].env: [{name}]"
            )


def leaves(tree: Any) -> Iterator[str]:
    """Every value of a nested config as text."""
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)
    else:
        yield str(tree)


def check_model(config: Config) -> None:
    """The model's config must exist and hold prompt and completion.

    Raises UserError.
    """
    path = Path(config.model.path)
    if not path.is_dir() and data.is_path(config.model.path):
        script = Path("recipes/arithmetic.py")
        hint = f"; make it with: python {script}" if "tiny/arithmetic" in config.model.path and script.exists() else ""
        raise UserError(f"model.path={config.model.path} is not a folder{hint}")
    try:
        model = AutoConfig.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={config.model.path}: {' '.join(str(error).split())[:300]}") from error
    if path.is_dir():
        check_weights(path)
    if config.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("model.attention=flash_attention_2 needs the flash-attn package; nearest: model.attention=sdpa")
    limit = getattr(model, "max_position_embeddings", None)
    if limit is not None and config.max_row_tokens > limit:
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + max_tokens="
            f"{config.max_row_tokens - config.data.max_prompt_tokens} exceed the model's {limit} positions"
        )
    for name, value in model.to_dict().items():
        if "drop" in name and isinstance(value, float) and value > 0:
            raise UserError(
                f"model.path: the model's config.json has {name}={value}; the learner needs dropout 0.0, or its "
                "logprobs differ from the sampler's"
            )


def check_critic(config: Config) -> None:
    """The critic's folder must hold a model of the policy's vocabulary.

    Raises UserError.
    """
    assert config.critic.path is not None
    trust = config.model.trust_remote_code
    try:
        critic = AutoConfig.from_pretrained(config.critic.path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(f"critic.path={config.critic.path}: {' '.join(str(error).split())[:300]}") from error
    policy = AutoConfig.from_pretrained(config.model.path, trust_remote_code=trust)
    if critic.vocab_size != policy.vocab_size:
        raise UserError(
            f"critic.path={config.critic.path} has a vocabulary of {critic.vocab_size} and model.path one of "
            f"{policy.vocab_size}: the critic would read other tokens than the policy writes"
        )
    if Path(config.critic.path).is_dir():
        check_weights(Path(config.critic.path), "critic.path")


def check_weights(folder: Path, option: str = "model.path") -> None:
    """The folder's safetensors must be there, with all their bytes.

    Raises UserError naming the file.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{option}: {index} is damaged: {error!r}") from error
    for name in names:
        file = folder / name
        if not file.is_file():
            raise UserError(
                f"{option}: {file} does not exist; weights are read from safetensors only"
                + (f", and {index.name} lists {len(names)} files of them" if len(names) > 1 else "")
            )
        try:
            with safe_open(file, "pt"):
                continue
        except (SafetensorError, OSError) as error:
            raise UserError(f"{option}: {file} is damaged or cut short: {error}") from error


def model_fingerprint(path: str) -> str:
    """SHA-256 of a model's config and weights, in a folder or under a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        with data.hub_or_cache():
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "config.json"]))
    return checkpoint.fingerprint([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def prompt_set(config: Config, tokenizer: Any, path: str, split: str, option: str) -> data.PromptSet:
    """Read and tokenize one data set."""
    rows = data.read_rows(path, split=split, option=option)
    return data.make_prompts(
        rows, data=config.data, tokenizer=tokenizer, dataset=data.dataset_name(path), option=option
    )


def check_trackers(config: Config) -> None:
    """Raises UserError when W&B is asked for and not installed."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("run.wandb=true needs the wandb package: pip install 'grpo[wandb]'")


def try_rewards(
    config: Config, files: Sequence[Path], prompts: Mapping[str, Sequence[Prompt]], log_dir: Path
) -> list[str]:
    """Run every reward on a few real rows of each data set."""
    samples = {
        option: [
            rewards.RewardItem(
                completion="",
                row=prompt.row,
                messages=prompt.messages,
                info={"token_count": 0, "finish_reason": "stop", "prompt": prompt.text, "step": 0},
            )
            for prompt in some[:TRIED_ROWS]
        ]
        for option, some in prompts.items()
    }
    report = preflight.try_out(
        config.rewards,
        files,
        samples,
        gold_template=config.data.gold_template,
        answer_column=config.data.answer_column,
        log_dir=log_dir,
    )
    return [f"reward     {line}" for line in report]


def describe(config: Config, train: data.PromptSet, held_out: data.PromptSet, ends: Sequence[int]) -> list[str]:
    """The plan: data, batch algebra, objective, engines."""
    eval_prompts = held_out.prompts[: config.data.eval.limit]
    a = config.algorithm
    rollouts = a.prompts_per_step * a.group_size
    updates = config.optimizer_steps_per_step
    longest = max(len(prompt.token_ids) for prompt in train.prompts)
    epochs = config.run.steps * a.prompts_per_step / len(train.prompts)
    ratio = (
        "one update per batch: the ratio is exactly 1 and clipping inactive"
        if updates == 1
        else f"ratio clipped to [{1 - a.eps_low:g}, {1 + a.eps_high:g}]"
    )
    lines = [
        f"model      {config.model.path} in {config.model.dtype}",
        f"data       {len(train.prompts)} prompts, longest {longest} tokens; {epochs:.2f} epochs in "
        f"{config.run.steps} steps",
        f"first      {train.prompts[0].text[-60:]!r} -> {list(train.prompts[0].token_ids[-12:])}, ends on {list(ends)}",
        f"step       {a.prompts_per_step} prompts x {a.group_size} completions = {rollouts} rollouts -> "
        f"{a.minibatches_per_step} minibatches x {a.epochs_per_step} epochs = {updates} optimizer steps",
        f"objective  {a.advantage}, {a.loss}, {a.aggregation}; {ratio}; {anchor(config)}; temperature "
        f"{config.sampling.temperature:g}",
        f"engines    {config.sampler.num_samplers} samplers, {config.learner.ranks} learner ranks at ZeRO "
        f"{config.learner.zero_stage}, microbatches of up to {config.learner.tokens_per_microbatch} tokens",
    ]
    if eval_prompts:
        k = config.data.eval.samples_per_prompt
        lines.append(f"eval       {len(eval_prompts)} held-out prompts, avg@{k}")
        overlap = {p.token_ids for p in eval_prompts} & {p.token_ids for p in train.prompts}
        if overlap:
            lines.append(f"warning    {len(overlap)} evaluation prompts are also in data.train")
    for option, prompts in (("data.train", train.prompts), ("data.eval.path", held_out.prompts)):
        doubles = len(prompts) - len({prompt.token_ids for prompt in prompts})
        if doubles:
            lines.append(f"warning    {doubles} of {len(prompts)} prompts of {option} stand there more than once")
    for option, dropped in (("data.train", train.dropped), ("data.eval.path", held_out.dropped)):
        if dropped:
            more = f" and {len(dropped) - SHOWN_DROPPED} more" if len(dropped) > SHOWN_DROPPED else ""
            lines.append(
                f"dropped    {len(dropped)} prompts of {option} with more than {config.data.max_prompt_tokens} tokens: "
                f"{', '.join(dropped[:SHOWN_DROPPED])}{more}"
            )
    return lines


def anchor(config: Config) -> str:
    """The KL to the reference, in words."""
    a = config.algorithm
    if a.kl_coef == 0:
        return "no reference"
    how = f" with the gradient {a.kl_gradient}" if a.kl_place == "loss" else ""
    return f"{a.kl_coef:g} x {a.kl_estimator} to the reference in the {a.kl_place}{how}"


def resolve_paths(config: Config) -> Config:
    """The model's path absolute where it is a local one: actors may run in another working directory."""
    path = Path(config.model.path).expanduser()
    if not path.is_dir():
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(path.resolve())))
