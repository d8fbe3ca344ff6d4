"""Generate docs/migrating.md from foreign.yaml:

python -m grpo.config.migrating > docs/migrating.md
"""

from __future__ import annotations

import re
import sys

from grpo.config.aliases import TRAINERS, answer, joined, written
from grpo.config.foreign import LEAVE, NO, Alias, table
from grpo.types import Json

HEAD = """\
<!-- python -m grpo.config.migrating > docs/migrating.md -->
# From TRL, verl, OpenRLHF or open-instruct

This page lists options of other trainers, and for each the option of `grpo` with the same meaning. If a recipe or a
command uses an option of another trainer, the error message gives the same answer:

```
{example}
```

If the first column has only an option, it takes the same value as the other trainer's option. *Converted*: the text
below the option says how to derive its value. *Leave out*: there is nothing to set. *Not supported*: the reason
follows. `~` stands for `actor_rollout_ref.`. OpenRLHF's names are those of its flags, in the older and in the dotted
form.

Reward functions written for TRL or verl run unchanged ([rewards.md](rewards.md#calling-styles)). For the columns of
data sets, see [data.md](data.md#columns).
"""


def page() -> str:
    """Return the text of docs/migrating.md."""
    lines = []
    for topic, aliases in table().items():
        lines += ["", f"## {topic}", "", "| here | TRL | verl | OpenRLHF | open-instruct |", "|---|---|---|---|---|"]
        lines += [_row(alias) for alias in aliases if any(getattr(alias, field) for field in TRAINERS)]
    return HEAD.format(example="\n".join(_example())) + "\n".join(lines) + "\n"


def _example() -> list[str]:
    own = frozenset[str]()
    given = dict[str, Json](num_generations=8, beta=0.04, loss_type="dr_grpo", use_vllm=True, lora_r=16)
    said = [answer(name, value, own) for name, value in given.items()]
    shown = f"$ grpo check recipe.yaml {' '.join(f'{name}={written(value)}' for name, value in given.items())}"
    return [shown, f"grpo: recipe.yaml: {joined(said)}"]


def _row(alias: Alias) -> str:
    names = ["<br>".join(f"`{name}`" for name in getattr(alias, field)) for field in TRAINERS]
    return f"| {' | '.join([_here(alias), *names])} |"


def _here(alias: Alias) -> str:
    """Return the first column of a row: our options, then values, then the reason."""
    parts = []
    if alias.here == LEAVE:
        parts.append("leave out")
    elif "{" in alias.here:
        shown = alias.here if not re.fullmatch(r"[\w.]+=\{\}", alias.here) else alias.here.removesuffix("={}")
        parts.append(f"`{shown.replace('{}', 'value')}`")
    elif alias.here:
        parts.append(f"`{alias.here}`, converted")
    elif not alias.values:
        parts.append("not supported")
    for text in dict.fromkeys(alias.values.values()):
        theirs = ", ".join(f"`{value}`" for value, other in alias.values.items() if other == text)
        ours = _outcome(text)
        parts.append(f"{theirs}: {ours}")
    return "<br>".join([*parts, *([alias.why] if alias.why else [])])


def _outcome(text: str) -> str:
    """Return the counterpart of one value as the page writes it."""
    if text == LEAVE:
        return "leave out"
    if text.startswith(NO):
        return f"not supported: {text.removeprefix(NO)}"
    return f"`{text}`"


if __name__ == "__main__":
    sys.stdout.write(page())
