"""Where the sockets of Ray and vLLM are put: a socket's path must be short, and TMPDIR may be long."""

from __future__ import annotations

import os
import tempfile

from grpo.types import UserError

SOCKET_PATH = 107
"""Bytes of a UNIX socket's path on Linux, by unix(7), without the last, which is 0."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
RAY = len("/grpo-ray-xxxxxxxx/r/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes that the longest path of Ray's sockets has behind the folder that its own is made in."""
VLLM = len("/01234567-0123-0123-0123-0123456789ab")
"""The same of the sockets that the workers of one sampler talk through."""


def socket_folder(below: int) -> str:
    """A folder whose path leaves room for sockets of `below` more bytes: that for temporary files, which TMPDIR names,
    or where its path is too long another one of the machine.

    Raises UserError when there is none.
    """
    room, given = SOCKET_PATH - below, tempfile.gettempdir()
    for folder in (given, *SHORT_FOLDERS):
        if len(os.fsencode(folder)) <= room and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(
        f"TMPDIR: the path {given} has {len(os.fsencode(given))} bytes, and sockets need a folder of at most {room} "
        f"that can be written to, which {', '.join(SHORT_FOLDERS)} are not either; set TMPDIR to a shorter path"
    )
