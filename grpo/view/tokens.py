"""Texts of token ids, by the tokenizer of the run, and the values that the learner has stored for tokens."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from grpo.types import Json, UserError
from grpo.view.files import RunFiles, SamplesFile
from grpo.view.rows import batches

FILE = "tokenizer.json"
MAX_BYTES = 256 << 20
"""Maximum size of a tokenizer."""
VALUES = {
    "learner_logprob": "learner_logprobs", "advantage": "advantages", "entropy": "entropies",
    "importance_weight": "importance_weights",
}  # fmt: skip
"""Value of a token -> its column in tokens/."""


class Decoder:
    """Decodes token ids one by one."""

    def __init__(self, tokenizer: Tokenizer | None, folder: str | None, problem: str | None) -> None:
        self._tokenizer = tokenizer
        self.folder = folder
        """Folder of the tokenizer."""
        self.problem = problem
        """Why there is none."""
        added = tokenizer.get_added_tokens_decoder() if tokenizer is not None else {}
        self._special = {id_ for id_, token in added.items() if token.special}

    def token(self, id_: int) -> dict[str, Json]:
        """Return a token: its id, its text (None if unknown) and whether it is special."""
        return {"id": id_, "text": self._text(id_), "special": id_ in self._special}

    def _text(self, id_: int) -> str | None:
        if self._tokenizer is None or id_ < 0:
            return None
        piece = self._tokenizer.id_to_token(id_)
        if piece is None:
            return None
        text = self._tokenizer.decode([id_], skip_special_tokens=False)
        if "\ufffd" in text:  # a part of a character: its bytes as the tokenizer writes them
            return str(piece)
        space = piece.startswith("\u2581") and not text.startswith(" ")  # decoders drop a space at the start
        return f" {text}" if space else str(text)


def decoder_of(files: RunFiles) -> Decoder:
    """Return the decoder of a run: by the tokenizer of its final model, else of `model.path` if that is a folder."""
    folders = [files.path / "model"] if (files.path / "model").resolve().is_relative_to(files.path) else []
    config = files.config()
    if config is not None:
        folders.append(Path(config.model.path).expanduser())
    for folder in folders:
        file = folder / FILE
        try:
            status = file.stat()
        except (OSError, ValueError):
            continue
        if status.st_size <= MAX_BYTES:
            return loaded(str(file), status.st_mtime_ns)
    return Decoder(None, None, f"neither RUN/model nor model.path has a {FILE}, so tokens have no texts")


@functools.lru_cache(maxsize=2)
def loaded(path: str, changed: int) -> Decoder:
    """Return the decoder of a tokenizer file. `changed`: its modification time."""
    try:
        return Decoder(Tokenizer.from_file(path), str(Path(path).parent), None)
    except Exception as error:  # noqa: BLE001 - the Rust library raises a bare Exception
        return Decoder(None, None, f"{path} cannot be read: {' '.join(str(error).split())[:200]}")


@dataclass(frozen=True, slots=True)
class LearnerValues:
    """Values that the learner has stored for the tokens of one completion."""

    columns: dict[str, list[float | None]] = field(default_factory=dict)
    """Name of a value (of VALUES) -> one per token."""
    problem: str | None = None
    """Why there are none."""


def learner_values(files: RunFiles, file: SamplesFile, position: int, count: int) -> LearnerValues:
    """Return the values of the tokens of a completion, from the files of the learner's ranks in tokens/.

    Args:
        position: row of the completion in its samples file.
        count: its number of tokens.

    Raises UserError when a file is damaged.
    """
    pattern = re.compile(rf"{re.escape(file.stem)}-rank-\d+")
    paths = sorted(path for path in (files.path / "tokens").glob("*.parquet") if pattern.fullmatch(path.stem))
    if not paths:
        if file.kind == "eval":
            return LearnerValues(problem="the learner does not compute them in an evaluation")
        return LearnerValues(problem="run.token_columns=true stores the learner's values of each token")
    for path in paths:
        rank = SamplesFile(stem=path.stem, kind=file.kind, step=file.step, path=path)
        for batch in batches(files, rank, ["position", *VALUES.values()], size=64):
            if len(found := np.flatnonzero(batch["position"].to_numpy(zero_copy_only=False) == position)):
                return LearnerValues(columns=columns_of(rank, batch.slice(int(found[0]), 1), count))
    return LearnerValues(problem="this completion was left out of the batch, or its update was skipped")


def columns_of(file: SamplesFile, row: pa.RecordBatch, count: int) -> dict[str, list[float | None]]:
    """Return the values of one completion. Raises UserError unless each column has one per token."""
    columns = {}
    for name, column in VALUES.items():
        values = row[column][0].as_py()
        if not isinstance(values, list) or len(values) != count:
            raise UserError(f"{file.path} is damaged: {column} does not have one value per token")
        columns[name] = values
    return columns
