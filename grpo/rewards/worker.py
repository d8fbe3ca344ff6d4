"""A reward worker: `python -m grpo.rewards.worker FD FD PID`, started by `grpo.rewards.pool`, one call at a time.

Messages from the parent are pickled by us; answers are JSON, so that nothing a reward function touches is ever
unpickled by the parent. Answers come in the order of the calls, and each batch of them also tells the parent that the
next call has begun, which is when its deadline starts. Imports nothing heavy: starting a worker must be cheap.
"""

from __future__ import annotations

import asyncio
import ctypes
import difflib
import importlib.util
import inspect
import json
import math
import mmap
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1
COALESCE_S = 0.005
"""Answers to calls that take less are sent together; a deadline is late by this much at most."""

Answer = dict[str, Any]
"""{"values": [one per item: number | None], "parts": [one mapping per item]} or {"failed": [kind, detail]}."""


class BadReturnError(Exception):
    """What a function returned is no reward. `args`: (kind, detail)."""


def main(fd: int, begun_fd: int, parent: int) -> None:
    """Answer the parent until it closes the connection. `begun_fd`: shared memory for the running call's number."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    connection = Connection(fd)
    begun = memoryview(mmap.mmap(begun_fd, 8)).cast("q")
    specs = pickle.loads(connection.recv_bytes())
    try:
        functions = [load(spec) for spec in specs]
    except BadReturnError as error:
        connection.send_bytes(json.dumps({"load_error": error.args[0]}).encode())
        return
    connection.send_bytes(json.dumps({"ready": True}).encode())
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        answers, sent = [], time.monotonic()
        for position, (reward, items) in enumerate(job["calls"]):
            begun[0] = position  # the parent reads it should this call be the last thing that happens here
            answers.append(call(functions[reward], specs[reward]["style"], job, items))
            if time.monotonic() - sent > COALESCE_S:
                connection.send_bytes(json.dumps({"answers": answers}).encode())
                answers, sent = [], time.monotonic()
        connection.send_bytes(json.dumps({"answers": answers}).encode())


def load(spec: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that `spec` (index, file, shown, name, style) names.

    Raises BadReturnError with the sentence for the user.
    """
    where = f"rewards[{spec['index']}]: {spec['shown']}"
    path = Path(spec["file"])
    sys.path.insert(0, str(path.parent))
    module_spec = importlib.util.spec_from_file_location(f"grpo_reward_{spec['index']}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:  # the user's module may raise anything, SystemExit too
        line = error.lineno if isinstance(error, SyntaxError) else user_line(error, path)
        place = f"{where}:{line}" if line else where
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise BadReturnError(f"{place}: {type(error).__name__}: {reason}") from error
    function = getattr(module, spec["name"], None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        near = difflib.get_close_matches(spec["name"], known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known) or 'none'}"
        raise BadReturnError(f"{where} has no function {spec['name']}{hint}")
    check_signature(function, spec, where)
    return accepting(function, module)


def check_signature(function: Callable[..., Any], spec: Mapping[str, Any], where: str) -> None:
    """The parameters that the style will give must be enough to call it."""
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if spec["style"] == "grpo":
        extra = [name for name in required[2:] if name != "info"]
        takes_two = len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) >= 2
        if extra or not (takes_two or any(p.kind == p.VAR_POSITIONAL for p in parameters)):
            shape = f"{spec['name']}(completion, row) or {spec['name']}(completion, row, info)"
            raise BadReturnError(f"{where}: {spec['name']} must be {shape}, not {spec['name']}({', '.join(required)})")


