"""Check data, batch algebra, rewards and resources before an engine starts, and return the plan.

`grpo check` stops here; `grpo train` runs the same checks first.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from grpo import data
from grpo.checks import models
from grpo.checks.chosen import choose
from grpo.checks.describe import describe
from grpo.checks.model_folder import check_critic, check_model
from grpo.checks.rewards import check_reward_sets, decide_gold, reward_fingerprints, try_rewards, unsampled_by
from grpo.config import Config, DatasetConfig, leaves
from grpo.data.columns import hint
from grpo.rewards.imports import locate
from grpo.rewards.process import MIN_SECRET, secrets
from grpo.types import Moment, Prompt, UserError

T = TypeVar("T", bound=DatasetConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """A checked run, ready to start."""

    config: Config
    given: Config
    """The config before `rewards[i].gold` was decided, for the run folder."""
    tokenizer: PreTrainedTokenizerBase
    prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    end_token_ids: tuple[int, ...]
    reward_files: tuple[Path, ...]
    described: tuple[str, ...]
    """Lines that describe the plan."""
    shown: tuple[str, ...]
    """Lines that show the first prompt."""
    tried: tuple[str, ...]
    """Lines about what the rewards did on real rows."""
    fingerprints: Mapping[str, str]
    """SHA-256 of the data sets (after their filters) and the reward files, by the option that names them."""
    dropped: tuple[str, ...]
    """`<prompt id> (<reason>)` for every row of training and evaluation data that a filter dropped."""

    @property
    def lines(self) -> tuple[str, ...]:
        """Return all lines to be printed."""
        return (*self.described, *self.shown, *self.tried)

    @property
    def repeated_lines(self) -> tuple[str, ...]:
        """Return the lines to be printed when work is resumed: the first prompt has been shown before."""
        return (*self.described, *self.tried)


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
    train, held_out = data.read_data(config, tokenizer)
    check_token_ids(config, settings, tokenizer, ends, [*train, *held_out])
    prompts = tuple(prompt for dataset in train for prompt in dataset.prompts)
    eval_prompts = tuple(prompt for dataset in held_out for prompt in dataset.prompts)
    check_batch(config, train)
    check_by(config, eval_prompts)
    files = tuple(locate(config.rewards, recipe, written))
    given, config = config, decide_gold(config, files)
    check_reward_sets(config, [*train, *held_out])
    updates = config.optimizer_steps_per_step
    unsampled = unsampled_by(tokenizer, ends, Moment(max_steps=config.run.steps * updates))
    tried = try_rewards(config, files, [*train, *held_out], unsampled, log_dir, say)
    return CheckedRun(
        config=config,
        given=given,
        tokenizer=tokenizer,
        prompts=prompts,
        eval_prompts=eval_prompts,
        end_token_ids=ends,
        reward_files=files,
        described=tuple(describe(config, train, held_out)),
        shown=tuple(data.shown(prompts[0], tokenizer, ends, ids=ids)),
        tried=tuple(tried),
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
    overridden: Collection[str] | None = None,
) -> CheckedRun:
    """Check a config for evaluation only, like `check`, but without training data and learner.

    `overridden`: options that were given for an evaluation without a recipe; others are chosen by the model and the
    data. None: there is a recipe.

    Raises UserError at the first problem.
    """
    refuse_secrets(config)
    chosen = ""
    if overridden is not None:
        config, chosen = choose(config, overridden)
    settings = check_model(config)
    models.check_served(config, settings, say)
    tokenizer, ends = load_tokenizer(config)
    _, held_out = data.read_data(config, tokenizer)
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
    given, config = config, decide_gold(config, files)
    check_reward_sets(config, held_out)
    tried = try_rewards(config, files, held_out, unsampled_by(tokenizer, ends, Moment()), log_dir, say)
    sizes = ", ".join(f"{dataset.name} ({len(dataset.prompts)} prompts)" for dataset in held_out)
    return CheckedRun(
        config=config,
        given=given,
        tokenizer=tokenizer,
        prompts=(),
        eval_prompts=prompts,
        end_token_ids=ends,
        reward_files=files,
        described=(
            f"model      {config.model.path} in {config.model.dtype}",
            f"data       {sizes}",
            *([chosen] if chosen else []),
        ),
        shown=tuple(data.shown(prompts[0], tokenizer, ends, ids=False)),
        tried=tuple(tried),
        fingerprints={
            "data.eval.sets": data.fingerprint(prompts),
            **reward_fingerprints(files),
        },
        dropped=tuple(line for dataset in held_out for line in dataset.dropped),
    )


def load_tokenizer(config: Config) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """Return the tokenizer of the model and the token ids that end a completion."""
    path = config.model.path
    tokenizer = data.load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    return tokenizer, tuple(data.end_token_ids(tokenizer, path, config.sampling.stop_token_ids))


def refuse_secrets(config: Config) -> None:
    """Refuse a config that contains a secret, through ${oc.env:...} or otherwise, since it is saved with the run.

    Raises UserError naming the environment variable whose value the config contains.
    """
    texts = [str(value) for _, value in leaves(dataclasses.asdict(config))]
    for name in secrets(os.environ):
        value = os.environ[name]
        if len(value) >= MIN_SECRET and any(value in text for text in texts):
            raise UserError(
                f"the recipe contains the value of the environment variable {name}, which would be saved with the run; "
                f"to pass it to a reward, use rewards[i].env: [{name}]"
            )


def check_trackers(config: Config) -> None:
    """Raise UserError if W&B is enabled but not installed."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("run.wandb=true needs the wandb package: pip install 'grpo[wandb]'")


def resolve_paths(config: Config) -> Config:
    """Return the config with a local model path made absolute and with every data set named.

    Actors may run in another working directory.
    """

    def named(sets: Sequence[T]) -> list[T]:
        return [dataclasses.replace(one, name=one.name or data.dataset_name(one.path)) for one in sets]

    held_out = dataclasses.replace(config.data.eval, sets=named(config.data.eval.sets))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, train=named(config.data.train), eval=held_out)
    )
    path = Path(config.model.path).expanduser()
    if not path.is_dir():
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(path.resolve())))


def check_token_ids(
    config: Config,
    settings: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    sets: Sequence[data.PromptSet],
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


def check_batch(config: Config, train: Sequence[data.PromptSet]) -> None:
    """Check that a step never needs the same prompt twice.

    Raises UserError with the nearest number of prompts.
    """
    a, total = config.algorithm, sum(len(dataset.prompts) for dataset in train)
    if a.prompts_per_step > total:
        raise UserError(
            f"algorithm.prompts_per_step={a.prompts_per_step} is more than the number of prompts in data.train "
            f"({total}); nearest: {total}"
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
        hint = f"nearest: {fits[0]}" if fits else "no smaller step fits either; lower its weight"
        raise UserError(
            f"algorithm.prompts_per_step={a.prompts_per_step} may need {most} prompts of {dataset.option} "
            f"({dataset.name}) in one step because of its weight, but it has {len(dataset.prompts)}; {hint}"
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
