"""Check the rewards of a run: their files, their data sets, and a try on real rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from grpo import data
from grpo.config import Config, validate_gold
from grpo.files import fingerprint
from grpo.rewards import functions, golds, preflight
from grpo.rewards.imports import reward_sources
from grpo.suggest import suggest
from grpo.types import Moment, UserError

TRIED_ROWS = 8


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
            raise UserError(f"{dataset.option}: no reward scores {dataset.name}; add it to rewards[i].sets of a reward")
        weighted = any(reward.weight for reward in config.rewards if reward.applies_to(dataset.name))
        if not weighted and dataset.option.startswith("data.train"):
            raise UserError(
                f"{dataset.option}: every reward for {dataset.name} has the weight 0, so nothing is learned from it; "
                "set rewards[i].weight of one, or leave the data set out"
            )


def decide_gold(config: Config, files: Sequence[Path]) -> Config:
    """Return the config with `rewards[i].gold` read from the reward file where the recipe does not set it.

    Raises UserError if `data.gold_template` then has no effect.
    """
    decided = [
        dataclasses.replace(reward, gold=golds.declares_gold(file)) if reward.gold is None else reward
        for reward, file in zip(config.rewards, files, strict=True)
    ]
    config = dataclasses.replace(config, rewards=decided)
    validate_gold(config)
    return config


def reward_fingerprints(files: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of each reward file together with the modules that it imports, by the option that names it.

    For the file of a function, it is that of the function's source and of what it uses.
    """
    return {
        f"rewards[{i}].file": functions.digest_of(file) or fingerprint(reward_sources(file))
        for i, file in enumerate(files)
    }


def unsampled_by(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], moment: Moment) -> golds.Unsampled:
    """Return how to pass rewards completions that were not sampled.

    The token ids of a text end with the first of `ends`. A text that the vocabulary cannot encode has only that id.
    """

    def encode(text: str) -> list[int]:
        try:
            return [*tokenizer.encode(text, add_special_tokens=False), *ends[:1]]
        except Exception:  # noqa: BLE001 - tokenizers raises bare Exception if the vocabulary has no unknown token
            return [*ends[:1]]

    return golds.Unsampled(encode=encode, moment=moment)


def try_rewards(
    config: Config,
    files: Sequence[Path],
    sets: Sequence[data.PromptSet],
    unsampled: golds.Unsampled,
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
    report += golds.try_golds(
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
