"""Load a recipe and overrides into a `Config`. Unknown keys and wrong types fail here, with the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo import builtin
from grpo.config import aliases
from grpo.config.dump import Dumper, literal
from grpo.config.options import Kind, general, item_class, options, section_class
from grpo.config.python import Recipe, Reward, plain_value
from grpo.config.schema import Config, SamplingConfig
from grpo.config.schema_data import DatasetConfig
from grpo.config.validate import validate
from grpo.suggest import common_start, one_line, suggest
from grpo.types import Json, Unchecked, UserError

REPLAYABLE = "temperature"
NOT_REPLAYABLE = (
    "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens", "logit_bias", "bad_words", "allowed_token_ids", "n", "best_of", "logits_processors",
)  # fmt: skip
"""Sampling settings that the learner cannot apply to its own logits; refused by name in `sampling`."""


def load(
    recipe: Recipe, overrides: typing.Sequence[str] = (), rewards: typing.Sequence[Reward] | None = None
) -> Config:
    """Read `recipe`, apply `section.option=value` overrides, and validate everything that needs no other file.

    Args:
        recipe: A YAML file, the name of a built-in recipe, the same sections as a mapping, or a config.
        rewards: Used instead of the rewards of the recipe, before the overrides.

    Raises UserError naming the file or option at fault.
    """
    tree = _tree(recipe)
    if rewards is not None:
        tree["rewards"] = _sections(rewards)
    return _configure(tree, overrides, _source(recipe))


def find_recipe(recipe: str | Path) -> Path:
    """Return `recipe` if it is a file, else the built-in recipe of that name, else `recipe`."""
    path = Path(recipe)
    return path if path.is_file() else builtin.find("recipes", str(recipe)) or path


def load_for_evaluation(
    recipe: Recipe | None,
    *,
    model: str,
    data: typing.Sequence[str],
    rewards: typing.Sequence[Reward],
    overrides: typing.Sequence[str],
) -> Config:
    """Return the config of `grpo eval`: `recipe` or the defaults, with `model`, and with `data` and `rewards` if given.

    The config has no learner ranks, and options that only training needs may be missing from the recipe.

    Raises UserError naming the file or option at fault.
    """
    source = "grpo eval" if recipe is None else _source(recipe)
    unused = {
        "data": {"train": [{"path": "none.jsonl"}]},
        "algorithm": {"prompts_per_step": 1, "group_size": 2},
        "run": {"steps": 0},
    }
    tree = OmegaConf.create(unused)
    if recipe is not None:
        tree = typing.cast(DictConfig, OmegaConf.merge(tree, _tree(recipe)))
    OmegaConf.update(tree, "model.path", model, force_add=True)
    if data:
        OmegaConf.update(tree, "data.eval.sets", [{"path": path} for path in data], force_add=True)
    if rewards:
        tree["rewards"] = _sections(rewards)
    lacking = [
        (f"no {what} ({option})", flag)
        for option, flag, what in (
            ("data.eval.sets", "--data PATH", "held-out data"),
            ("rewards", "--reward FILE", "reward"),
        )
        if not OmegaConf.select(tree, option) and not any(text.startswith(option) for text in overrides)
    ]
    if lacking:
        whats, flags = (" and ".join(parts) for parts in zip(*lacking, strict=True))
        it = "them" if len(lacking) > 1 else "it"
        raise UserError(f"{source} names {whats}; give {it} with {flags}, or a recipe with --recipe")
    config = _configure(tree, overrides, source)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=[]),
        cluster=dataclasses.replace(config.cluster, learner_ranks=0, reward_nodes=0, layout="disaggregated"),
    )


def _source(recipe: Recipe) -> str:
    """Return the name of `recipe` in error messages."""
    return str(recipe) if isinstance(recipe, str | Path) else "recipe"


def _sections(rewards: typing.Sequence[Reward]) -> list[dict[str, str]]:
    """Return the section `rewards` of a recipe."""
    return [{"file": reward} if isinstance(reward, str) else dict(reward) for reward in rewards]


def _tree(recipe: Recipe) -> DictConfig:
    """Return the sections of `recipe` as a tree.

    Raises UserError if a file cannot be read, or if a value of a mapping is no value of an option.
    """
    if isinstance(recipe, str | Path):
        return _read(find_recipe(recipe))
    if isinstance(recipe, Config):
        sections = literal(plain_value(dataclasses.asdict(recipe), "recipe"))
    else:
        sections = plain_value(recipe, "recipe")
    text = yaml.dump(sections, Dumper=Dumper)
    tree = OmegaConf.create(text)
    assert isinstance(tree, DictConfig)
    return _listed(tree)


def _read(path: Path) -> DictConfig:
    """Read a recipe file into a tree.

    Raises UserError if it does not exist, is not valid YAML, or is not a mapping.
    """
    if not path.is_file():
        hint = builtin.listing("recipes", str(path)) + (
            suggest(path.name, {other.name: str(other) for other in path.parent.glob("*.yaml")})
            or builtin.suggest("recipes", str(path))
        )
        raise UserError(f"recipe {path} {'is a folder' if path.is_dir() else 'does not exist'}{hint}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # yaml has many error classes; all get the same message
        mark = getattr(error, "problem_mark", None)
        lines = path.read_text(errors="replace").split("\n")
        tab = mark is not None and mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]
        hint = "; the line is indented with a tab, but YAML needs spaces" if tab else ""
        raise UserError(f"{path} is not valid YAML: {one_line(error, 2000)}{hint}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} must be a mapping of sections: {', '.join(_names(Config))}")
    return _listed(tree)


def _configure(tree: DictConfig, overrides: typing.Sequence[str], path: str) -> Config:
    """Build and validate a config from a tree and overrides. `path` names the source of the tree in errors."""
    for override in overrides:
        tree = _listed(_override(tree, override))
    sections = _plain(tree)
    if answers := aliases.joined(aliases.answer(name, value, _own_names()) for name, value in _unknown(sections)):
        raise UserError(f"{path}: {answers}")
    _check_keys(sections, path)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list for a mapping, or a mapping for a list
        option = str(getattr(error, "full_key", None) or "")
        reason = str(error).split("\n")[0]
        if "Missing mandatory" in reason or "MissingMandatoryValue" in type(error).__name__:
            raise UserError(f"{path}: {option} is required and not set") from error
        raise UserError(f"{path}: {_misfit(sections) or reason}") from error
    assert isinstance(config, Config)
    validate(config)
    return config


def _plain(tree: DictConfig) -> dict[str, Json]:
    """Return `tree` as plain values."""
    plain = OmegaConf.to_container(tree)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _listed(tree: DictConfig) -> DictConfig:
    """Return `tree` with data sets as lists of mappings, also if the recipe gives only paths."""
    plain = _plain(tree)
    data = plain.get("data")
    held_out = data.get("eval") if isinstance(data, dict) else None
    for section, key in ((data, "train"), (held_out, "sets")):
        if not isinstance(section, dict) or section.get(key) in (None, MISSING):
            continue
        items = [section[key]] if isinstance(section[key], str) else section[key]
        if isinstance(items, list):
            section[key] = [{"path": item} if isinstance(item, str) else item for item in items]
    return OmegaConf.create(plain)


def _override(tree: DictConfig, text: str) -> DictConfig:
    key, equals, raw = text.partition("=")
    key = key.lstrip("+")  # Hydra's prefix for a new option
    if not equals or not re.fullmatch(r"[\w.\[\]]+", key):
        said = aliases.answer(key, raw, _own_names()) if equals else aliases.meaning(key, _own_names())
        raise UserError(f"override {text!r} is not of the form section.option=value" + (f"; {said}" if said else ""))
    bracketed = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)
    index = re.match(r"([\w.]+)\[(\d+)\]", bracketed)
    if index and item_class(_kind(index[1])):
        found = OmegaConf.select(tree, index[1])
        count = len(found) if isinstance(found, ListConfig) else 0
        if int(index[2]) >= count:
            raise UserError(f"override {text!r}: the recipe has {count} {index[1]}, counted from 0")
    try:
        kind = _kind(bracketed)
        value = None if raw == "null" else _value(kind, raw)
        OmegaConf.update(tree, bracketed, value, merge=item_class(kind) is None, force_add=True)
    except Exception as error:  # an invalid list index or an unparsable value, from omegaconf or yaml
        raise UserError(f"override {text!r}: {one_line(error, 2000)}") from error
    return tree


def _value(kind: Kind, raw: str) -> Unchecked:
    """Parse the value of an override.

    Strings are not parsed as YAML, since templates are seldom valid YAML. Nor are paths given instead of a list of
    data sets.
    """
    if kind in (str, str | None) or (item_class(kind) and not raw.startswith(("[", "{"))):
        return raw
    return OmegaConf.from_dotlist([f"value={raw}"])["value"]


def _kind(key: str) -> Kind:
    """Return the type of an option, or None if the option is unknown."""
    kind: Kind = Config
    for part in re.sub(r"\[(\d+)\]", r".\1", key).split("."):
        if part.isdigit():
            kind = item_class(kind)
        elif section := section_class(kind):
            kind = typing.get_type_hints(section).get(part)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return None
    return kind


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def refuse_flags(tokens: typing.Sequence[str]) -> None:
    """Raise UserError for options given as flags: ours are written `section.option=value`; those of other trainers are
    answered."""
    ours = {option.replace("[i]", "[0]") for option in options()}
    said = []
    for name, value in aliases.flags(list(tokens)):
        option = name.replace("-", "_")
        if option in ours:
            raise UserError(f"--{name}: options are given without dashes: {option}={aliases.written(value)}")
        said.append(aliases.answer(name, value, _own_names()))
    if answers := aliases.joined(said):
        raise UserError(answers)


def _walk(node: Json, cls: type, prefix: str = "") -> Iterator[tuple[str, str, Json, type, Kind]]:
    """Yield (prefix, key, value, class of the section, type) of every key, a section before its options. The prefix is
    that of the full name. The type of an unknown key is None."""
    hints = typing.get_type_hints(cls)
    for key, value in node.items() if isinstance(node, dict) else ():
        kind = hints.get(str(key))
        yield prefix, str(key), value, cls, kind
        if section := section_class(kind):
            yield from _walk(value, section, f"{prefix}{key}.")
        elif (below := item_class(kind)) and isinstance(value, list):
            for i, item in enumerate(value):
                yield from _walk(item, below, f"{prefix}{key}[{i}].")


def _unknown(tree: Json) -> Iterator[tuple[str, Json]]:
    """Yield (full name, value) of every key that is not an option and is not similar to one. Mappings below such a key
    are flattened."""
    for prefix, key, value, cls, kind in _walk(tree, Config):
        if kind is not None or (cls is SamplingConfig and key in NOT_REPLAYABLE):
            continue
        name, own = f"{prefix}{key}", typing.get_type_hints(cls)
        if aliases.is_known(name) or not difflib.get_close_matches(key, own, n=1, cutoff=aliases.LIKE):
            yield from _leaves(name, value)


def _leaves(name: str, value: Json) -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value


@functools.cache
def _own_names() -> frozenset[str]:
    """Return the last parts of all option names."""
    return frozenset(option.rpartition(".")[2] for option in options())


def _check_keys(tree: Json, source: str) -> None:
    """Raise UserError for a key that is not an option, naming the nearest one, and for a value of the wrong shape."""
    for prefix, key, value, cls, kind in _walk(tree, Config):
        name = f"{prefix}{key}"
        if cls is SamplingConfig and key in NOT_REPLAYABLE:
            raise UserError(
                f"{source}: {name} cannot be used in training: the learner replays only {REPLAYABLE}, so the ratio "
                f"would be wrong; data.eval accepts top_p, top_k and min_p"
            )
        if kind is None:
            raise UserError(f"{source}: unknown option {name}{_nearest(key, cls, prefix)}")
        mappings = {name: value} if section_class(kind) else {}
        if below := item_class(kind):
            if not isinstance(value, list) and value != MISSING:
                shape = f"a list of {{{', '.join(_names(below)[:3])}, ...}}"
                shape = f"a path or {shape}" if issubclass(below, DatasetConfig) else shape
                raise UserError(f"{source}: {name} must be {shape}, not {value!r}")
            mappings = {f"{name}[{i}]": item for i, item in enumerate(value)} if isinstance(value, list) else {}
        for place, item in mappings.items():
            if not isinstance(item, dict):
                raise UserError(f"{source}: {place} must be a mapping, not {item!r}")
        _check_texts(value, kind, name, source)


def _check_texts(value: Json, kind: Kind, name: str, source: str) -> None:
    """Raise UserError for a string option with a value that is not a string: omegaconf would convert numbers
    silently."""
    if kind == str | None and value is not None:
        kind = str
    if kind is str and not isinstance(value, str):
        quoted = f"; write {json.dumps(str(value))}" if isinstance(value, int | float) else ""
        raise UserError(f"{source}: {name} must be a string, not {value!r}{quoted}")
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, list | dict):
                raise UserError(f"{source}: {name}[{i}] must be a single value, not {item!r}")
    if kind == dict[str, str] and isinstance(value, dict):
        for key, text in value.items():
            _check_texts(text, str, f"{name}.{key}", source)


def _misfit(tree: Json) -> str | None:
    """Return a message naming the first option whose value does not fit its type, or None.

    omegaconf reports the error for the whole tree, so each option is tried separately.
    """
    for prefix, key, value, cls, kind in _walk(tree, Config):
        if section_class(kind) or (item_class(kind) and isinstance(value, list)):
            continue
        try:
            OmegaConf.merge(OmegaConf.structured(cls), {key: value})
        except (OmegaConfBaseException, TypeError):
            if typing.get_origin(kind) is typing.Literal:
                choices = [str(choice) for choice in typing.get_args(kind)]
                hint = _nearest_choice(f"{prefix}{key}", value, choices)
                return f"{prefix}{key} must be one of {', '.join(choices)}, not {value!r}{hint}"
            wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            return f"{prefix}{key} must be of type {wanted}, not {value!r}"
    return None


def _nearest_choice(option: str, value: Json, choices: list[str]) -> str:
    """Return `; did you mean ...?`, or the answer to another trainer's value, or an empty string."""
    near = [choice for choice in choices if str(value).replace("-", "_") in choice]
    if not near and (said := aliases.answer_value(option, value)):
        return f"; {said}"
    return suggest(str(value), near or choices)


