"""Sessions of a run: a run that is resumed has several. sessions.json has the start and the seconds of each."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo.run.folder import write_text
from grpo.types import UserError

FILE = "sessions.json"


@dataclass(slots=True, kw_only=True)
class Session:
    """One process that has worked on a run."""

    began: float
    """Seconds since the epoch."""
    seconds: float | None
    """None while the session is running, or if it was killed."""


def begin(run: Path, seconds: float) -> list[Session]:
    """Record a session that began `seconds` ago. Return all sessions, this one last.

    The length of an earlier one that was killed is the time to its last line in log.txt, so it must be called before
    anything is logged.

    Raises UserError when sessions.json is damaged.
    """
    sessions = _read(run)
    for session in sessions:
        if session.seconds is None:
            log = run / "log.txt"
            last = log.stat().st_mtime if log.exists() else session.began
            session.seconds = max(0.0, last - session.began)
    sessions.append(Session(began=time.time() - seconds, seconds=None))
    _write(run, sessions)
    return sessions


def end(run: Path, sessions: Sequence[Session], seconds: float) -> list[float]:
    """Record the seconds of the last of `sessions`. Return the seconds of every session."""
    sessions[-1].seconds = seconds
    _write(run, sessions)
    return [session.seconds or 0.0 for session in sessions]


def wall_line(seconds: Sequence[float]) -> str:
    """Return the line about the time of the last session and, if there are several, of all."""
    several = f"; {sum(seconds):.0f} s in {len(seconds)} sessions" if len(seconds) > 1 else ""
    return f"wall time {seconds[-1]:.0f} s{several}"


def _read(run: Path) -> list[Session]:
    file = run / FILE
    if not file.exists():
        return []
    try:
        return [
            Session(began=float(one["began"]), seconds=None if one["seconds"] is None else float(one["seconds"]))
            for one in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} is damaged; remove it: the run then counts its seconds anew") from error


def _write(run: Path, sessions: Sequence[Session]) -> None:
    write_text(run / FILE, json.dumps([asdict(session) for session in sessions]) + "\n")
