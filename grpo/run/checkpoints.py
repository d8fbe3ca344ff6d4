"""Checkpoints: folders that appear whole or not at all, and the options that may differ when a run resumes from one.

    checkpoints/step-000010/  manifest.json  learner/rank-0.safetensors ...  model/ (with run.save_model)

A checkpoint is written as `step-000010.partial`. All files are flushed to the disk and read back, then the folder is
renamed. `manifest.json` is written last, with the size and SHA-256 of each other file. `read` checks all files before
any is used.

Other modules define the tensors (`grpo.learner.zero.state`) and decide when a checkpoint is due (`grpo.driver`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import yaml

from grpo.config import Config, OnResume, declaration, dump, general
from grpo.files import FileRecord, seal
from grpo.run.progress import ProgressState
from grpo.suggest import one_line
from grpo.types import Json, UserError

FORMAT = 1
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
PARTIAL = ".partial"


class LearnerRecord(TypedDict):
    """The learner's part of a manifest. It also holds the counters of the engines, which only the ranks read."""

    ranks: int
    zero_stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """State of a run after `step`, except tensors."""

    format: int
    step: int
    config: Mapping[str, Json]
    """The resolved config, as `plain` returns it."""
    fingerprints: Mapping[str, str]
    """Content read from files (model, data.train, data.eval.sets, each reward file) -> SHA-256."""
    versions: Mapping[str, str]
    driver: ProgressState
    learner: LearnerRecord
    metrics: Mapping[str, float]
    """Metrics of the step, used to choose the best checkpoint."""
    files: Mapping[str, FileRecord]
    """Path relative to the folder -> record."""


KINDS = {"format": int, "step": int} | dict.fromkeys(
    ("config", "fingerprints", "versions", "driver", "learner", "metrics", "files"), dict
)
"""Types of a manifest's fields in JSON."""


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def begin(run: Path, step: int, need_bytes: int) -> Path:
    """Create and return the folder to write a checkpoint into; remove leftovers of an interrupted one.

    Raises OSError (ENOSPC) when the disk has no room for `need_bytes`.
    """
    root = run / "checkpoints"
    for leftover in root.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover)
    free = shutil.disk_usage(root).free
    if free < need_bytes:
        raise OSError(28, f"a checkpoint takes {need_bytes / 2**20:.0f} MiB and {root} has {free / 2**20:.0f} MiB free")
    partial = root / (folder_of(run, step).name + PARTIAL)
    (partial / "learner").mkdir(parents=True)
    return partial


def publish(partial: Path, manifest: Manifest) -> Path:
    """Turn a written folder into a checkpoint: write the manifest, flush, rename. Return its path.

    Raises RuntimeError when the files of the folder do not match the manifest.
    """
    present = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
    if present != {name: record.bytes for name, record in manifest.files.items()}:
        raise RuntimeError(f"{partial} holds {present}, its manifest {dict(manifest.files)}")
    target = partial.with_name(partial.name.removesuffix(PARTIAL))
    file = partial / MANIFEST
    file.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n", encoding="utf-8")
    digest = partial / DIGEST
    digest.write_text(f"{seal(file).sha256}  {MANIFEST}\n", encoding="utf-8")  # the format of sha256sum
    seal(digest)
    for folder in {path.parent for path in _files(partial)} | {partial}:
        _flush(folder)
    os.rename(partial, target)
    _flush(target.parent)
    return target


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _flush(folder: Path) -> None:
    """Flush a folder to the disk, which makes renames in it durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> Manifest:
    """Check all files of a checkpoint against its manifest, and return the manifest.

    Raises UserError naming the file that is missing, truncated or changed.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    try:
        written = (folder / DIGEST).read_text(encoding="utf-8").split()[0]
        if hashlib.sha256(file.read_bytes()).hexdigest() != written:
            raise ValueError(f"its SHA-256 differs from that in {DIGEST}")
        raw = json.loads(file.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Manifest)}
        if set(raw) != known:
            raise ValueError(f"it has {sorted(raw)}")
        wrong = [name for name, kind in KINDS.items() if type(raw[name]) is not kind]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {raw[wrong[0]]!r}")
        records = {name: FileRecord(**record) for name, record in raw["files"].items()}
        manifest = Manifest(**{**raw, "files": records})
    except (ValueError, TypeError, AttributeError, LookupError, OSError) as error:
        raise UserError(f"{file} is damaged: {one_line(error, 200)}") from error
    if manifest.format != FORMAT:
        raise UserError(f"{file} is of format {manifest.format}; this version reads format {FORMAT}")
    own = folder_of(folder.parent.parent, manifest.step).name
    if own != folder.name or manifest.driver.get("step") != manifest.step:
        raise UserError(f"{file} is of step {manifest.step}, which is not the step of its folder")
    for name, record in manifest.files.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{file} names {name}, outside its folder")
        check_file(folder / name, record)
    return manifest


