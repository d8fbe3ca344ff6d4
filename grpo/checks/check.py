"""Check data, batch algebra, rewards and resources before an engine starts, and return the plan.

`grpo check` stops here; `grpo train` runs the same checks first.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from grpo import data
from grpo.checks import models
from grpo.config import Config, DatasetConfig, validate_gold
from grpo.data.columns import hint
from grpo.files import fingerprint
from grpo.planning.shapes import refuse_outer_folder, split_problems
from grpo.rewards import functions, preflight
from grpo.rewards.imports import locate, reward_sources
from grpo.rewards.process import secrets
from grpo.suggest import suggest
from grpo.types import Moment, Prompt, UserError

TRIED_ROWS = 8
READ_BYTES = 16e9
"""Approximate number of bytes of a model's weights to read when checking that they are finite: half a minute on a
shared file system."""
MIN_SECRET = 8
"""Minimum length of a secret to search for, in characters; shorter ones occur by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """A checked run, ready to start."""

    config: Config
    tokenizer: Any
    prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    end_token_ids: tuple[int, ...]
    reward_files: tuple[Path, ...]
    lines: tuple[str, ...]
    """Description of the plan, to be printed."""
    fingerprints: Mapping[str, str]
    """SHA-256 of the data sets (after their filters) and the reward files, by the option that names them."""
    dropped: tuple[str, ...]
    """`<prompt id> (<reason>)` for every row of training and evaluation data that a filter dropped."""


def check(
    config: Config,
    recipe: Path,
    log_dir: Path,
    say: Callable[[str], None] = lambda _: None,
    *,
    ids: bool = False,
    written: Path | None = None,
) -> CheckedRun:
    """Check a loaded config against its files.

    `say` receives the progress of long work. `ids`: include the token ids of the first prompt in the plan. `written`:
    folder with the files of reward functions that were given as Python objects.

    Raises UserError at the first problem.
    """
    refuse_secrets(config)
    settings = check_model(config)
    if config.critic.path is not None:
        check_critic(config)
    models.check_trained(config, settings, say)
    check_trackers(config)
    tokenizer, ends = load_tokenizer(config)
    train, held_out = read_data(config, tokenizer)
    check_token_ids(config, settings, tokenizer, ends, [*train, *held_out])
    prompts = tuple(prompt for dataset in train for prompt in dataset.prompts)
    eval_prompts = tuple(prompt for dataset in held_out for prompt in dataset.prompts)
    check_batch(config, train)
    check_by(config, eval_prompts)
    files = tuple(locate(config.rewards, recipe, written))
    config = decide_gold(config, files)
    check_reward_sets(config, [*train, *held_out])
    updates = config.optimizer_steps_per_step
    unsampled = unsampled_by(tokenizer, ends, Moment(max_steps=config.run.steps * updates))
    tried = try_rewards(config, files, [*train, *held_out], unsampled, log_dir, say)
    return CheckedRun(
        config=config,
        tokenizer=tokenizer,
        prompts=prompts,
        eval_prompts=eval_prompts,
        end_token_ids=ends,
        reward_files=files,
        lines=(*describe(config, train, held_out), *data.shown(prompts[0], tokenizer, ends, ids=ids), *tried),
        fingerprints={
            "data.train": data.fingerprint(prompts),
            **({"data.eval.sets": data.fingerprint(eval_prompts)} if eval_prompts else {}),
            **reward_fingerprints(files),
        },
        dropped=tuple(line for dataset in (*train, *held_out) for line in dataset.dropped),
    )


