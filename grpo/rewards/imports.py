"""Reward files: where they are, and the source files that they import. The latter travel with a submitted run, and a
change in one is a change of the reward."""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo import builtin
from grpo.config import RewardConfig
from grpo.suggest import suggest
from grpo.types import UserError

MAX_ENTRIES = 20_000
"""Maximum number of files and folders in a package that a reward function imports. More is a folder of data."""
PACKAGE = Path(__file__).parents[1]
"""This package. It is always there, and no part of a reward."""


def locate(rewards: Sequence[RewardConfig], recipe: Path, written: Path | None = None) -> list[Path]:
    """Find the files of `rewards`: in the working directory, else next to the recipe, else in the folder above it, else
    the built-in reward function of that name.

    Args:
        written: Folder with the files of functions (`grpo.rewards.functions.write`), which is searched first.

    Raises UserError naming the option and the file with the most similar name.
    """
    found = []
    for i, reward in enumerate(rewards):
        given = Path(reward.file).expanduser()
        places = [given] if given.is_absolute() else [given, recipe.parent / given, recipe.parent.parent / given]
        own = [] if written is None else [written / given]
        path = next((place for place in own + places if place.is_file()), None)
        path = path or builtin.find("reward_fns", reward.file)
        if path is None:
            if any(place.is_dir() for place in places):
                raise UserError(f"rewards[{i}].file={reward.file} is a folder; it must be a Python file")
            nearby = {p.name: str(p) for place in places if place.parent.is_dir() for p in place.parent.glob("*.py")}
            own_file, named = suggest(given.name, nearby), builtin.suggest("reward_fns", reward.file)
            listing = builtin.listing("reward_fns", reward.file)
            first = named or own_file if listing and f"{reward.file}.py" not in nearby else own_file or named
            hint = listing + first
            if recipe.name == "config.yaml":  # the copy in a run folder
                hint += "; change to the directory in which the run was started, or give the file with --reward FILE"
            raise UserError(f"rewards[{i}].file={reward.file} does not exist{hint}")
        found.append(path)
    return found


def reward_sources(file: Path) -> list[Path]:
    """Return a reward file and the files that it imports, itself first."""
    return [file, *(source for _, source in sorted(imported(file, Path()).items()) if source != file)]


def imported(file: Path, place: Path) -> dict[Path, Path]:
    """Return a mapping from path in the job to source file, for the modules and packages that `file` imports, directly
    or indirectly.

    The search follows a reward worker: skip modules of the standard library, then search the folder of `file` with
    links resolved (these modules are placed in `place`), then, unless a module of this name is installed, the working
    directory.
    """
    own, here = file.resolve().parent, Path.cwd()
    found: dict[Path, Path] = {}
    todo = [file]
    while todo:
        for name in set(top_names(todo.pop())) - sys.stdlib_module_names - {PACKAGE.name}:  # always included
            folder, target = own, place
            sources = modules_of(own, name)
            if not sources and not installed(name):
                folder, target, sources = here, Path(), modules_of(here, name)
            new = {target / source.relative_to(folder): source for source in sources}
            todo += [source for at, source in new.items() if at not in found]
            found |= new
    return found


def top_names(file: Path) -> Iterator[str]:
    """Yield the top-level name of every module that a source file imports."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} cannot be parsed as Python: {error}") from error
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names = [node.module]
        yield from (name.partition(".")[0] for name in names)


def modules_of(folder: Path, name: str) -> Sequence[Path]:
    """Return the source files of the package or module `name` in `folder`; empty if there is none.

    As in an import, a package precedes a module, and a folder without `__init__.py` follows both, and installed ones.
    """
    package, module = folder / name, folder / f"{name}.py"
    if (package / "__init__.py").is_file():
        return modules(package)
    if module.is_file():
        return [module]
    return modules(package) if package.is_dir() and not installed(name) else []


def modules(folder: Path) -> Sequence[Path]:
    """Return all source files of a package, sorted. Hidden folders are left out.

    Raises UserError if the folder has more than MAX_ENTRIES files and folders.
    """
    found, count = list[Path](), 0
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        count += len(folders) + len(files)
        if count > MAX_ENTRIES:
            raise UserError(
                f"a reward function imports {folder.name}, and the folder {folder} has more than {MAX_ENTRIES} files; "
                "all sources of an imported package are read, so move the other files out of it or rename the folder"
            )
        found += [Path(place, name) for name in files if name.endswith(".py")]
    return sorted(found)


def installed(name: str) -> bool:
    """Return whether a module of this name can be found outside the working directory."""
    places = [place for place in sys.path if Path(place or ".").resolve() != Path.cwd()]
    return importlib.machinery.PathFinder.find_spec(name, places) is not None
