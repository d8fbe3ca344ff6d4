"""Answers to options of other trainers: what they are called here, with their value where the meaning permits."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator

import yaml

from grpo.config.foreign import LEAVE, NO, TABLE, Alias

TRAINERS = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF", "open_instruct": "open-instruct"}
VERL_SECTIONS = (
    "actor_rollout_ref", "trainer", "reward_model", "custom_reward_function", "global_profiler", "ray_kwargs",
)  # fmt: skip
"""Their options that the table does not have are answered, too."""
OFF = ("false", "0", "", "none", "null", "[]", "{}")
"""Values by which something that is not supported is not asked for."""
SHOWN = 12
"""Answers in a message."""
LIKE = 0.85
"""How alike a misspelt name must be to another trainer's."""


@functools.cache
def _index() -> dict[str, tuple[Alias, tuple[str, ...]]]:
    """Name -> what it is, and the trainers that have it."""
    found: dict[str, tuple[Alias, tuple[str, ...]]] = {}
    for alias in (alias for topic in TABLE.values() for alias in topic):
        for field in (*TRAINERS, "words"):
            for name in names_of(alias, field):
                known = found.get(name, (alias, ()))[1]
                found[name] = alias, (*known, TRAINERS[field]) if field in TRAINERS else known
    return found


def names_of(alias: Alias, field: str) -> list[str]:
    """Return the names of one trainer in full."""
    names: str = getattr(alias, field)
    return [name.replace("~", "actor_rollout_ref.") for name in names.split()]


def answer(name: str, value: object, own: frozenset[str]) -> str | None:
    """Return what answers an option which is not ours, or None where nothing is known about it.

    Args:
        name: as it was given, with its sections.
        value: None, text, number, list or mapping.
        own: the last parts of our own options, which are looked for by other means.
    """
    found, name = _find(name, own), _plain(name)
    if found is not None:
        is_own = name.rpartition(".")[2] in own
        outcome = _outcome(value, found[0])
        if outcome is None and is_own:  # the value is one of ours
            return None
        shown = name if outcome and outcome == _worked_out(found[0]) else f"{name}={written(value)}"
        return f"{shown}{_who(found[1])}: {outcome or 'one of ' + ', '.join(found[0].values)}"
    if name.split(".")[0] in VERL_SECTIONS and "." in name:
        return f"{name} (verl): it has no counterpart here"
    return None


def meaning(name: str, own: frozenset[str]) -> str | None:
    """Return what another trainer's option is here, whatever its value, or None."""
    found = _find(name, own)
    if found is None:
        return None
    texts = [found[0].here, *found[0].values.values()]
    options = dict.fromkeys(
        option for text in texts for option in re.findall(r"[a-z]+\.[\w.\[\]]+", text.split("; ")[0])
    )
    here = f"here {', '.join(options)}" if options else _outcome(name, found[0])
    return f"{_plain(name)}{_who(found[1])}: {here}"


def is_known(name: str) -> bool:
    """Return whether another trainer has an option of this whole name."""
    return _plain(name) in _index()


def _find(name: str, own: frozenset[str]) -> tuple[Alias, tuple[str, ...]] | None:
    """By the whole name, by what is above it, by its last part where that is none of ours."""
    index, plain = _index(), _plain(name)
    leaf, whole = plain.rpartition(".")[2], [plain, *_widened(plain)]
    return next((index[known] for known in (*whole, *(() if leaf in own else (leaf,))) if known in index), None)


def _plain(name: str) -> str:
    return name.lstrip("+").replace("-", "_")


def _who(trainers: tuple[str, ...]) -> str:
    return f" ({', '.join(trainers)})" if trainers else ""


def _widened(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.*`, `a.*`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield f"{name}.*"


def _outcome(value: object, alias: Alias) -> str | None:
    """What a value is here, or None where that is not known."""
    if isinstance(value, list) and alias.values:
        parts = [_outcome(item, alias) for item in value]
        set_here = dict.fromkeys(part.removeprefix("here ") for part in parts if part and part.startswith("here "))
        return None if None in parts else f"here {' '.join(set_here)}" if set_here else parts[0] if parts else None
    text = written(value).lower()
    known = next(
        (alias.values[t] for t in (text, text.removesuffix(".0"), text.replace("-", "_")) if t in alias.values), None
    )
    if known is not None:
        return _said(known)
    if text == "null" or (text in OFF and not alias.here and not alias.values):
        return LEAVE
    if "{0}" in alias.here:
        pair = value if isinstance(value, list) and len(value) == 2 else ["LOW", "HIGH"]
        return f"here {alias.here.format(*map(written, pair))}"
    if "{}" in alias.here:
        items = value if isinstance(value, list) and "[i]" in alias.here else [value]
        each = [alias.here.replace("{}", written(item)).replace("[i]", f"[{i}]") for i, item in enumerate(items)]
        return f"here {' '.join(each)}" + (f" ({alias.why})" if alias.why else "")
    if alias.here == LEAVE:
        return f"{LEAVE}, {alias.why}"
    return _worked_out(alias) or (_said(NO + alias.why) if alias.why else None)


def _worked_out(alias: Alias) -> str | None:
    return f"here {alias.here}, {alias.why}" if alias.here and alias.here != LEAVE and "{" not in alias.here else None


def _said(known: str) -> str:
    if known.startswith(NO):
        return f"not supported, because {known.removeprefix(NO)}"
    return known if known == LEAVE else f"here {known}"


def answer_value(option: str, value: object) -> str | None:
    """Return what another trainer's value of one of our own options is here, or None."""
    text = written(value).lower()
    found = [(alias, trainers, alias.values.get(text, LEAVE)) for alias, trainers in _index().values()]
    own = [one for one in found if f"{option}=" in one[2] and not one[2].startswith(NO)]
    refused = [
        one for one in found if one[2].startswith(NO) and any(f"{option}=" in other for other in one[0].values.values())
    ]
    for _, trainers, known in own + refused:
        return f"{text}{_who(trainers)}: {_said(known)}"
    return None


def written(value: object) -> str:
    """Return a value as it is written behind `option=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(written(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    return str(value)


def nearest(name: str) -> tuple[str, float] | None:
    """Return the most alike name of another trainer that is not a dotted one, and how alike it is."""
    flat = [known for known in _index() if "." not in known]
    near = difflib.get_close_matches(name, flat, n=1, cutoff=LIKE)
    return (near[0], difflib.SequenceMatcher(None, near[0], name).ratio()) if near else None


def flags(tokens: list[str]) -> list[tuple[str, object]]:
    """Return `--name value`, `--name=value` and `--name` as names and values; a flag without a value is true."""
    found: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token.removeprefix("--").partition("=")
            found.append((name, [value] if equals else []))
        elif found and "=" not in token:
            found[-1][1].append(token)
    return [(name, _parsed(values)) for name, values in found]


def _parsed(values: list[str]) -> object:
    read = [yaml.safe_load(value) if re.fullmatch(r"[\w.+-]+", value) else value for value in values]
    return True if not read else read[0] if len(read) == 1 else read


def joined(answers: list[str]) -> str:
    """Return one message out of answers, of which there may be many."""
    more = f"; and {len(answers) - SHOWN} more: docs/migrating.md" if len(answers) > SHOWN else ""
    return f"{'options' if len(answers) > 1 else 'an option'} of another trainer: {'; '.join(answers[:SHOWN])}{more}"