def check_file(path: Path, record: FileRecord) -> None:
    """Raise UserError unless the file has the recorded size and SHA-256."""
    if not path.is_file():
        raise UserError(f"{path} is missing from its checkpoint")
    if path.stat().st_size != record.bytes:
        raise UserError(f"{path} has {path.stat().st_size} bytes and was written with {record.bytes}")
    with path.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != record.sha256:
            raise UserError(f"{path} has changed since it was written: its SHA-256 differs from the manifest's")


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in (run / "checkpoints").glob("step-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def retire(run: Path, *, keep_last: int, keep_every: int, best_by: str | None) -> list[Path]:
    """Delete old checkpoints and return their paths. Kept are the last `keep_last`, those whose step is a multiple of
    `keep_every`, and the one with the highest `best_by` (the earliest of equals)."""
    every = list_checkpoints(run)
    steps = {path: int(path.name.removeprefix("step-")) for path in every}
    kept = set(every[-keep_last:])
    if keep_every:
        kept |= {path for path in every if steps[path] % keep_every == 0}
    if best_by:
        rated = {path: value for path in every if (value := _rating(path, best_by)) is not None}
        kept |= {max(rated, key=lambda path: rated[path])} if rated else set()
    gone = [path for path in every if path not in kept]
    for path in gone:
        aside = path.with_name(path.name + PARTIAL)  # a partly deleted folder must not look like a checkpoint
        os.rename(path, aside)
        shutil.rmtree(aside)
    return gone


def _rating(folder: Path, metric: str) -> float | None:
    """Return a checkpoint's metric; None if it is absent, not finite, or cannot be read."""
    try:
        value = float(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["metrics"][metric])
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return value if math.isfinite(value) else None


# --- resuming with different settings ---------------------------------------------------------------------------------


def plain(config: Config) -> dict[str, Json]:
    """Return the resolved config as nested plain values."""
    values: dict[str, Json] = yaml.safe_load(dump(config))
    return values


def differences(old: Mapping[str, Json], new: Mapping[str, Json], prefix: str = "") -> dict[str, tuple[Json, Json]]:
    """Return option -> (value in the checkpoint, value now) for the options that differ.

    An option that the checkpoint does not have, because it is newer than the checkpoint, had its default.
    """
    out: dict[str, tuple[Json, Json]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        now = new.get(key)
        before = old[key] if key in old else _default(f"{prefix}{key}", now)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            out |= differences(before, now, f"{prefix}{key}.")
        elif (one := _items(before)) and (other := _items(now)) and len(one) == len(other):
            for i, (item, item_now) in enumerate(zip(one, other, strict=True)):
                out |= differences(item, item_now, f"{prefix}{key}[{i}].")
        elif before != now:
            out[f"{prefix}{key}"] = (before, now)
    return out


def _default(option: str, now: Json) -> Json:
    """Return the default of an option, and no options or items for a section or a list of sections."""
    declared = declaration(option)
    if declared and declared.name == general(option):
        default: Json = declared.plain_default
        return default
    return {} if isinstance(now, Mapping) else [] if isinstance(now, list) else None


def _items(value: Json) -> list[Mapping[str, Json]]:
    """Return the sections of a list of sections, such as data.train and rewards; an empty list for other values."""
    sections = [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
    return sections if sections == value else []


def _within(option: str, names: Sequence[str]) -> bool:
    return any(
        whole == name or whole.startswith((f"{name}.", f"{name}["))
        for whole in (option, general(option))
        for name in names
    )


def compare(manifest: Manifest, config: Config, fingerprints: Mapping[str, str], allowed: Sequence[str]) -> list[str]:
    """Return notes on the differences between the resumed run and the saved one.

    Raises UserError for a difference that would change the run, naming the `allow` option that permits it.
    """
    contents = [
        name
        for name in sorted({*manifest.fingerprints, *fingerprints})
        if manifest.fingerprints.get(name) != fingerprints.get(name)
    ]
    options = differences(manifest.config, plain(config))
    notes = compare_options(manifest.config, config, allowed)
    for name in contents:
        if not _within(name, allowed):
            by = ", ".join(option for option in options if _within(option, [name]))
            by = f" (by {by})" if by else ""
            raise UserError(f"the content of {name} has changed since the checkpoint{by}; to permit this: allow={name}")
        notes.append(f"the content of {name} has changed, as allowed")
    return notes


def compare_options(before: Mapping[str, Json], config: Config, allowed: Sequence[str]) -> list[str]:
    """Return notes on the options that differ between the resumed run and the config `before`.

    Raises UserError for a difference that would change the run, naming the `allow` option that permits it.
    """
    schedules = {config.optimizer.schedule, config.critic.optimizer.schedule}
    notes = []
    for option, (old, now) in differences(before, plain(config)).items():
        declared = declaration(option)
        resume = declared.resume if declared else OnResume.SAME
        stretched = option == "run.steps" and schedules != {"constant"}
        if _within(option, allowed):
            notes.append(f"{option} is {now}, was {old}, as allowed")
        elif stretched or resume is OnResume.SAME:
            why = "; the learning-rate schedule would change" if stretched else ""
            raise UserError(
                f"{option}={now} was {old} in the run to be resumed{why}: restore it, or permit it: allow={option}"
            )
        elif resume is OnResume.ROUNDING:
            notes.append(f"{option} is {now}, was {old}: equal up to the order of additions, not bit for bit")
    return notes