def check_evaluation(
    config: Config,
    recipe: Path,
    log_dir: Path,
    say: Callable[[str], None] = lambda _: None,
    *,
    written: Path | None = None,
) -> CheckedRun:
    """Check a config for evaluation only, like `check`, but without training data and learner.

    Raises UserError at the first problem.
    """
    refuse_secrets(config)
    settings = check_model(config)
    models.check_served(config, settings, say)
    tokenizer, ends = load_tokenizer(config)
    _, held_out = read_data(config, tokenizer)
    check_token_ids(config, settings, tokenizer, ends, held_out)
    prompts = tuple(prompt for dataset in held_out for prompt in dataset.prompts)
    check_by(config, prompts)
    names = {dataset.name for dataset in held_out}
    # rewards for training sets only have nothing to score here
    own = [reward for reward in config.rewards if not reward.sets or names & {*reward.sets}]
    config = dataclasses.replace(
        config, rewards=[dataclasses.replace(r, sets=tuple(n for n in r.sets if n in names)) for r in own]
    )
    files = tuple(locate(config.rewards, recipe, written))
    config = decide_gold(config, files)
    check_reward_sets(config, held_out)
    tried = try_rewards(config, files, held_out, unsampled_by(tokenizer, ends, Moment()), log_dir, say)
    sizes = ", ".join(f"{dataset.name} ({len(dataset.prompts)} prompts)" for dataset in held_out)
    return CheckedRun(
        config=config,
        tokenizer=tokenizer,
        prompts=(),
        eval_prompts=prompts,
        end_token_ids=ends,
        reward_files=files,
        lines=(
            f"model      {config.model.path} in {config.model.dtype}",
            f"data       {sizes}",
            *data.shown(prompts[0], tokenizer, ends, ids=False),
            *tried,
        ),
        fingerprints={
            "data.eval.sets": data.fingerprint(prompts),
            **reward_fingerprints(files),
        },
        dropped=tuple(line for dataset in held_out for line in dataset.dropped),
    )


def load_tokenizer(config: Config) -> tuple[Any, tuple[int, ...]]:
    """Return the tokenizer of the model and the token ids that end a completion."""
    path = config.model.path
    tokenizer = data.load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    return tokenizer, tuple(data.end_token_ids(tokenizer, path, config.sampling.stop_token_ids))


def check_token_ids(
    config: Config, settings: Any, tokenizer: Any, ends: Sequence[int], sets: Sequence[data.PromptSet]
) -> None:
    """Check that every token id has a row in the model's embedding: a tokenizer may have more tokens than the model.

    Raises UserError naming the data row and the token, or the option at fault.
    """
    rows = settings.get_text_config().vocab_size
    beyond = f"beyond the {rows} rows of the model's embedding (config.json's vocab_size)"
    for token_id in config.sampling.stop_token_ids:
        if token_id >= rows:
            raise UserError(f"sampling.stop_token_ids: {token_id} is {beyond}: it is never sampled")
    if min(ends) >= rows:
        raise UserError(f"model.path: every token that ends a completion, {', '.join(map(str, ends))}, is {beyond}")
    for dataset in sets:
        for prompt in dataset.prompts:
            token_id = max(prompt.token_ids)
            if token_id >= rows:
                raise UserError(
                    f"{dataset.option}: {prompt.where}: the prompt has the token "
                    f"{tokenizer.convert_ids_to_tokens(token_id)!r}, whose id {token_id} is {beyond}"
                )


