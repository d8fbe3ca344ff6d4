"""Answers to options of other trainers: their name here, with a converted value where the meaning permits."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

import yaml

from grpo.config.foreign import LEAVE, NO, Alias, table
from grpo.types import Json, Unchecked

TRAINERS = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF", "open_instruct": "open-instruct"}
VERL_SECTIONS = (
    "actor_rollout_ref", "trainer", "reward_model", "custom_reward_function", "global_profiler", "ray_kwargs",
)  # fmt: skip
"""Sections of verl. Their options are answered even if the table does not have them."""
OFF = ("false", "0", "", "none", "null", "[]", "{}")
"""Values that turn an option off: an unsupported option with such a value can simply be left out."""
SHOWN = 12
"""Maximum number of answers in a message."""
LIKE = 0.85
"""Minimum similarity between a misspelled name and a name of another trainer."""


@functools.cache
def _index() -> dict[str, tuple[Alias, tuple[str, ...]]]:
    """Return a mapping from name to (its alias, the trainers that use the name)."""
    found: dict[str, tuple[Alias, tuple[str, ...]]] = {}
    for alias in (alias for topic in table().values() for alias in topic):
        for field in (*TRAINERS, "words"):
            for name in names_of(alias, field):
                known = found.get(name, (alias, ()))[1]
                found[name] = alias, (*known, TRAINERS[field]) if field in TRAINERS else known
    return found


def names_of(alias: Alias, field: str) -> list[str]:
    """Return the names of an alias in one trainer, with `~` expanded."""
    names: Sequence[str] = getattr(alias, field)
    return [name.replace("~", "actor_rollout_ref.") for name in names]


def answer(name: str, value: Json, own: frozenset[str]) -> str | None:
    """Return the answer to an option that is not ours, or None if it is unknown.

    Args:
        name: the name as given, with its sections.
        value: None, text, number, list or mapping.
        own: the last parts of our own option names, for which spelling suggestions are made elsewhere.
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
        return f"{name} (verl): there is no counterpart here"
    return None


def meaning(name: str, own: frozenset[str]) -> str | None:
    """Return the counterpart of another trainer's option, regardless of its value, or None."""
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
    """Return whether another trainer has an option with this full name."""
    return _plain(name) in _index()


def _find(name: str, own: frozenset[str]) -> tuple[Alias, tuple[str, ...]] | None:
    """Look up an option by its full name, then by its parent sections, then by its last part unless we have an option
    with the same last part."""
    index, plain = _index(), _plain(name)
    leaf, whole = plain.rpartition(".")[2], [plain, *_widened(plain)]
    return next((index[known] for known in (*whole, *(() if leaf in own else (leaf,))) if known in index), None)


def _plain(name: str) -> str:
    return name.lstrip("+").replace("-", "_")


def _who(trainers: tuple[str, ...]) -> str:
    return f" ({', '.join(trainers)})" if trainers else ""


def _widened(name: str) -> Iterator[str]:
    """Yield wildcards of the parent sections: `a.b.c` -> `a.b.*`, `a.*`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield f"{name}.*"


def _outcome(value: Json, alias: Alias) -> str | None:
    """Return the answer to a value of another trainer's option, or None if the value is unknown."""
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


def answer_value(option: str, value: Json) -> str | None:
    """Return the answer to another trainer's value of one of our own options, or None if the value is unknown."""
    text = written(value).lower()
    found = [(alias, trainers, alias.values.get(text, LEAVE)) for alias, trainers in _index().values()]
    own = [one for one in found if f"{option}=" in one[2] and not one[2].startswith(NO)]
    refused = [
        one for one in found if one[2].startswith(NO) and any(f"{option}=" in other for other in one[0].values.values())
    ]
    for _, trainers, known in own + refused:
        return f"{text}{_who(trainers)}: {_said(known)}"
    return None


def written(value: Unchecked) -> str:
    """Return a value as it is written after `option=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(written(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    return str(value)


def nearest(name: str) -> tuple[str, float] | None:
    """Return the most similar undotted name of another trainer and its similarity, or None if none is similar."""
    flat = [known for known in _index() if "." not in known]
    near = difflib.get_close_matches(name, flat, n=1, cutoff=LIKE)
    return (near[0], difflib.SequenceMatcher(None, near[0], name).ratio()) if near else None


def flags(tokens: list[str]) -> list[tuple[str, Json]]:
    """Parse `--name value`, `--name=value` and `--name` into names and values; a flag without a value is true."""
    found: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token.removeprefix("--").partition("=")
            found.append((name, [value] if equals else []))
        elif found and "=" not in token:
            found[-1][1].append(token)
    return [(name, _parsed(values)) for name, values in found]


def _parsed(values: list[str]) -> Json:
    read = [yaml.safe_load(value) if re.fullmatch(r"[\w.+-]+", value) else value for value in values]
    return True if not read else read[0] if len(read) == 1 else read


def joined(found: Iterable[str | None]) -> str:
    """Join the answers that were found into one message, which shows at most SHOWN of them; empty without any."""
    answers = [answer for answer in found if answer]
    if not answers:
        return ""
    more = f"; and {len(answers) - SHOWN} more: docs/migrating.md" if len(answers) > SHOWN else ""
    return f"{'options' if len(answers) > 1 else 'an option'} of another trainer: {'; '.join(answers[:SHOWN])}{more}"
