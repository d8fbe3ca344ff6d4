"""The state of a worker's process that a call could change for later calls."""

from __future__ import annotations

import builtins
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo.types import Unchecked

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
LIMITS = (resource.RLIMIT_DATA, resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)
HANDLED = (signal.SIGALRM, signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return -1


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class Surroundings:
    """State that a call could change for later calls, such as built-in names and functions of the standard library."""

    def __init__(self, own: Sequence[ModuleType]) -> None:
        """Record the state. `own`: modules of the worker, which are watched too."""
        watched = (builtins, json, math, os, pickle, random, re, signal, time)
        holders: tuple[ModuleType | type, ...] = (*watched, json.JSONDecoder, json.JSONEncoder, *own)
        self._modules = [(holder, dict(vars(holder))) for holder in holders]
        self._others = self._look()

    def changed(self) -> str | None:
        """Return the name of the first thing that has changed, or None. Additions to a module do not count."""
        for module, before in self._modules:
            now = vars(module)
            if now != before:  # comparing the dictionaries takes a microsecond
                for name, value in before.items():
                    if name not in ("_", "_runner") and now.get(name) is not value and now.get(name) != value:
                        return f"{module.__name__}.{name}"
        others = self._look()
        return next((name for name, value in self._others.items() if others[name] != value), None)

    def _look(self) -> dict[str, Unchecked]:
        return {
            "sys.stdout": sys.stdout,
            "sys.stderr": sys.stderr,
            "the working directory": os.getcwd(),
            "a timer": [signal.getitimer(timer) != (0.0, 0.0) for timer in TIMERS],
            "a limit": [resource.getrlimit(limit) for limit in LIMITS],
            "a signal's handler": [signal.getsignal(number) for number in HANDLED],
            "the recursion limit": sys.getrecursionlimit(),
            "a file of the prints": [_inode(fd) for fd in (1, 2)],
            "the processes, leaving some": _has_children(),
        }