def accepting(function: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    """`function`, noting which names it accepts, so that each style can give it no more than it takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())

    def run(*arguments: Any, **named: Any) -> Any:
        if not takes_all:
            named = {name: value for name, value in named.items() if name in parameters}
        result = function(*arguments, **named)
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    run.__module__ = module.__name__
    return run


def call(function: Callable[..., Any], style: str, job: Mapping[str, Any], items: Sequence[int]) -> Answer:
    """One call of a reward function; whatever it does short of killing the process becomes an answer."""
    try:
        if style == "trl":
            return call_trl(function, job, items)
        row = pickle.loads(job["row"])  # a fresh one for every call: what a function does to it ends with the call
        [i] = items
        if style == "verl":
            return number_or_parts(call_verl(function, job["completions"][i], row), score_key="score")
        return number_or_parts(function(job["completions"][i], row, **{"info": dict(job["infos"][i])}), score_key=None)
    except BadReturnError as error:
        return {"failed": list(error.args)}
    except BaseException as error:  # noqa: BLE001 - user code: SystemExit and KeyboardInterrupt are failures of this call, too
        line = user_line(error, None)
        place = f" at line {line}" if line else ""
        return {"failed": ["exception", f"{type(error).__name__}: {error}{place}"[:300]]}


def call_trl(function: Callable[..., Any], job: Mapping[str, Any], items: Sequence[int]) -> Answer:
    """A whole group: f(prompts, completions, **columns) -> one number or None per completion."""
    row = pickle.loads(job["row"])
    texts = [job["completions"][i] for i in items]
    messages = job["messages"]
    prompts = [job["infos"][i]["prompt"] if messages is None else list(messages) for i in items]
    completions = texts if messages is None else [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: [value] * len(items) for name, value in row.items() if name not in ("prompts", "completions")}
    result = function(prompts=prompts, completions=completions, **columns)
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Sequence):
        raise BadReturnError(
            "wrong_type", f"returned {type(result).__name__}, not a list with one number per completion"
        )
    if len(result) != len(items):
        raise BadReturnError("wrong_count", f"returned {len(result)} rewards for {len(items)} completions")
    return {"values": [None if value is None else number(value) for value in result], "parts": [{} for _ in items]}


def call_verl(function: Callable[..., Any], completion: str, row: Mapping[str, Any]) -> Any:
    """compute_score(data_source, solution_str, ground_truth, extra_info), by the names that it takes."""
    nested = row.get("reward_model")
    if isinstance(nested, Mapping) and "ground_truth" in nested:
        truth = nested["ground_truth"]
    else:
        truth = row["ground_truth"] if "ground_truth" in row else row.get("answer")
    return function(
        data_source=row.get("data_source"),
        solution_str=completion,
        ground_truth=truth,
        extra_info=row.get("extra_info"),
    )


def number_or_parts(result: Any, *, score_key: str | None) -> Answer:
    """A number, None, or a mapping: with `score_key` its entry is the value, else the sum of the entries."""
    if result is None:
        return {"values": [None], "parts": [{}]}
    if not isinstance(result, Mapping):
        return {"values": [number(result)], "parts": [{}]}
    if score_key is None:
        parts = {str(name): number(value) for name, value in result.items()}
        if not parts:
            raise BadReturnError("wrong_type", "returned an empty mapping")
        return {"values": [sum(parts.values())], "parts": [parts]}
    if score_key not in result:
        raise BadReturnError("wrong_type", f"returned a mapping without {score_key!r}")
    logged = {str(n): float(v) for n, v in result.items() if n != score_key and isinstance(v, int | float)}
    return {"values": [number(result[score_key])], "parts": [{n: v for n, v in logged.items() if math.isfinite(v)}]}


def number(value: Any) -> float:
    """`value` as a finite float; numpy's and torch's scalars have __float__ too."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise BadReturnError("wrong_type", f"returned {value!r:.80} ({type(value).__name__}), not a number")
    result = float(value)
    if not math.isfinite(result):
        raise BadReturnError("not_finite", f"returned {result}")
    return result


def user_line(error: BaseException, path: Path | None) -> int | None:
    """Line of the last frame outside this file (inside `path` if given) that `error` passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if path is not None:
        frames = [f for f in frames if f.filename == str(path)]
    return frames[-1].lineno if frames else None


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
