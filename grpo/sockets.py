"""Folder for the sockets of Ray and vLLM: the path of a socket must be short, and TMPDIR may be long."""

from __future__ import annotations

import os
import tempfile

from grpo.types import UserError

SOCKET_PATH = 107
"""Maximum bytes of a UNIX socket path on Linux, by unix(7), without the terminating 0."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
RAY = len("/grpo-ray-xxxxxxxx/r/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes that the longest path of a Ray socket adds to the folder in which Ray's own folder is created."""
VLLM = len("/01234567-0123-0123-0123-0123456789ab")
"""The same for the sockets between the workers of one sampler."""


def socket_folder(below: int) -> str:
    """Return a writable folder whose path leaves room for `below` more bytes of a socket path.

    This is the folder for temporary files (TMPDIR) or, if its path is too long, one of SHORT_FOLDERS.

    Raises UserError when there is none.
    """
    room, given = SOCKET_PATH - below, tempfile.gettempdir()
    for folder in (given, *SHORT_FOLDERS):
        if len(os.fsencode(folder)) <= room and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(
        f"TMPDIR: the path {given} has {len(os.fsencode(given))} bytes, and sockets allow at most {room}; "
        f"none of {', '.join(SHORT_FOLDERS)} can be used instead; set TMPDIR to a shorter path"
    )
