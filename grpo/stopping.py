"""SIGTERM, SIGUSR1 and Ctrl-C: the first one asks for an end, a second one or the end of patience enforces it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """The run ends here.

    A KeyboardInterrupt, because Ray's compiled waits pass on no other exception of a signal handler: any other is lost
    there, or crashes the process. What comes out of them is a plain KeyboardInterrupt.
    """


def interrupt_early() -> None:
    """Let every one of the signals raise KeyboardInterrupt, as Ctrl-C does, while there is nothing to finish."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


@contextmanager
def held() -> Iterator[None]:
    """Let signals that come in the block interrupt at its end: where half of it would be worse than none of it. What
    the block itself raises goes before them."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put back, at the end of the block, the handlers that the signals had before it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopper:
    """What to do about signals. Between `with stopper.finishing_steps()` and its end the first one only sets `asked`,
    and the step under way may take `grace_s` more seconds; elsewhere it raises Stopped at once."""

    def __init__(self, grace_s: float, say: Callable[[str], object]) -> None:
        self._grace_s, self._say = grace_s, say
        self.asked: str | None = None
        """The first signal's name."""
        self.enforced = False
        """Stopped has been raised; whatever comes out of it, the reason is the signal."""
        self._may_finish = self._over = False

    def install(self) -> None:
        """Take the signals, also from whoever has taken them since."""
        for number in (*SIGNALS, signal.SIGALRM):
            signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Back to what Python does; SIGTERM and SIGUSR1 kill. After an end that was asked for, signals are ignored:
        what is left to do are last words, and they decide the exit code."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (*SIGNALS, signal.SIGALRM):
            plain = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if self.asked else plain)

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Where an end may wait until the step is done and saved."""
        self._may_finish = True
        try:
            yield
        finally:
            self._may_finish = False
            self._over = self.asked is not None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.enforced or self._over:  # taking down is not interrupted again
            return
        first, name = self.asked is None, signal.Signals(number).name
        self.asked = self.asked or name
        if first and self._may_finish:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)
            self._say(f"{name}: finishing the step and saving, in {self._grace_s:g} s at most; once more: stop now")
            return
        self.enforced = True
        raise Stopped(self.asked)
