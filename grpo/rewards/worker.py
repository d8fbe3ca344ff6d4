"""A reward worker: `python -P worker.py FD PARENT MEMORY_BYTES`, started by its keeper, one call at a time.

From the parent come pickles behind their length, made by us from the data set's rows. Back goes one line of JSON per
call, in order, so that the parent unpickles nothing that a reward function touched. Each line also tells the parent
that the next call begins, which is when that call's deadline starts. Imports nothing heavy: a worker that is killed
must be replaced in a fraction of a second.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import importlib.util
import inspect
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
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

PR_SET_PDEATHSIG = 1
FILE_BYTES = 1 << 28
"""Largest file that a reward function may write."""
LOG_BYTES = 1 << 24
"""A log that has grown beyond this is cut before the next call."""
HEADER_BYTES = 8
"""Length of the pickle that follows, little endian."""
MAX_PARTS = 64
"""Entries of a mapping that a reward returns."""
NOT_GIVEN = ("completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What newer versions of TRL pass besides prompts, completions and columns, and we do not."""

Result = dict[str, Any]
"""{"value": number | None, "parts": {key: number}} or {"failed": kind, "detail": text}, of one completion."""


class LoadError(Exception):
    """A reward cannot be used. Its text is the sentence for the user."""


class BadReturnError(Exception):
    """What a function returned is no reward. `args`: (kind, detail)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A loaded reward function."""

    function: Callable[..., Any]
    names: frozenset[str] | None
    """Names that it can be called with; None: any."""
    style: str
    file: str
    """Absolute path."""
    shown: str
    """The path as the recipe gives it."""

    def given(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `arguments` that the function takes."""
        return {name: value for name, value in arguments.items() if self.names is None or name in self.names}


def main(fd: int, parent: int, memory_bytes: int) -> None:
    """Load what the first message names, then answer calls until the driver closes the socket."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above, so that no signal will come
        return
    for limit, value in (
        (resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))
    # Ray sends SIGTERM to every process below a job that it stops, while the step under way is still to be scored
    signal.signal(signal.SIGTERM, go_on)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    sys.path.append(os.getcwd())  # reward files may import what lies there, but nothing there hides a module
    os.set_inheritable(fd, False)  # a process that a reward function starts must not keep the socket open
    stream = os.fdopen(fd, "rb", closefd=False)
    try:
        rewards = [load(spec) for spec in pickle.loads(receive(stream))]
    except LoadError as error:
        return send(fd, {"load_error": str(error)})
    surroundings, own = Surroundings(), os.getpid()
    send(fd, {"ready": True})
    while message := receive(stream):
        job = pickle.loads(message)
        for reward, items in job["calls"]:
            cut_log()
            results = call(rewards[reward], job["context"], items)
            if os.getpid() != own:  # a copy that the function has forked: only one may answer
                os._exit(0)
            send(fd, {"results": results} | ({"changed": name} if (name := surroundings.changed()) else {}))


def go_on(number: int, frame: FrameType | None) -> None:
    """The handler of a signal that is the driver's to answer."""


def receive(stream: BinaryIO) -> bytes:
    """The next message; empty when the parent has closed the socket."""
    return stream.read(int.from_bytes(stream.read(HEADER_BYTES), "little"))


def send(fd: int, message: Mapping[str, Any]) -> None:
    line = memoryview(json.dumps(message).encode() + b"\n")
    while line:
        line = line[os.write(fd, line) :]


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


def cut_log() -> None:
    """Keep the prints of long runs bounded. A function may have closed them, which `Surroundings` sees."""
    with contextlib.suppress(OSError):
        if os.fstat(1).st_size > LOG_BYTES:
            os.ftruncate(1, 0)


class Surroundings:
    """What one call may change under the next: built-in names, functions of the standard library, and the like."""

    def __init__(self) -> None:
        watched = (builtins, json, math, os, pickle, random, re, signal, time)
        holders = (*watched, json.JSONDecoder, json.JSONEncoder, sys.modules["__main__"])
        self._modules = [(holder, dict(vars(holder))) for holder in holders]
        self._others = self._look()

    def changed(self) -> str | None:
        """The first thing that is not as it was, if any. What was added to a module does not count."""
        for module, before in self._modules:
            now = vars(module)
            if now != before:  # dictionaries are compared in a microsecond
                for name, value in before.items():
                    if name not in ("_", "_runner") and now.get(name) is not value and now.get(name) != value:
                        return f"{module.__name__}.{name}"
        others = self._look()
        return next((name for name, value in self._others.items() if others[name] != value), None)

    def _look(self) -> dict[str, Any]:
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


# --- loading ---------------------------------------------------------------------------------------------------------


def load(spec: Mapping[str, Any]) -> Reward:
    """The function that `spec` (see `grpo.rewards.process.spec_of`) names.

    The source comes with the spec, read once at the start of the run: a worker that is started later scores by the
    same function although the file has been edited since.

    Raises LoadError.
    """
    where, file, folder = f"rewards[{spec['index']}]: {spec['shown']}", spec["file"], str(Path(spec["file"]).parent)
    if folder not in sys.path:
        sys.path.insert(behind_standard_library(), folder)  # for imports of files beside it
    module_spec = importlib.util.spec_from_file_location(f"grpo_reward_{spec['index']}", file)
    if module_spec is None:
        raise LoadError(f"{where} is not a Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look the module up by name
    try:
        exec(compile(spec["source"], file, "exec"), module.__dict__)
    except BaseException as error:  # the user's module may raise anything, SystemExit too
        place = user_place(error, file, spec["shown"]) or spec["shown"]
        raise LoadError(f"rewards[{spec['index']}]: {place}: {described(error)}") from error
    function = getattr(module, spec["name"], None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        hint = nearest(spec["name"], known) or f"; it has {', '.join(known) or 'none'}"
        raise LoadError(f"{where} has no function {spec['name']}{hint}")
    code = getattr(inspect.unwrap(function), "__code__", None)
    names = checked_names(function, spec, f"{where}:{code.co_firstlineno}" if code else where)
    return Reward(function=function, names=names, style=spec["style"], file=file, shown=spec["shown"])


def behind_standard_library() -> int:
    """The place in `sys.path` after Python's own modules and before the installed packages: a `string.py` beside a
    reward file hides no module that others import, and a `utils.py` is not hidden by a package of that name."""
    own = os.path.dirname(os.__file__)
    return max((i + 1 for i, place in enumerate(sys.path) if place in (own, f"{own}/lib-dynload")), default=0)


def checked_names(function: Callable[..., Any], spec: Mapping[str, Any], where: str) -> frozenset[str] | None:
    """The names that `function` takes, None for any, after trying to bind what its style gives.

    Raises LoadError when it could never be called.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise LoadError(f"{where}: the parameters of {spec['name']} cannot be read: {described(error)}") from error
    parameters = signature.parameters.values()
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional: tuple[str, ...] = ()
    if spec["style"] == "grpo":
        positional, given = ("completion", "row"), ["info"]
        for style, name in (("trl", "completions"), ("verl", "solution_str")):
            if name in required:  # it might bind, and then be called with other things than it means
                raise LoadError(f"{where}: {spec['name']}{signature} is written for {style}; set its style: {style}")
    elif spec["style"] == "verl":
        given = ["data_source", "solution_str", "ground_truth", "extra_info"]
    else:
        given = ["prompts", "completions", *checked_columns(required, spec, where)]
    try:
        signature.bind(*positional, **{name: None for name in given if takes_all or name in signature.parameters})
    except TypeError as error:
        shape = ", ".join([*positional, *given])
        raise LoadError(
            f"{where}: {spec['name']}{signature} does not fit style {spec['style']}, which gives ({shape}): {error}"
        ) from error
    return None if takes_all else frozenset(signature.parameters)


def checked_columns(required: Sequence[str], spec: Mapping[str, Any], where: str) -> list[str]:
    """Columns that a function of style trl will be given: the rows', or while they are unknown those it asks for.

    Raises LoadError for a name that will not be given.
    """
    columns = spec["columns"]
    known = list(required) if columns is None else list(columns)
    for name in required:
        if name in NOT_GIVEN and (columns is None or name not in columns):
            raise LoadError(f"{where}: {spec['name']} asks for {name}, which is not given; give it a default")
        if name not in ("prompts", "completions", *known):
            hint = nearest(name, known) or f"; they have {', '.join(known)}"
            raise LoadError(f"{where}: {spec['name']} asks for {name}, which is no column of the rows{hint}")
    return [name for name in known if name not in ("prompts", "completions")]


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    import difflib  # noqa: PLC0415 - only for a sentence that ends the run

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


# --- calling ---------------------------------------------------------------------------------------------------------


def call(reward: Reward, context: bytes, items: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Result]:
    """One call on `items` (completion, info); one result each, whatever the function does short of ending the process.

    `context` is the pickle of (row, messages). Unpickling it for every call gives each its own deep copy, so that a
    function which changes its row cannot affect another completion; it is quicker than copy.deepcopy.
    """
    try:
        row, messages = pickle.loads(context)
        if reward.style == "trl":
            return call_trl(reward, row, messages, items)
        [(completion, info)] = items
        if reward.style == "verl":
            return [score_of(awaited(call_verl(reward, completion, row)))]
        return [value_of(awaited(reward.function(completion, row, **reward.given({"info": dict(info)}))))]
    except BadReturnError as error:
        return [failed(*error.args)] * len(items)
    except BaseException as error:  # noqa: BLE001 - user code: SystemExit and KeyboardInterrupt fail this call only
        place = user_place(error, reward.file, reward.shown)
        return [failed("exception", described(error) + (f" at {place}" if place else ""))] * len(items)


def call_trl(
    reward: Reward,
    row: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]] | None,
    items: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[Result]:
    """A whole group: f(prompts, completions, **columns) -> one number or None per completion."""
    prompts: list[Any] = [info["prompt"] for _, info in items]
    completions: list[Any] = [completion for completion, _ in items]
    if messages is not None:
        prompts = [[dict(turn) for turn in messages] for _ in items]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    columns = {name: [value] * len(items) for name, value in row.items()}
    arguments = columns | {"prompts": prompts, "completions": completions}
    returned = awaited(reward.function(**reward.given(arguments)))
    if not isinstance(returned, list | tuple):
        raise BadReturnError("wrong_type", f"returned {type(returned).__name__}, not a list of numbers")
    if len(returned) != len(items):
        raise BadReturnError("wrong_count", f"returned {len(returned)} rewards for {len(items)} completions")
    results = []
    for value in returned:
        if isinstance(value, BaseException):  # of this completion only
            results.append(failed("exception", described(value)))
            continue
        try:
            results.append(result(None if value is None else number(value)))
        except BadReturnError as error:  # of this completion only
            results.append(failed(*error.args))
    return results


def call_verl(reward: Reward, completion: str, row: Mapping[str, Any]) -> Any:
    """compute_score(data_source, solution_str, ground_truth, extra_info), by the names that it takes."""
    arguments = {
        "data_source": row.get("data_source"),
        "solution_str": completion,
        "extra_info": row.get("extra_info"),
    }
    if reward.names is None or "ground_truth" in reward.names:
        nested = row.get("reward_model")
        if isinstance(nested, Mapping) and "ground_truth" in nested:
            arguments["ground_truth"] = nested["ground_truth"]
        elif "ground_truth" in row or "answer" in row:
            arguments["ground_truth"] = row["ground_truth"] if "ground_truth" in row else row["answer"]
        else:
            raise BadReturnError("exception", "the row has no reward_model.ground_truth, ground_truth or answer")
    return reward.function(**reward.given(arguments))


def awaited(returned: Any) -> Any:
    """The result of an async function. One event loop serves all calls, as clients kept between calls need."""
    if not inspect.isawaitable(returned):
        return returned
    import asyncio  # noqa: PLC0415 - costs more than everything else here, and most functions are plain

    global _runner
    if _runner is None:
        _runner = asyncio.Runner()

    async def wait() -> Any:
        return await returned

    return _runner.run(wait())


_runner: Any = None


# --- results ---------------------------------------------------------------------------------------------------------


def result(value: float | None, parts: Mapping[str, float] | None = None) -> Result:
    return {"value": value, "parts": parts or {}}


def failed(kind: str, detail: str) -> Result:
    return {"failed": kind, "detail": detail}


def value_of(returned: Any) -> Result:
    """Style grpo: a number, None, or a mapping whose entries are summed and logged."""
    if not isinstance(returned, Mapping):
        return result(None if returned is None else number(returned))
    if not returned:
        raise BadReturnError("wrong_type", "returned an empty mapping")
    refuse_crowd(returned)
    parts = {str(key): number(value) for key, value in returned.items()}
    return result(number(sum(parts.values())), parts)


def score_of(returned: Any) -> Result:
    """Style verl: a number, None, or a mapping with `score`, whose other numbers are only logged."""
    if not isinstance(returned, Mapping):
        return result(None if returned is None else number(returned))
    if "score" not in returned:
        raise BadReturnError("wrong_type", f"returned a mapping without 'score', with {list(returned)!r:.100}")
    refuse_crowd(returned)
    parts: dict[str, float] = {}
    for key, value in returned.items():
        try:
            if key != "score":
                parts[str(key)] = number(value)
        except BadReturnError:  # texts and the like: of no use in a log of numbers, and no part of the reward
            continue
    return result(number(returned["score"]), parts)


def refuse_crowd(returned: Mapping[Any, Any]) -> None:
    """Each entry becomes a metric. Raises BadReturnError for more than MAX_PARTS."""
    if len(returned) > MAX_PARTS:
        raise BadReturnError(
            "wrong_type", f"returned a mapping of {len(returned)} entries; at most {MAX_PARTS} are taken"
        )


def number(value: Any) -> float:
    """`value` as a finite float: Python's numbers and the scalars of numpy and torch, but no arrays."""
    is_array = getattr(value, "ndim", 0) != 0
    if is_array or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise BadReturnError("wrong_type", f"returned {type(value).__name__} {value!r:.80}, not a number")
    try:
        converted = float(value)
    except OverflowError as error:
        raise BadReturnError("not_finite", "returned an integer beyond the range of floats") from error
    if not math.isfinite(converted):
        raise BadReturnError("not_finite", f"returned {converted}")
    return converted


def described(error: BaseException) -> str:
    """Type and message on one line."""
    try:
        message = str(error.msg if isinstance(error, SyntaxError) else error)
    except BaseException:  # noqa: BLE001 - the user's own exception class may fail to print
        message = "(its message cannot be printed)"
    message = " ".join(message.split())
    return f"{type(error).__name__}: {message[:160]}" if message else type(error).__name__


def user_place(error: BaseException, file: str, shown: str) -> str | None:
    """`path:line` of the last frame that `error` passed in the reward file or its folder, else outside this file."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 1))
    folder = str(Path(file).parent) + os.sep
    theirs = [f for f in frames if f[0].startswith(folder) and "site-packages" not in f[0]]
    others = [f for f in frames if f[0] != __file__ and not f[0].startswith("<frozen")]
    if not theirs:
        return f"{others[-1][0]}:{others[-1][1]}" if others else None
    name, line = theirs[-1]
    return f"{Path(shown).parent / Path(name).relative_to(folder)}:{line}"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
