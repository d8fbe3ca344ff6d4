"""Pack the files of a submitted run: this package, the recipe with its options resolved, the reward files that it
names, and the modules that these import. The working directory, the data and the model are never included."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from grpo import builtin, config, data
from grpo.checks import check
from grpo.config import Config, OnSubmit
from grpo.rewards.imports import PACKAGE, imported, locate, modules
from grpo.types import UserError

MIB = 2**20
DATA = ("py.typed", "config/foreign.yaml")
"""Files of the package besides its modules."""
LIMIT_MIB = 10
"""Maximum total size of all files before compression."""


def pack(options: Config, recipe: Path, folder: Path, resume: str | None = None) -> int:
    """Write the files of the job into `folder`, which becomes its working directory. Return their size in bytes.

    The recipe keeps its file name: the run is named after it, and `resume=auto` finds the run by it.

    Raises UserError if the recipe needs something that is not included, or if the files are too large.
    """
    refuse_local(options, resume)
    check.refuse_secrets(options)
    own = {file.relative_to(PACKAGE.parent): file for file in (*modules(PACKAGE), *(PACKAGE / name for name in DATA))}
    options, files = rewards(options, recipe, own)
    if recipe.name in {place.parts[0] for place in files}:
        raise UserError(f"{recipe}: another file of the upload is called {recipe.name}; give the recipe another name")
    text = config.dump(options)
    sizes = {source: source.stat().st_size for source in files.values()}
    total = sum(sizes.values()) + len(text.encode())
    if total > LIMIT_MIB * MIB:
        largest = max(sizes, key=lambda source: sizes[source])
        raise UserError(
            f"{total / MIB:.1f} MiB would be uploaded, and the limit is {LIMIT_MIB}: the largest file is {largest} "
            f"({sizes[largest] / MIB:.1f} MiB), which a reward imports; put it where every node can import it"
        )
    for place, source in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / place)
    (folder / recipe.name).write_text(text, encoding="utf-8")
    return total


def refuse_local(options: Config, resume: str | None) -> None:
    """Raise UserError naming every option whose value is valid only on this machine."""
    if options.cluster.address is not None:
        raise UserError(
            f"cluster.address={options.cluster.address}: a submitted run joins the cluster of --address; leave it out"
        )
    config.refuse_own_ray(options)
    problems = []
    for option, value in config.values(options):
        declared = config.declaration(option)
        submit = declared.submit if declared else None
        if not isinstance(value, str) or os.path.isabs(value):
            continue
        if submit is OnSubmit.SHARED:
            problems.append(
                f"{option}={value} would be in the working directory of the job, which is deleted with it: give an "
                "absolute path that all nodes share"
            )
        bare = Path(value.rpartition(":")[0] or value)  # the path in FOLDER:config
        if submit is OnSubmit.SHARED_OR_HUB and (data.is_path(value) or Path(value).exists() or bare.exists()):
            problems.append(
                f"{option}={value} is not sent with the job: put it on storage that all nodes share and give its "
                f"absolute path (here it is {os.path.abspath(os.path.expanduser(value))}), or a hub id"
            )
    if resume not in (None, "auto") and not os.path.isabs(resume or ""):
        problems.append(f"resume={resume}: give auto, or an absolute path that all nodes share")
    if problems:
        raise UserError("; ".join(problems))


def rewards(options: Config, recipe: Path, files: Mapping[Path, Path]) -> tuple[Config, dict[Path, Path]]:
    """Return (the config with the reward paths of the job, a mapping from path in the job to source file).

    The mapping extends `files` with the files that the rewards need. Names of built-in ones and relative paths are
    unchanged, so that the options are the same wherever the run is resumed.

    Raises UserError if two different files would get the same path.
    """
    found, changed = dict(files), []
    for i, (reward, file) in enumerate(zip(options.rewards, locate(options.rewards, recipe), strict=True)):
        by_name = file == builtin.find("reward_fns", reward.file)
        place = Path(PACKAGE.name, "reward_fns", file.name) if by_name else Path(reward.file)
        if place.is_absolute() or ".." in place.parts or place.parts[0].startswith("~"):
            place = Path("rewards", str(i), file.name)
        changed.append(reward if by_name else dataclasses.replace(reward, file=str(place)))
        for target, source in {place: file, **imported(file, place.parent)}.items():
            if found.setdefault(target, source).read_bytes() != source.read_bytes():
                raise UserError(f"rewards[{i}].file={reward.file}: {source} and {found[target]} would both be {target}")
    return dataclasses.replace(options, rewards=changed), found
