"""Options of an evaluation without a recipe that nobody gave: they follow from the model and the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from grpo import data
from grpo.checks.model_folder import read_config
from grpo.config import Config
from grpo.types import UserError

ANY_LENGTH = 2**31


def choose(config: Config, given: Collection[str]) -> tuple[Config, str]:
    """Choose the style of the prompts by the tokenizer, their maximum length by the data, and that of completions by
    the model's context and the default.

    Return the config and a line that says what was chosen; "" if all of these options are in `given`, or if the model
    does not exist, which a later check reports.

    Raises UserError when a prompt leaves no room for a completion.
    """
    path = config.model.path
    if data.is_path(path) and not Path(path).is_dir():
        return config, ""
    chosen: dict[str, str | int] = {}
    tokenizer = data.load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    settings = config.data
    if not _is_given("data.style", given):
        settings = dataclasses.replace(settings, style="chat" if tokenizer.chat_template else "template")
        chosen["data.style"] = settings.style
    if not _is_given("data.max_prompt_tokens", given):
        sets = [dataclasses.replace(one, limit=None) for one in settings.eval.sets]  # all rows have to fit
        held_out = dataclasses.replace(settings.eval, sets=sets)
        whole = dataclasses.replace(settings, max_prompt_tokens=ANY_LENGTH, eval=held_out)
        _, read = data.read_data(dataclasses.replace(config, data=whole), tokenizer)
        longest = max(len(prompt.token_ids) for dataset in read for prompt in dataset.prompts)
        chosen["data.max_prompt_tokens"] = longest
        settings = dataclasses.replace(settings, max_prompt_tokens=longest)
    sampling = config.sampling
    positions = getattr(read_config(config, "model.path", path), "max_position_embeddings", None)
    if not _is_given("sampling.max_tokens", given):
        room = sampling.max_tokens if positions is None else positions - settings.max_prompt_tokens
        if room < 1:
            raise UserError(
                f"prompts of {settings.max_prompt_tokens} tokens leave no room for a completion in the {positions} "
                f"positions of {path}; leave out the long ones: data.max_prompt_tokens=N data.overlong_prompts=drop"
            )
        if config.data.eval.max_tokens is None:  # else it has no effect
            chosen["sampling.max_tokens"] = min(sampling.max_tokens, room)
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))
    said = " ".join(f"{name}={value}" for name, value in chosen.items())
    line = f"chosen     {said}; give these options to change them" if chosen else ""
    return dataclasses.replace(config, data=settings, sampling=sampling), line


def _is_given(option: str, given: Collection[str]) -> bool:
    """Return whether `given` has the option or a section that contains it."""
    return any(option == name or option.startswith(f"{name}.") for name in given)
