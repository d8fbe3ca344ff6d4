"""Write a config as YAML, and read it back."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from grpo.config.schema import Config
from grpo.types import Json


class Dumper(yaml.SafeDumper):
    """Writes YAML for OmegaConf, which reads more texts as numbers than PyYAML does: 70e8761, as a git hash may be."""


Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def dump(config: Config) -> str:
    """Return the resolved config as YAML; loading it gives the same config."""
    return yaml.dump(literal(dataclasses.asdict(config)), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def read_dump(path: Path) -> Config:
    """Return the config that `dump` wrote to `path`, without validation: it was validated when it was first loaded."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    return typing.cast(Config, OmegaConf.to_object(merged))


def literal(tree: Json) -> Json:
    """Return `tree` for a YAML file that OmegaConf reads: interpolations are escaped, and tuples become lists."""
    if isinstance(tree, dict):
        return {key: literal(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [literal(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", tree)
    return tree
