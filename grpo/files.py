"""Records and fingerprints of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A written file, as read back."""

    bytes: int
    sha256: str


def seal(file: Path) -> FileRecord:
    """Flush a written file to the disk, read it back and return its record."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return FileRecord(bytes=file.stat().st_size, sha256=digest)


def fingerprint(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(f"{file.name} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
