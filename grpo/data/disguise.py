"""Detect files whose first bytes show a different format than expected."""

from __future__ import annotations

import stat
from pathlib import Path

PARQUET = b"PAR1"
FIRST_BYTES = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer instead of the file; fetch it with: git lfs pull",
    b"\x1f\x8b": "compressed by gzip; unpack it with: gunzip",
    b"BZh": "compressed by bzip2; unpack it with: bunzip2",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it with: unxz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with: unzstd",
    b"PK\x03\x04": "a zip archive (spreadsheets and PyTorch files are zip archives, too)",
    PARQUET: "a parquet file; its name must end in .parquet",
    b"ARROW1\x00\x00": "an Arrow file; give the folder that save_to_disk has written",
    b"\xff\xff\xff\xff": "an Arrow file; give the folder that save_to_disk has written",
    b"\xff\xfe": "text in UTF-16; write it as UTF-8 with: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "text in UTF-16; write it as UTF-8 with: iconv -f UTF-16 -t UTF-8",
    b"<!doctype html": "a web page, which servers send instead of a file that needs a login",
    b"<html": "a web page, which servers send instead of a file that needs a login",
}


def disguise_of(path: Path) -> str | None:
    """Return the actual format of a file, by its first bytes, and what to do about it. None if they match no entry.

    Raises OSError when the file cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return "a pipe or a device, which cannot be read twice; save its content to a file"
    with path.open("rb") as file:
        start = file.read(64)
    found = (what for first, what in FIRST_BYTES.items() if start.startswith(first) or start.lower().startswith(first))
    return next(found, None)
