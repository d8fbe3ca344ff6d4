"""A run that something happens to: python struck.py FAULT PHASE NOTES.json grpo-arguments...; see test_faults.py.

The driver runs as it is, but for one wait in it: when the phase is reached, and what it is about has been asked for,
the fault is done to real processes, and the driver goes on to wait. NOTES.json then says when, and who was there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from grpo.cluster import engines, watch
from grpo.commands import cli
from grpo.rollout import collect as rollouts
from grpo.run import saving

WAITS = {
    "start": ("the engines to load", 1),
    "sampling": ("completions from the samplers", None),
    "learning": ("the learner's step", 4),
    "sync": ("the weight sync", 5),  # the first is before the first step
    "saving": ("the checkpoint's copy", 2),
}
"""Phase -> what the driver waits for then, and which time; the others are counted in their own way below."""

STEP = 4
FILLER = "filler"


def processes(*words: str) -> list[psutil.Process]:
    """Of this run, with one of `words` in their command line."""
    below = psutil.Process().children(recursive=True)
    living = [p for p in below if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in living if any(word in " ".join(p.cmdline()) for word in words)]


VICTIMS = {"sampler": "SamplerActor", "learner": "LearnerActor", "reward": "rewards/worker.py"}
"""First word of a fault -> a word of the command line of the process that it strikes."""


def await_process(word: str, seconds: float = 60) -> None:
    """Return once a process of this run has `word` in its command line: Ray names an actor's process only when the
    actor's constructor begins, which can be after the driver began to wait for it."""
    deadline = time.monotonic() + seconds
    while not processes(word):
        assert time.monotonic() < deadline, f"no process of this run has {word!r} in its command line"
        time.sleep(0.05)


def fill_disk(folder: Path) -> None:
    with (folder / FILLER).open("wb") as out:
        try:
            while True:
                out.write(bytes(1 << 16))
                out.flush()
        except OSError:
            return


def to_all(number: int) -> None:
    """To every process of the run, as schedulers send it."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself since it was listed
            process.send_signal(number)
    os.kill(os.getpid(), number)


def twice(number: int) -> None:
    os.kill(os.getpid(), number)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


FAULTS: dict[str, Callable[[], Any]] = {
    "sampler killed": lambda: processes(VICTIMS["sampler"])[-1].kill(),
    "sampler hung": lambda: processes(VICTIMS["sampler"])[-1].suspend(),
    "learner killed": lambda: processes(VICTIMS["learner"])[-1].kill(),
    "learner hung": lambda: processes(VICTIMS["learner"])[-1].suspend(),
    "reward worker killed": lambda: processes(VICTIMS["reward"])[-1].kill(),
    "reward worker hung": lambda: processes(VICTIMS["reward"])[-1].suspend(),
    "node lost": lambda: [p.kill() for p in processes("raylet/raylet", "SamplerActor", "LearnerActor")],
    "driver killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGTERM to all": lambda: to_all(signal.SIGTERM),
    "SIGUSR1 to all": lambda: to_all(signal.SIGUSR1),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "Ctrl-C twice": lambda: twice(signal.SIGINT),
    "disk full": lambda: fill_disk(Path(os.environ["FULL_DISK"])),
}


def main(fault: str, phase: str, notes: Path, arguments: list[str]) -> int:
    seen = 0

    def strike() -> None:
        if fault.split()[0] in VICTIMS:
            await_process(VICTIMS[fault.split()[0]])
        family = [(p.pid, p.create_time()) for p in psutil.Process().children(recursive=True)]
        notes.write_text(json.dumps({"at": time.time(), "family": family}))
        FAULTS[fault]()

    def count(reached: bool) -> None:
        nonlocal seen
        seen += reached
        if reached and seen == (WAITS[phase][1] if phase in WAITS else None):
            strike()

    plain_poll = saving.Saver.poll  # of the checkpoints only the finished ones are left: the one of step 2 is one by 4
    saving.Saver.poll = lambda self, *, wait=False: plain_poll(self, wait=True)  # type: ignore[method-assign]
    if phase == "scoring":
        plain_rewards = rollouts.rewards_of

        def rewards_of(future: Any, prompt: Any, timeout_s: float) -> Any:
            nonlocal seen
            seen += 1
            if seen == 8 * (STEP - 1) + 1:
                strike()
            return plain_rewards(future, prompt, timeout_s)

        rollouts.rewards_of = rewards_of
    elif phase == "sampling":
        plain_sample = engines.Engines.sample

        def sample(self: Any, requests: Any, settings: Any) -> Any:
            nonlocal seen
            seen += 1
            for number, block in enumerate(plain_sample(self, requests, settings)):
                if number == 0 and seen == STEP:  # others are still owed
                    strike()
                yield block

        engines.Engines.sample = sample  # type: ignore[method-assign]
    plain_wait = watch.ActorWatch.wait

    def wait(self: Any, references: Any, what: str, timeout_s: float, **more: Any) -> Any:
        if phase in WAITS and phase != "sampling":
            count(what == WAITS[phase][0])
        return plain_wait(self, references, what, timeout_s, **more)

    watch.ActorWatch.wait = wait  # type: ignore[method-assign]
    return cli.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
