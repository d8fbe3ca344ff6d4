"""Read foreign.yaml: the options of other trainers and their counterparts here. The file describes its fields."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("foreign.yaml")

LEAVE = "leave it out"
"""Used instead of options: nothing has to be set here."""
NO = "no: "
"""Prefix of the counterpart of an unsupported value; the reason follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """One setting, with its names in each trainer."""

    here: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    trl: Sequence[str] = ()
    verl: Sequence[str] = ()
    openrlhf: Sequence[str] = ()
    open_instruct: Sequence[str] = ()
    words: Sequence[str] = ()


@functools.cache
def table() -> Mapping[str, Sequence[Alias]]:
    """Return topic -> aliases. The file is read at the first call: only an unknown option needs it."""
    topics = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {topic: [Alias(**entry) for entry in entries] for topic, entries in topics.items()}
