"""Texts of token ids, by the tokenizer of the run."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import Tokenizer

from grpo.types import Json
from grpo.view.files import RunFiles

FILE = "tokenizer.json"
MAX_BYTES = 256 << 20
"""Maximum size of a tokenizer."""


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
