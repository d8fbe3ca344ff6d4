"""Signals, sent to this process itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from grpo.run.signals import HANDLED, SIGNALS, Stopped, Stopper, handlers_kept, interrupt_early, signals_delayed


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.usefixtures("handlers")
def test_held_signals_interrupt_at_the_end() -> None:
    interrupt_early()
    done = []

    def interrupted(error: Exception | None) -> None:
        with signals_delayed():
            send(signal.SIGTERM)
            send(signal.SIGUSR1)
            done.append("all of it")
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        interrupted(None)
    with pytest.raises(ValueError, match="its own"):
        interrupted(ValueError("its own"))
    assert done == ["all of it"] * 2
    with signals_delayed():
        done.clear()
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)


@pytest.fixture
def stopper(said: list[str], handlers: None) -> Iterator[Stopper]:
    made = Stopper(0.2, said.append)
    made.install()
    yield made
    made.uninstall()


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_outside_of_steps_the_first_signal_stops(stopper: Stopper, number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=number.name):
        send(number)
    assert stopper.asked == number.name
    send(signal.SIGINT)  # taking down is not interrupted again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_within_steps_the_first_signal_asks(stopper: Stopper, said: list[str], number: signal.Signals) -> None:
    with stopper.finishing_steps():
        assert stopper.asked is None
        send(number)
        assert stopper.asked == number.name
    assert not stopper.enforced
    assert len(said) == 1
    send(signal.SIGINT)  # taking down, now that the step is done, is not interrupted
    stopper.uninstall()
    send(number)  # nor are the last words
    time.sleep(0.3)  # done in time: the end of patience no longer counts


def test_a_second_signal_enforces_and_the_first_is_the_reason(stopper: Stopper) -> None:
    def twice() -> None:
        send(signal.SIGTERM)
        send(signal.SIGINT)

    with pytest.raises(Stopped, match="SIGTERM"), stopper.finishing_steps():
        twice()
    assert stopper.enforced
    assert stopper.asked == "SIGTERM"


def test_patience_ends(stopper: Stopper) -> None:
    started = time.monotonic()

    def a_long_step() -> None:
        send(signal.SIGUSR1)
        time.sleep(5)

    with pytest.raises(Stopped, match="SIGUSR1"), stopper.finishing_steps():
        a_long_step()
    assert 0.15 < time.monotonic() - started < 2


def test_a_handler_that_is_set_in_between_goes_again() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with handlers_kept():
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_handler_of_c_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with handlers_kept():
        pass


def test_in_another_thread_the_handlers_stay_as_they_are() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    stopper, done = Stopper(60, print), []

    def run() -> None:
        interrupt_early()
        with signals_delayed(), handlers_kept():
            stopper.install()
            with stopper.finishing_steps():
                done.append([signal.getsignal(number) for number in HANDLED])
            stopper.uninstall()

    signal.setitimer(signal.ITIMER_REAL, 600)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [before]
    assert [signal.getsignal(number) for number in HANDLED] == before
    assert signal.setitimer(signal.ITIMER_REAL, 0)[0] > 500  # the caller's own timer