def _nearest(key: str, cls: type, prefix: str) -> str:
    """Return `; did you mean ...?` with the nearest option: one of exactly this name, then the nearest in this section,
    then the nearest of all. An option of another trainer is suggested if it is more similar."""
    everywhere: dict[str, str] = {}
    for option in sorted(options(), key=lambda option: common_start(option, prefix), reverse=True):
        everywhere.setdefault(option.rpartition(".")[2], option)
    here = suggest(key, {name: f"{prefix}{name}" for name in _names(cls)})
    other = aliases.nearest(key) if not (prefix and here) else None
    if other and not any(difflib.SequenceMatcher(None, own, key).ratio() >= other[1] for own in everywhere):
        return f"; did you mean {aliases.meaning(other[0], frozenset())}?"
    if key not in everywhere and here:
        return here
    return suggest(key, everywhere) or f"; {prefix.rstrip('.') or 'a recipe'} has {', '.join(_names(cls))}"


def refuse_unknown(name: str, source: str) -> None:
    """Raise UserError unless `name` is an option or a section, with or without a list index."""
    sections = {option[: end.start()] for option in options() for end in re.finditer(r"\.|\[|$", option)}
    sections |= {f"{option.partition('[i]')[0]}[i]" for option in options() if "[i]" in option}
    if general(name) not in sections:
        raise UserError(f"{source}: unknown option {name}{suggest(general(name), sorted(sections))}")
