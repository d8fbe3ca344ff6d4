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

This page gives, for each option of these trainers, the option of `grpo` with the same meaning. Error messages give the
same answer where such an option is used: in a recipe, as `option=value` on the command line, or as a flag:

```
{example}
```

Where the first column has only an option, it takes the same value as theirs. *Worked out*: the text below says how to
derive our value from theirs. *Left out*: nothing has to be set. *No*: it is not supported, for the reason given. `~`
stands for `actor_rollout_ref.`. OpenRLHF's names are those of its flags, the older and the dotted ones.

Reward functions written for TRL or verl run unchanged ([rewards.md](rewards.md#calling-styles)). Columns of their data
sets: [data.md](data.md#columns).
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
    said = [answer(name, value, own) or "" for name, value in given.items()]
    shown = f"$ grpo check recipe.yaml {' '.join(f'{name}={written(value)}' for name, value in given.items())}"
    return [shown, f"grpo: recipe.yaml: {joined(said)}"]


def _row(alias: Alias) -> str:
    names = ["<br>".join(f"`{name}`" for name in getattr(alias, field)) for field in TRAINERS]
    return f"| {' | '.join([_here(alias), *names])} |"


def _here(alias: Alias) -> str:
    """Return the first column of a row: our options, then values, then the reason."""
    parts = []
    if alias.here == LEAVE:
        parts.append("left out")
    elif "{" in alias.here:
        shown = alias.here if not re.fullmatch(r"[\w.]+=\{\}", alias.here) else alias.here.removesuffix("={}")
        parts.append(f"`{shown.replace('{}', 'value')}`")
    elif alias.here:
        parts.append(f"`{alias.here}`, worked out")
    elif not alias.values:
        parts.append("no")
    for text in dict.fromkeys(alias.values.values()):
        theirs = ", ".join(f"`{value}`" for value, other in alias.values.items() if other == text)
        ours = "left out" if text == LEAVE else f"no, {text.removeprefix(NO)}" if text.startswith(NO) else f"`{text}`"
        parts.append(f"{theirs}: {ours}")
    return "<br>".join([*parts, *([alias.why] if alias.why else [])])


if __name__ == "__main__":
    sys.stdout.write(page())
