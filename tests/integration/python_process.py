"""Trainings by the Python face in one process, which leave it as it was. Arguments: the recipe and a mode."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import grpo

WEIGHT = 0.125


def lengths(completion, row):
    """Reward of a random model, whose completions differ in length."""
    return WEIGHT * len(completion) + (completion.count("1") - completion.count("7")) / 8


def state():
    """What a training must leave as it was."""
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)]
    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "signals": signals,
        "torch": (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()),
        "numpy": np.random.get_state()[1].tolist(),
        "path": list(sys.path),
        "children": psutil.Process().children(recursive=True),
        "frozen": gc.get_freeze_count(),
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith(("rewards", "samples", "Thread"))),
    }


def unchanged(before):
    after = state()
    variables = before["environment"].items() ^ after["environment"].items()
    assert not variables, variables
    different = [name for name in before if after[name] != before[name]]
    assert not different, [f"{name}: {before[name]!r:.2000} -> {after[name]!r:.2000}" for name in different]


def train(recipe, name, **options):
    return grpo.train(recipe, {"run.name": name, "run.tensorboard": True}, rewards=[lengths], **options)


def twice(recipe):
    """One training in another thread, the next in this one, with the same numbers."""
    import grpo.lifecycle.api  # libraries set variables when they are imported

    os.environ["RAY_AUTH_TOKEN"] = "of-the-caller"
    runs = []
    before = state()
    thread = threading.Thread(target=lambda: runs.append(train(recipe, "thread")), name="caller")
    thread.start()
    thread.join()
    unchanged(before)
    runs.append(train(recipe, "main"))
    unchanged(before)
    first, second = runs
    assert first.summary["weights_sha256"] == second.summary["weights_sha256"]
    for name in ("completion", "reward", "learner_logprob_sum"):
        assert first.samples[name].to_pylist() == second.samples[name].to_pylist()
    texts, rewards = first.samples["completion"].to_pylist(), first.samples["reward"].to_pylist()
    assert rewards == [lengths(text, {}) for text in texts]
    assert first.metrics["step"].to_pylist() == [1, 2]
    assert first.accuracy is None
    assert grpo.Run(first.path).model_path == first.path / "model"
    found = grpo.evaluate(
        first, data=[Path(recipe).with_name("eval.jsonl")], rewards=[lengths], out=first.path / "evals"
    )
    unchanged(before)
    values = found.samples["reward"].to_pylist()
    assert abs(found.sets["eval"]["avg"]["mean"] - sum(values) / len(values)) < 1e-9, found.sets


def interrupted(recipe):
    """A signal in the first step; the same call with resume="auto" finishes the run."""
    import grpo.lifecycle.api

    before = state()
    folder = Path(recipe).parent / "runs" / "stopped"

    def strike():
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=strike, name="striking", daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(recipe, "stopped")
    assert str(stopped.value) == f"interrupted by SIGINT; resume it with grpo.train(..., resume={str(folder)!r})"
    unchanged(before)
    assert grpo.Run(folder).summary["exit_reason"] == "interrupted by SIGINT"
    global WEIGHT
    WEIGHT = 0.25
    with pytest.raises(grpo.UserError, match=r"to permit this: allow=rewards\[0\]\.file$"):
        train(recipe, "stopped", resume="auto")
    WEIGHT = 0.125
    run = train(recipe, "stopped", resume="auto")
    unchanged(before)
    straight = train(recipe, "straight")
    assert run.metrics["step"].to_pylist() == straight.metrics["step"].to_pylist()
    assert run.summary["weights_sha256"] == straight.summary["weights_sha256"]
    assert train(recipe, "stopped", resume=run.path).path == run.path  # nothing is left to do


def failing(recipe):
    """A run that fails raises the error, with a note that names the run folder."""
    import grpo.lifecycle.api

    before = state()

    def broken(completion, row, info):
        if info["step"] > 0:
            raise ValueError("on purpose")
        return 0.5

    with pytest.raises(grpo.UserError, match="on purpose") as failed:
        grpo.train(recipe, {"run.name": "failed"}, rewards=[broken])
    folder = Path(recipe).parent / "runs" / "failed"
    assert failed.value.__notes__ == [f"The run has ended; {folder} has no checkpoint to resume from"]
    unchanged(before)


if __name__ == "__main__":
    {"twice": twice, "interrupted": interrupted, "failing": failing}[sys.argv[2]](sys.argv[1])
    print("as it was")
