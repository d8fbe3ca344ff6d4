"""Read the data sets of a run, and check them against the model and the batch algebra."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from grpo import data
from grpo.config import Config, DatasetConfig
from grpo.data.columns import hint
from grpo.types import Prompt, UserError


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[data.PromptSet], list[data.PromptSet]]:
    """Return the filtered prompts of every training set and every evaluation set.

    Raises UserError, also if two data sets have the same name.
    """

    def read(option: str, sets: Sequence[DatasetConfig]) -> list[data.PromptSet]:
        names: dict[str, str] = {}
        for i, dataset in enumerate(sets):
            here, name = f"{option}[{i}]", dataset.name or data.dataset_name(dataset.path)
            if name in names:
                raise UserError(f"{names[name]} and {here} are both called {name}; rename one of them: {here}.name")
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
