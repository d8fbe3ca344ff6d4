"""One reward worker as the parent sees it: start, send, receive, kill. Nothing here blocks, except `kill` briefly.

The socket carries pickles to the worker and lines of JSON back. The worker runs untrusted code, so a line is either
parsed (the first one here, answers in `grpo.rewards.groups`) or refused.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.config import RewardConfig
from grpo.rewards import reaper, worker
from grpo.rewards.child.errors import memory_words
from grpo.rewards.child.loading import Spec
from grpo.types import UserError

START_S = 120.0
"""Seconds that a worker may take to load the reward files."""
REAPER_S = 10.0
"""Seconds that a reaper may take to kill its worker and everything below it."""
MIN_SECRET = 8
"""Minimum length of a secret to search for, in characters; shorter ones occur by chance."""
SECRET_NAME = re.compile(
    r"TOKENS?(_|$)|SECRET|PASSW|PASSPHRASE|(^|_|SSH|DB)PASS(_|$)|_PWD$"
    r"|(^|_|API|PRIVATE|ACCESS|ENCRYPTION|SIGNING)KEYS?(_|$)|CREDENTIAL|AUTH(_|$)|AUTHORIZATION|COOKIE"
    r"|(^|_)(PAT|JWT|BEARER|DSN)(_|$)|CONNECTION_?STRING|WEBHOOK"
)
SECRET_URL = re.compile(r"://[^/@\s]+@")
MAX_LINE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """First line that a worker sends."""

    error: str | None
    """Message that says why a file did not load; None if all loaded."""
    unfilled: tuple[tuple[str, ...], ...] = ()
    """For each reward, the parameters that keep their defaults because its style does not provide them."""


def spec_of(
    index: int,
    reward: RewardConfig,
    file: Path,
    columns: Sequence[str] | None = None,
    source: bytes | None = None,
    kept_back: Collection[str] = (),
) -> Spec:
    """Return what a worker needs to load rewards[index].

    Args:
        columns: Columns of the rows, if known.
        source: Content of the file, if it has been read already.
        kept_back: Environment variables that the worker does not see.

    Raises UserError when the file cannot be read.
    """
    try:
        source = file.read_bytes() if source is None else source
    except OSError as error:
        raise UserError(f"rewards[{index}]: {reward.file} cannot be read: {error.strerror}") from error
    return {
        "index": index,
        "file": str(file.resolve()),
        "shown": reward.file,
        "source": source,
        "name": reward.function,
        "style": reward.style,
        "columns": None if columns is None else list(columns),
        "withheld": sorted(kept_back),
    }


class WorkerProcess:
    """A started worker that loads `specs`. Its output is appended to `log`, or dropped if `log` is None.

    Its parent is a reaper (`grpo.rewards.reaper`), which ends only when neither the worker nor anything that it started
    is left.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        environment: Mapping[str, str],
        memory_gib: float,
        log: Path | None,
    ) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        self._memory_gib = memory_gib
        self._outgoing = bytearray()
        self._incoming = bytearray()
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)  # a reward function may have removed it
        with theirs, (log or Path(os.devnull)).open("ab") as prints:
            self._process = subprocess.Popen(
                [sys.executable, "-P", reaper.__file__, str(theirs.fileno()), str(int(memory_gib * 2**30))],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=prints,
                stderr=prints,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C does not reach it
            )
        self.send(pickle.dumps(list(specs)))

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    def send(self, message: bytes) -> None:
        """Queue a message and send what the socket accepts now. `flush` sends the rest when the socket is writable."""
        self._outgoing += len(message).to_bytes(worker.HEADER_BYTES, "little") + message
        self.flush()

    def flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self.socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError:  # the worker is gone; `receive` reports it, after its last lines
            self._outgoing.clear()

    def receive(self) -> tuple[list[bytes], bool]:
        """Return the lines that have arrived, and whether more can come."""
        more, size = True, 0
        while size < MAX_LINE_BYTES:  # bounded, so that a flood of data cannot block the parent
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                more = False
                break
            size += len(data)
            self._incoming += data
        *lines, rest = bytes(self._incoming).split(b"\n")
        self._incoming = bytearray(rest)
        return lines, more and len(rest) <= MAX_LINE_BYTES

    def exited(self) -> bool:
        """Return whether the reaper has ended. Its exit status is left for `kill` to read."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self, *, patience_s: float = 0.0) -> str:
        """Kill the worker and everything that it has started. Return how the worker ended, in words.

        Args:
            patience_s: Seconds to wait for the worker to end by itself, so that its own exit is reported instead of
                this kill. Useful when its socket has closed.
        """
        until = time.monotonic() + patience_s
        while not self.exited() and time.monotonic() < until:
            time.sleep(0.002)
        alone = self.exited()
        assert self._process.stdin is not None
        self._process.stdin.close()  # tells the reaper to kill everything
        try:
            code = self._process.wait(timeout=REAPER_S)
        except subprocess.TimeoutExpired:  # the user's code has stopped the reaper
            self._process.kill()
            code = self._process.wait()
        self.socket.close()
        if code == reaper.TOO_MANY:
            return f"had more than {reaper.MAX_PROCESSES} processes"
        if code == reaper.TOO_LARGE:
            return f"and its processes used more than {memory_words(self._memory_gib)}"
        if not alone:
            return "closed or broke its connection"
        if code >= 0:
            return f"exited with code {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{memory}"


def secrets(environment: Mapping[str, str]) -> set[str]:
    """Return the variables that look like secrets, by their name or by a password in a URL."""
    return {name for name, value in environment.items() if SECRET_NAME.search(name.upper()) or SECRET_URL.search(value)}


def withheld(environment: Mapping[str, str], passed: Collection[str]) -> set[str]:
    """Return the variables that look like secrets, except those in `passed`."""
    return secrets(environment) - set(passed)


def scrubbed(environment: Mapping[str, str], passed: Collection[str]) -> dict[str, str]:
    """Return `environment` without the variables that look like secrets, except those in `passed`."""
    kept_back = withheld(environment, passed)
    return {name: value for name, value in environment.items() if name not in kept_back}


def parse_greeting(line: bytes) -> Greeting:
    """Parse the first line of a worker.

    Raises ValueError when it is anything else.
    """
    message = json.loads(line)
    if isinstance(message, dict) and isinstance(message.get("load_error"), str):
        return Greeting(error=message["load_error"])
    unfilled = message.get("unfilled") if isinstance(message, dict) and message.get("ready") is True else None
    if not isinstance(unfilled, list) or not all(isinstance(names, list) for names in unfilled):
        raise ValueError("no greeting")
    return Greeting(error=None, unfilled=tuple(tuple(str(name) for name in names) for names in unfilled))
