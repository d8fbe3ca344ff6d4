"""Read a data set: return all rows, or raise an error with the file and line. Nothing is skipped, cast or filled in.

JSON lines are parsed here rather than by `datasets`, which unifies columns over rows, fills missing values with nulls
and reports a malformed line without its number.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from grpo.data.disguise import FIRST_BYTES, PARQUET, disguise_of
from grpo.data.hub import hub_or_cache, is_path, nearest_path
from grpo.suggest import one_line, suggest
from grpo.types import Json, Unchecked, UserError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = "a .jsonl or .parquet file, a folder in `datasets` layout, or a hub id (FOLDER:config, owner/name:config)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a data set, as it was read."""

    index: int
    """Position in the data set, from 0."""
    values: Mapping[str, Unchecked]
    where: str
    """For messages: `file.jsonl:17` (line, from 1) or `name[16]` (index, from 0)."""


def dataset_name(path: str) -> str:
    """Return the short name of a data set, for prompt ids: a file's name without its suffix, a folder's name with the
    configuration, or the hub id."""
    local, configuration = _local(path)
    if local.is_dir():
        return local.resolve().name + (f":{configuration}" if configuration else "")
    return local.stem if local.exists() or is_path(path) else path


def read_rows(path: str, *, split: str, option: str) -> list[Row]:
    """Return all rows of a data set, at least one.

    Args:
        path: a .jsonl or .parquet file, a folder in `datasets` layout, or a hub id (`owner/name`). `FOLDER:config` or
            `owner/name:config` selects one of several configurations.
        split: selects within folders and hub data sets. A file has no splits, nor has a folder that holds a single
            saved `Dataset`.
        option: the config option, named in all errors.

    Raises UserError when the data set cannot be read or has no rows.
    """
    if not path.strip():
        raise UserError(f"{option}: the path is empty")
    local, configuration = _local(path)
    if local.is_dir():
        rows = _read_folder(local, configuration, split, option)
    elif local.exists():
        rows = _read_file(local, option)
    elif is_path(path):
        raise UserError(f"{option}: {path} does not exist{nearest_path(local)}")
    else:
        rows = _read_hub(path, split, option)
    if not rows:
        raise UserError(f"{option}: {path} has no rows")
    return rows


def _read_file(path: Path, option: str) -> list[Row]:
    try:
        found = disguise_of(path)
        if found is not None and not (path.suffix == ".parquet" and found == FIRST_BYTES[PARQUET]):
            raise UserError(f"{option}: {path} is {found}")
        if path.suffix in (".jsonl", ".json"):
            return _read_json_lines(path, option)
        if path.suffix == ".parquet":
            return _read_parquet(path, option)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {one_line(error)}") from error
    raise UserError(f"{option}: {path} has an unsupported format; supported are {FORMATS}")


def _read_json_lines(path: Path, option: str) -> list[Row]:
    """Parse JSON lines. They are split at \\n only, because JSON strings may contain the other characters that Python
    splits at. A leading byte order mark, which Windows writes, is removed."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = data.split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{option}: {path} is empty")
    if lines[0].strip() == b"{" or data.lstrip()[:1] == b"[":
        what, each = ("an array", "'.[]'") if data.lstrip()[:1] == b"[" else ("an object over several lines", ".")
        raise UserError(
            f"{option}: {path} begins with {what}, and each line must be one JSON object; convert it with: "
            f"jq -c {each} {path.name} > rows.jsonl"
        )
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path.name}:{number}"
        try:
            values = _parse_line(line)
        except ValueError as error:
            raise UserError(f"{option}: {where}: {error}") from error
        if not isinstance(values, dict):
            kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(values))
            raise UserError(f"{option}: {where}: each line must be one JSON object, not {kind or 'a number'}")
        rows.append(Row(index=number - 1, values=values, where=where))
    return rows


def _parse_line(line: bytes) -> Json:
    """Return one JSON value. Raises ValueError with a message of one line."""
    if not line.strip():
        raise ValueError("the line is blank; blank lines are allowed only at the end")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start + 1} of the line)") from error
    try:
        value: Json = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
        _refuse_half_characters(text, value)
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    values: dict[str, Json] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} occurs twice in one object")
        values[key] = value
    return values


def _refuse_half_characters(text: str, value: Json) -> None:
    """Raise ValueError for a lone surrogate: Python accepts it in a string but cannot encode it."""
    if re.search(r"\\u[dD][89a-fA-F]", text) is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(
            f"{half} alone is half of a character (a surrogate without its other), which no text can hold"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text} is too large for a float")
    return value


def _read_parquet(path: Path, option: str) -> list[Row]:
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        table.validate(full=True)  # else a damaged offset reads memory outside its buffer
        values = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # invalid text, numbers out of range
        raise UserError(f"{option}: {path} is not a readable parquet file: {one_line(error)}") from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise UserError(f"{option}: {path} has two columns called {twice[0]}")
    return _number(values, path.name)


def _local(path: str) -> tuple[Path, str | None]:
    """Return the local path in `path`, and the configuration after a folder's colon."""
    local = Path(path).expanduser()
    folder, colon, configuration = path.rpartition(":")
    if colon and not local.exists() and Path(folder).expanduser().is_dir():
        return Path(folder).expanduser(), configuration
    return local, None


def _read_folder(folder: Path, configuration: str | None, split: str, option: str) -> list[Row]:
    """Read a folder, with `load_from_disk` if `save_to_disk` wrote it (by its files), else with `load_dataset`."""
    import datasets  # noqa: PLC0415

    name = folder.resolve().name + (f":{configuration}" if configuration else "")
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if saved and configuration:
        raise UserError(f"{option}: folder {folder} was written by save_to_disk and has no configuration to choose")
    # datasets, pyarrow, fsspec and the builders share no base class of errors; each of them means unreadable.
    try:
        found = datasets.load_from_disk(str(folder)) if saved else _load_dataset(str(folder), configuration, split)
    except Exception as error:
        raise UserError(f"{option}: folder {folder} cannot be loaded: {_reason(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{option}: folder {folder} has no split {split!r}; {_nearest_of(split, list(found))}")
        found = found[split]
    return _number(found.to_list(), name)


def _read_hub(name: str, split: str, option: str) -> list[Row]:
    repository, _, configuration = name.partition(":")
    # No common base class, as in _read_folder; the hub client has its own classes, too.
    with hub_or_cache() as remark:
        try:
            found = _load_dataset(repository, configuration or None, split)
        except Exception as error:
            raise UserError(
                f"{option}: {name} is neither a local path nor a data set that the hub has{remark}: {_reason(error)}"
            ) from error
    return _number(found.to_list(), name)


def _load_dataset(source: str, configuration: str | None, split: str) -> Dataset:
    """Load a folder or a hub id with `datasets`. Raises ValueError listing the configurations for an unknown one."""
    import datasets  # noqa: PLC0415

    try:
        return datasets.load_dataset(source, configuration, split=split)
    except ValueError as error:
        if configuration is None or configuration not in str(error):
            raise
        known = datasets.get_dataset_config_names(source)
        if configuration in known:
            raise
        raise ValueError(f"it has no configuration {configuration!r}; {_nearest_of(configuration, known)}") from None


def _reason(error: BaseException) -> str:
    """Return the root cause: `datasets` wraps it in "An error occurred while generating the dataset"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _nearest_of(name: str, names: list[str]) -> str:
    return f"it has {', '.join(names)}{suggest(name, names)}"


def _number(values: Sequence[Mapping[str, Unchecked]], name: str) -> list[Row]:
    return [Row(index=i, values=v, where=f"{name}[{i}]") for i, v in enumerate(values)]
