"""Find the recipes and reward functions that come with `grpo`, by name.

A name is the name of the file without its suffix, such as `gsm8k_qwen2.5_0.5b` or `math_answer`. The files lie in the
package where it is installed, and beside it in a checkout of the repository.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

Kind = Literal["recipes", "reward_fns"]
PACKAGE = Path(__file__).parent
SUFFIX: dict[Kind, str] = {"recipes": ".yaml", "reward_fns": ".py"}
WORDS: dict[Kind, str] = {"recipes": "recipes", "reward_fns": "reward functions"}


def folder(kind: Kind) -> Path:
    """Return the folder of the built-in files of this kind."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def names(kind: Kind) -> list[str]:
    """Return the names of all built-in files of this kind, sorted."""
    return sorted(file.name.removesuffix(SUFFIX[kind]) for file in folder(kind).glob(f"*{SUFFIX[kind]}"))


def find(kind: Kind, text: str) -> Path | None:
    """Return the built-in file whose name is `text`; None if there is none, or if `text` is a path."""
    return folder(kind) / f"{text}{SUFFIX[kind]}" if text in names(kind) else None


def nearest(kind: Kind, text: str) -> str | None:
    """Return the first name that begins with `text`, a name or the path of a file, else the most similar one; None if
    there is neither."""
    stem = Path(text).name.removesuffix(SUFFIX[kind])
    longer = [name for name in names(kind) if stem and name.startswith(stem)]
    return next(iter([*longer, *difflib.get_close_matches(stem, names(kind), n=1)]), None)


def suggest(kind: Kind, text: str) -> str:
    """Return `; did you mean ...?` with the built-in name that is nearest to `text`, or ""."""
    name = nearest(kind, text)
    return f"; did you mean {name}?" if name else ""


def listing(kind: Kind, text: str) -> str:
    """Return the names to choose from, as a part of an error message about `text`; "" if `text` is a path."""
    if Path(text).name != text or text.endswith((".py", ".yaml", ".yml")):
        return ""
    return f"; built-in {WORDS[kind]}: {', '.join(names(kind))}"


def script_command(name: str) -> str | None:
    """Return the command that makes the model and data in `recipes/tiny/NAME`; None if no recipe has one of this name.

    The command writes below the working directory.
    """
    script = Path("recipes", f"{name}.py")
    if script.exists():
        return f"python {script}"
    if not (folder("recipes") / script.name).exists():
        return None
    inside = folder("recipes").parent == PACKAGE
    return f"python -m {PACKAGE.name}.recipes.{name}" if inside else f"python {folder('recipes') / script.name}"