def refuse_secrets(config: Config) -> None:
    """Refuse a config that contains a secret, through ${oc.env:...} or otherwise, since it is saved with the run.

    Raises UserError naming the environment variable whose value the config contains.
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
    """Yield every value of a nested config as text."""
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)
    else:
        yield str(tree)


def check_model(config: Config) -> Any:
    """Check the model at `model.path` and return its config.

    Its folder, weights, attention package, maximum length and parallel split are checked.

    Raises UserError at the first problem.
    """
    path = Path(config.model.path)
    if not path.is_dir() and data.is_path(config.model.path):
        script = Path("recipes", path.parent.name).with_suffix(".py")
        made_here = path.parent.parent.name == "tiny" and script.exists()
        close = "" if path.exists() else data.nearest_path(path)
        hint = f"; make it with: python {script}" if made_here else close
        raise UserError(f"model.path={config.model.path} is not a folder{hint}")
    refuse_adapter("model.path", config.model.path)
    model = read_config(config, "model.path", config.model.path)
    refuse_quantized("model.path", config.model.path, model)
    if path.is_dir():
        check_weights(path)
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    package = packages.get(config.model.attention)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"model.attention={config.model.attention} needs the package {package}, which is not installed; nearest: "
            "model.attention=auto, which takes what is"
        )
    limit = getattr(model, "max_position_embeddings", None)
    if limit is not None and config.max_row_tokens > limit:
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + sampling.max_tokens (or data.eval.max_tokens)="
            f"{config.max_row_tokens - config.data.max_prompt_tokens} exceed the model's {limit} positions; lower them"
        )

    def size(name: str) -> int:
        value = getattr(model, name, None)
        return value if isinstance(value, int) else 0

    heads = size("num_attention_heads")
    problems = split_problems(
        config.cluster.tensor_parallel, config.cluster.pipeline_parallel, heads=heads,
        kv_heads=size("num_key_value_heads") or heads, intermediate=size("intermediate_size"),
        vocab=size("vocab_size"), layers=size("num_hidden_layers"),
    )  # fmt: skip
    if problems:
        raise UserError(problems[0])
    return model


def read_config(config: Config, option: str, path: str) -> Any:
    """Return the config.json of a model.

    Raises UserError if there is none, or if it is not a model config.
    """
    remark = ""
    refuse_outer_folder(option, path)
    try:
        with data.hub_or_cache() if not Path(path).is_dir() else nullcontext("") as remark:
            return AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        local = Path(path)  # a hub id may be a typo of a folder's name, if there is such a folder
        near = data.nearest_path(local) if not local.exists() and local.parent.is_dir() else ""
        raise UserError(f"{option}={path}{remark}: {' '.join(str(error).split())[:300]}{near}") from error
    except Exception as error:  # whatever the config classes raise
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{option}={path}: its config.json is not that of a model: {why}") from error


def refuse_adapter(option: str, path: str) -> None:
    """Raise UserError for a folder with an adapter: transformers would load the base model that the adapter names."""
    file = Path(path).expanduser() / "adapter_config.json"
    if file.is_file():
        try:
            base = json.loads(file.read_text()).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            base = None
        raise UserError(
            f"{option}={path} holds an adapter of {base or 'another model'}, no whole model; merge it into its "
            "base (merge_and_unload of peft) and save that, or remove adapter_config.json where it is merged already"
        )


def refuse_quantized(option: str, path: str, model: Any) -> None:
    """Raise UserError for quantized weights: the learner trains unquantized weights, and the sampler must use the
    same."""
    settings = getattr(model, "quantization_config", None)
    if settings:
        how = settings.get("quant_method") if isinstance(settings, dict) else None
        raise UserError(
            f"{option}={path} is quantized ({how or 'by its quantization_config'}); only whole weights are trained; "
            "give the model that it was made from"
        )


def check_critic(config: Config) -> None:
    """Check that `critic.path` is a model with the vocabulary size of the policy.

    Raises UserError at the first problem.
    """
    assert config.critic.path is not None
    refuse_adapter("critic.path", config.critic.path)
    critic = read_config(config, "critic.path", config.critic.path)
    refuse_quantized("critic.path", config.critic.path, critic)
    policy = read_config(config, "model.path", config.model.path)
    if critic.vocab_size != policy.vocab_size:
        raise UserError(
            f"critic.path={config.critic.path} has a vocabulary of {critic.vocab_size} and model.path one of "
            f"{policy.vocab_size}: the critic would read other tokens than the policy writes"
        )
    if Path(config.critic.path).is_dir():
        check_weights(Path(config.critic.path), "critic.path")


def check_weights(folder: Path, option: str = "model.path") -> None:
    """Check that the safetensors files of the folder exist, are complete, and hold finite numbers.

    If they exceed READ_BYTES, only every n-th tensor is read.

    Raises UserError naming the file.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{option}: {index} is damaged: {error!r}") from error
    every = max(1, math.ceil(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / READ_BYTES))
    for name in names:
        file = folder / name
        if not file.is_file():
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            raise UserError(
                f"{option}: {file} does not exist; weights are read from safetensors only"
                + (f", and {index.name} lists {len(names)} files of them" if len(names) > 1 else "")
                + (
                    f", and {', '.join(others[:3])} is none; transformers' save_pretrained writes them"
                    if others
                    else ""
                )
            )
        try:
            with safe_open(file, "pt") as weights:
                keys = [*weights.keys()][::every]
                broken = next((key for key in keys if not is_finite(weights.get_tensor(key))), None)
        except (SafetensorError, OSError) as error:
            found = data.disguise_of(file)
            what = f"is {found}" if found else f"is damaged or cut short: {error}"
            raise UserError(f"{option}: {file} {what}") from error
        if broken is not None:
            raise UserError(
                f"{option}: {file}: {broken} has numbers that are not finite; the training that wrote it failed"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers of a tensor are finite. Integers and 8-bit floats count as finite."""
    if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel():
        return True
    return all(math.isfinite(float(end)) for end in tensor.aminmax())


def reward_fingerprints(files: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of each reward file together with the modules that it imports, by the option that names it.

    For the file of a function, it is that of the function's source and of what it uses.
    """
    return {
        f"rewards[{i}].file": functions.digest_of(file) or fingerprint(reward_sources(file))
        for i, file in enumerate(files)
    }


def model_fingerprint(path: str) -> str:
    """Return the SHA-256 of the config and weights of a model, given by its folder or hub id."""
    folder = Path(path)
    if not folder.is_dir():
        with data.hub_or_cache():
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "config.json"]))
    return fingerprint([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def read_data(config: Config, tokenizer: Any) -> tuple[list[data.PromptSet], list[data.PromptSet]]:
    """Return the filtered prompts of every training set and every evaluation set.

    Raises UserError, also if two data sets have the same name.
    """

    def read(option: str, sets: Sequence[DatasetConfig]) -> list[data.PromptSet]:
        names: dict[str, str] = {}
        for i, dataset in enumerate(sets):
            here, name = f"{option}[{i}]", dataset.name or data.dataset_name(dataset.path)
            if name in names:
                raise UserError(f"{names[name]} and {here} are both called {name}; give one another name: {here}.name")
            names[name] = here
        return [
            data.read_set(dataset, data=config.data, tokenizer=tokenizer, option=f"{option}[{i}]")
            for i, dataset in enumerate(sets)
        ]

    def limited(sets: Sequence[data.PromptSet], configs: Sequence[DatasetConfig]) -> list[data.PromptSet]:
        return [data.limited(dataset, of.limit) for dataset, of in zip(sets, configs, strict=True)]

    held_out = limited(read("data.eval.sets", config.data.eval.sets), config.data.eval.sets)
    asked = [prompt for dataset in held_out for prompt in dataset.prompts]
    train = [data.without_overlaps(dataset, asked, config.data) for dataset in read("data.train", config.data.train)]
    return limited(train, config.data.train), held_out


def check_batch(config: Config, train: Sequence[data.PromptSet]) -> None:
    """Check that a step never needs the same prompt twice.

    Raises UserError with the nearest number of prompts.
    """
    a, total = config.algorithm, sum(len(dataset.prompts) for dataset in train)
    if a.prompts_per_step > total:
        raise UserError(
            f"algorithm.prompts_per_step={a.prompts_per_step} is more than data.train has prompts ({total}); "
            f"nearest: {total}"
        )
    weights = [dataset.weight for dataset in config.data.train if dataset.weight is not None]

    def short(count: int) -> tuple[data.PromptSet, int] | None:
        needed = data.most_in_one_draw(weights, count, any_start=a.max_refills > 0)
        pairs = zip(train, needed, strict=bool(weights))
        return next(((dataset, most) for dataset, most in pairs if most > len(dataset.prompts)), None)

    lacking = short(a.prompts_per_step)
    if lacking is not None:
        dataset, most = lacking
        fits = [n for n in range(a.prompts_per_step - 1, 0, -1) if n % a.minibatches_per_step == 0 and not short(n)]
        hint = f"nearest: {fits[0]}" if fits else "no smaller step fits either; give it less weight"
        raise UserError(
            f"algorithm.prompts_per_step={a.prompts_per_step} may need {most} prompts of {dataset.option} "
            f"({dataset.name}) in one step by its weight, and it has {len(dataset.prompts)}; {hint}"
        )


def check_reward_sets(config: Config, sets: Sequence[data.PromptSet]) -> None:
    """Check that `rewards[i].sets` name existing data sets, that every data set has a reward, and that every training
    set has one with a weight other than 0.

    Raises UserError at the first problem.
    """
    names = sorted({dataset.name for dataset in sets})
    for i, reward in enumerate(config.rewards):
        for name in reward.sets:
            if name not in names:
                raise UserError(
                    f"rewards[{i}].sets: no data set is called {name}; there are {', '.join(names)}"
                    + suggest(name, names)
                )
    for dataset in sets:
        if not any(reward.applies_to(dataset.name) for reward in config.rewards):
            raise UserError(f"{dataset.option}: no reward is for {dataset.name}; name it in rewards[i].sets of one")
        weighted = any(reward.weight for reward in config.rewards if reward.applies_to(dataset.name))
        if not weighted and dataset.option.startswith("data.train"):
            raise UserError(
                f"{dataset.option}: every reward for {dataset.name} has the weight 0, so nothing is learned from it; "
                "set rewards[i].weight of one, or leave the data set out"
            )


def check_by(config: Config, held_out: Sequence[Prompt]) -> None:
    """Raise UserError if a column of `data.eval.by` is in no row of the evaluation data."""
    columns = sorted({column for prompt in held_out for column in prompt.row})
    for column in config.data.eval.by:
        if column not in columns:
            raise UserError(
                f"data.eval.by: no row of data.eval.sets has a column {column!r}; there are {', '.join(columns)}"
                f"{hint(column, {name: value for prompt in held_out for name, value in prompt.row.items()})}"
            )


def decide_gold(config: Config, files: Sequence[Path]) -> Config:
    """Return the config with `rewards[i].gold` read from the reward file where the recipe does not set it.

    Raises UserError if `data.gold_template` then has no effect.
    """
    decided = [
        dataclasses.replace(reward, gold=preflight.declares_gold(file)) if reward.gold is None else reward
        for reward, file in zip(config.rewards, files, strict=True)
    ]
    config = dataclasses.replace(config, rewards=decided)
    validate_gold(config)
    return config


def check_trackers(config: Config) -> None:
    """Raise UserError if W&B is enabled but not installed."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("run.wandb=true needs the wandb package: pip install 'grpo[wandb]'")


def unsampled_by(tokenizer: Any, ends: Sequence[int], moment: Moment) -> preflight.Unsampled:
    """Return how to pass rewards completions that were not sampled.

    The token ids of a text end with the first of `ends`. A text that the vocabulary cannot encode has only that id.
    """

    def encode(text: str) -> list[int]:
        try:
            return [*tokenizer.encode(text, add_special_tokens=False), *ends[:1]]
        except Exception:  # noqa: BLE001 - tokenizers raises bare Exception if the vocabulary has no unknown token
            return [*ends[:1]]

    return preflight.Unsampled(encode=encode, moment=moment)


def try_rewards(
    config: Config,
    files: Sequence[Path],
    sets: Sequence[data.PromptSet],
    unsampled: preflight.Unsampled,
    log_dir: Path,
    say: Callable[[str], None],
) -> list[str]:
    """Run every reward on a few real rows of each data set and, if it has `gold: true`, on all gold answers. Return
    report lines."""
    prompts = {f"{dataset.option} ({dataset.name})": dataset.prompts for dataset in sets}
    gold_template, answer_column = config.data.gold_template, config.data.answer_column
    report = preflight.try_out(
        config.rewards,
        files,
        {label: some[:TRIED_ROWS] for label, some in prompts.items()},
        gold_template=gold_template,
        answer_column=answer_column,
        unsampled=unsampled,
        log_dir=log_dir,
    )
    report += preflight.try_golds(
        config.rewards,
        files,
        prompts,
        gold_template=gold_template,
        answer_column=answer_column,
        unsampled=unsampled,
        workers=config.reward_workers,
        log_dir=log_dir,
        say=say,
    )
    return [f"reward     {line}" for line in report]


def describe(config: Config, train: Sequence[data.PromptSet], held_out: Sequence[data.PromptSet]) -> list[str]:
    """Return the lines of the plan: data, batch algebra, objective, engines, warnings."""
    prompts = [prompt for dataset in train for prompt in dataset.prompts]
    eval_prompts = [prompt for dataset in held_out for prompt in dataset.prompts]
    a = config.algorithm
    rollouts = a.prompts_per_step * a.group_size
    updates = config.optimizer_steps_per_step
    longest = max(len(prompt.token_ids) for prompt in prompts)
    drawn = config.run.steps * a.prompts_per_step
    ratio = (
        "one update per batch: the ratio is exactly 1 and clipping inactive"
        if updates == 1
        else f"ratio clipped to [{1 - a.eps_low:g}, {1 + a.eps_high:g}]"
    )
    lines = [
        f"model      {config.model.path} in {config.model.dtype}",
        f"data       {len(prompts)} prompts, longest {longest} tokens; {drawn / len(prompts):.2f} epochs in "
        f"{config.run.steps} steps",
        *mix(config, train, drawn),
        f"step       {a.prompts_per_step} prompts x {a.group_size} completions = {rollouts} rollouts -> "
        f"{a.minibatches_per_step} minibatches x {a.epochs_per_step} epochs = {updates} optimizer steps",
        f"objective  {a.advantage}, {a.loss}, {a.aggregation}; {ratio}; {anchor(config)}; temperature "
        f"{config.sampling.temperature:g}",
        f"optimizer  {config.optimizer.name}, learning rate {config.optimizer.lr:g}, {config.optimizer.schedule}"
        + (f" after {config.optimizer.warmup_steps} steps of warmup" if config.optimizer.warmup_steps else ""),
        f"engines    {config.cluster.samplers} samplers, {config.cluster.learner_ranks} learner ranks at ZeRO "
        f"{config.learner.zero_stage}, microbatches of up to {config.learner.tokens_per_microbatch} tokens",
    ]
    if (warmup := config.optimizer.warmup_steps) >= config.run.steps * updates:
        lines.append(
            f"warning    optimizer.warmup_steps={warmup} of {config.run.steps * updates} optimizer steps: the learning "
            f"rate never reaches {config.optimizer.lr:g}"
        )
    if eval_prompts:
        k = config.data.eval.samples_per_prompt
        lines.append(f"eval       {len(eval_prompts)} held-out prompts, avg@{k}")
    for option, some in (("data.train", prompts), ("data.eval.sets", eval_prompts)):
        doubles = len(some) - len({prompt.token_ids for prompt in some})
        if doubles:
            lines.append(f"warning    {doubles} of {len(some)} prompts of {option} stand there more than once")
    return lines + [note for dataset in (*train, *held_out) for note in dataset.notes]


def mix(config: Config, train: Sequence[data.PromptSet], drawn: int) -> list[str]:
    """Return a line for each data set, if there are several: its number of prompts and how often they are drawn."""
    if len(train) == 1:
        return []
    weights = [of.weight for of in config.data.train if of.weight is not None]
    if not weights:
        return [f"set        {dataset.name}: {len(dataset.prompts)} prompts, in one pool" for dataset in train]
    shares = [weight / sum(weights) for weight in weights]
    return [
        f"set        {dataset.name}: {len(dataset.prompts)} prompts, {share:.1%} of those drawn: "
        f"{drawn * share / len(dataset.prompts):.2f} epochs"
        for dataset, share in zip(train, shares, strict=True)
    ]


def anchor(config: Config) -> str:
    """Describe the KL to the reference in words."""
    a = config.algorithm
    if a.kl_coef == 0:
        return "no reference"
    how = f" with the gradient {a.kl_gradient}" if a.kl_place == "loss" else ""
    return f"{a.kl_coef:g} x {a.kl_estimator} to the reference in the {a.kl_place}{how}"


def resolve_paths(config: Config) -> Config:
    """Return the config with a local model path made absolute and with every data set named.

    Actors may run in another working directory.
    """

    def named(sets: Sequence[Any]) -> list[Any]:
        return [dataclasses.replace(one, name=one.name or data.dataset_name(one.path)) for one in sets]

    held_out = dataclasses.replace(config.data.eval, sets=named(config.data.eval.sets))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, train=named(config.data.train), eval=held_out)
    )
    path = Path(config.model.path).expanduser()
    if not path.is_dir():
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(path.resolve())))
