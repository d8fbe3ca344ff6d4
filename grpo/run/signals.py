"""Handling of SIGTERM, SIGUSR1 and Ctrl-C. The first signal requests a stop; a second one or a timeout enforces it.

Only the main thread of a process can set handlers. In another thread, everything here leaves the handlers as they are,
so no signal stops a run there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
HANDLED = (*SIGNALS, signal.SIGALRM)
"""All signals whose handlers are set here. SIGALRM ends the grace period of a step."""


class Stopped(KeyboardInterrupt):
    """The run stops now.

    It is a KeyboardInterrupt because Ray's compiled waits propagate no other exception from a signal handler: others
    are lost there, or crash the process. The waits raise a plain KeyboardInterrupt instead of this class.
    """


def in_main_thread() -> bool:
    """Return whether this thread can set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def interrupt_early() -> None:
    """Make all of the signals raise KeyboardInterrupt, as Ctrl-C does, while there is nothing to finish."""
    for number in SIGNALS if in_main_thread() else ():
        signal.signal(number, signal.default_int_handler)


@contextmanager
def signals_delayed() -> Iterator[None]:
    """Delay signals that arrive during the block until its end, so that it is not interrupted halfway.

    An exception of the block takes precedence over them.
    """
    came: list[int] = []
    with handlers_kept():
        for number in SIGNALS if in_main_thread() else ():
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    if came:
        raise KeyboardInterrupt


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore, at the end of the block, the signal handlers that were set before it."""
    before = {number: signal.getsignal(number) for number in HANDLED} if in_main_thread() else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: it was set by C code, and Python cannot set it again
                signal.signal(number, handler)


class Stopper:
    """Signal handling of a run.

    Inside `with stopper.finishing_steps()`, the first signal only sets `asked`, and the current step may take `grace_s`
    more seconds. Elsewhere it raises Stopped at once.
    """

    def __init__(self, grace_s: float, say: Callable[[str], object]) -> None:
        self._grace_s, self._say = grace_s, say
        self.asked: str | None = None
        """Name of the first signal."""
        self.enforced = False
        """Stopped has been raised. Whatever exception it results in, the signal is the reason."""
        self._may_finish = self._over = False

    def install(self) -> None:
        """Install the handlers, replacing any that were installed by others."""
        for number in HANDLED if in_main_thread() else ():
            signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Restore the default handlers: SIGTERM and SIGUSR1 kill the process.

        After a requested stop, ignore signals instead: only final messages remain, and they decide the exit code.
        """
        if not in_main_thread():
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in HANDLED:
            plain = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if self.asked else plain)

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Let a stop wait, inside the block, until the step is done and saved."""
        self._may_finish = True
        try:
            yield
        finally:
            self._may_finish = False
            self._over = self.asked is not None
            if in_main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.enforced or self._over:  # the shutdown is not interrupted again
            return
        first, name = self.asked is None, signal.Signals(number).name
        self.asked = self.asked or name
        if first and self._may_finish:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)
            within = f"in at most {self._grace_s:g} s"
            self._say(f"{name}: finishing the step and saving, {within}; a second signal stops at once")
            return
        self.enforced = True
        raise Stopped(self.asked)
