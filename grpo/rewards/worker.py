"""Reward worker: `python -P worker.py FD PARENT MEMORY_BYTES`, started by its reaper. It makes one call at a time.

The parent sends pickles, each preceded by its length, which it made from the rows of the data set. The worker answers
each call, in order, with one line of JSON. So the parent never unpickles data that a reward function touched. Each line
also signals that the next call begins, which starts that call's deadline.

This module imports nothing heavy: a worker that is killed must be replaced in a fraction of a second. It imports
nothing from this package, because it is started by its path.
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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

PR_SET_PDEATHSIG = 1
FILE_BYTES = 1 << 28
"""Largest file that a reward function may write, in bytes."""
LOG_BYTES = 1 << 24
"""A log that has grown beyond this is truncated before the next call."""
HEADER_BYTES = 8
"""Size of the header: the length of the pickle that follows, little endian."""
MAX_PARTS = 64
"""Maximum number of entries in a mapping that a reward returns, and of different names that it logs."""
LOGGED_BYTES = 1 << 20
"""Maximum size of what one call may log, as JSON."""
MAX_TEXT, MAX_NAME = 2000, 100
"""Maximum characters of a logged text (longer ones are truncated) and of a logged name."""
GIVEN_BY_US = ("info", "log_extra", "log_metric")
GIVEN_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of a function of style trl, besides the columns of the rows."""
GIVEN_BY_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
NOT_GIVEN = ("environments", "prompt_ids")
"""Parameters that functions written for TRL may have and style trl does not provide. `environments` come from the
`environment_factory` of TRL's trainer, which has no counterpart here."""

Result = dict[str, Any]
"""Result of one completion: {"value": number | None, "parts": {key: number}} or {"failed": kind, "detail": text}."""
Answer = dict[str, Any]
"""{"results": one Result per completion}. If something was logged, also {"columns": {name: one value per completion},
"metrics": {name: [sum, count]}}."""


class LoadError(Exception):
    """A reward cannot be used. The message is written for the user."""


class BadReturnError(Exception):
    """A function returned something that is not a reward. `args`: (kind, detail)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A loaded reward function."""

    function: Callable[..., Any]
    names: frozenset[str] | None
    """Names of the arguments that it accepts; None: any."""
    style: str
    file: str
    """Absolute path."""
    shown: str
    """The path as the recipe gives it."""
    index: int
    """Index in the recipe's `rewards`."""
    unfilled: tuple[str, ...]
    """Parameters that keep their defaults because the style does not provide them."""
    withheld: frozenset[str]
    """Environment variables that it does not see."""
    logged: set[str] = field(default_factory=set)
    """Names that it has logged so far."""

    def given(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `arguments` that the function accepts."""
        return {name: value for name, value in arguments.items() if self.names is None or name in self.names}


def main(fd: int, parent: int, memory_bytes: int) -> None:
    """Load the rewards of the first message, then answer calls until the driver closes the socket."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above, so no signal will come
        return
    for limit, value in (
        (resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))
    # Ray sends SIGTERM to every process of a job that it stops, but the current step must still be scored
    signal.signal(signal.SIGTERM, go_on)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    sys.path.append(os.getcwd())  # last: reward files may import from it, but it shadows no module
    os.set_inheritable(fd, False)  # a process that a reward function starts must not keep the socket open
    stream = os.fdopen(fd, "rb", closefd=False)
    try:
        rewards = [load(spec) for spec in pickle.loads(receive(stream))]
    except LoadError as error:
        return send(fd, {"load_error": str(error)})
    surroundings, own = Surroundings(), os.getpid()
    send(fd, {"ready": True, "unfilled": [reward.unfilled for reward in rewards]})
    while message := receive(stream):
        job = pickle.loads(message)
        for reward, items in job["calls"]:
            cut_log()
            answer = call(rewards[reward], job["context"], items)
            if os.getpid() != own:  # a fork made by the function: only the original may answer
                os._exit(0)
            send(fd, answer | ({"changed": name} if (name := surroundings.changed()) else {}))


def go_on(number: int, frame: FrameType | None) -> None:
    """Do nothing: the driver handles this signal."""


def receive(stream: BinaryIO) -> bytes:
    """Return the next message; empty when the parent has closed the socket."""
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
    """Truncate a log that exceeds LOG_BYTES. If a function has closed its output, `Surroundings` detects it."""
    with contextlib.suppress(OSError):
        if os.fstat(1).st_size > LOG_BYTES:
            os.ftruncate(1, 0)


class Surroundings:
    """State that a call could change for later calls, such as built-in names and functions of the standard library."""

    def __init__(self) -> None:
        watched = (builtins, json, math, os, pickle, random, re, signal, time)
        holders = (*watched, json.JSONDecoder, json.JSONEncoder, sys.modules["__main__"])
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
    """Load the function that `spec` (see `grpo.rewards.process.spec_of`) names.

    The spec contains the source, which is read once at the start of the run. So a worker that is started later scores
    with the same function, even if the file has been edited since.

    Raises LoadError.
    """
    where, file, folder = f"rewards[{spec['index']}]: {spec['shown']}", spec["file"], str(Path(spec["file"]).parent)
    if folder not in sys.path:
        sys.path.insert(behind_standard_library(), folder)  # so that it can import files next to it
    module_spec = importlib.util.spec_from_file_location(f"grpo_reward_{spec['index']}", file)
    if module_spec is None:
        raise LoadError(f"{where} is not a Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look the module up by name
    try:
        exec(compile(spec["source"], file, "exec"), module.__dict__)
    except BaseException as error:  # the user's module may raise anything, even SystemExit
        place = user_place(error, file, spec["shown"]) or spec["shown"]
        hint = hinted(error, spec["index"], spec["withheld"])
        raise LoadError(f"rewards[{spec['index']}]: {place}: {described(error)}{hint}") from error
    function = getattr(module, spec["name"], None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        hint = nearest(spec["name"], known) or f"; it has {', '.join(known) or 'none'}"
        raise LoadError(f"{where} has no function {spec['name']}{hint}")
    code = getattr(inspect.unwrap(function), "__code__", None)
    names, unfilled = checked_names(function, spec, f"{where}:{code.co_firstlineno}" if code else where)
    return Reward(
        function=function,
        names=names,
        style=spec["style"],
        file=file,
        shown=spec["shown"],
        index=spec["index"],
        unfilled=unfilled,
        withheld=frozenset(spec["withheld"]),
    )


def behind_standard_library() -> int:
    """Return the index in `sys.path` after the standard library and before the installed packages.

    A `string.py` next to a reward file then shadows no module that others import, and no installed package shadows a
    `utils.py` next to it.
    """
    own = os.path.dirname(os.__file__)
    return max((i + 1 for i, place in enumerate(sys.path) if place in (own, f"{own}/lib-dynload")), default=0)


CALLED_AS_GOLD = (
    "answer", "expected", "gold", "gold_answer", "ground_truth", "label", "reference", "solution", "target", "truth",
)  # fmt: skip
"""Names of a second parameter that expects the gold answer."""


def checked_names(
    function: Callable[..., Any], spec: Mapping[str, Any], where: str
) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """Try to bind the arguments that the style provides to `function`.

    Return the names that it accepts (None: any), and its parameters that keep their defaults.

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
        positional, given = ("completion", "row"), list(GIVEN_BY_US)
        for style, name in (("trl", "completions"), ("verl", "solution_str")):
            if name in required:  # it might bind, but its arguments would mean something else
                raise LoadError(f"{where}: {spec['name']}{signature} is written for {style}; set its style: {style}")
        second = next((p.name for p in list(parameters)[1:2] if p.kind == p.POSITIONAL_OR_KEYWORD), "")
        if second in CALLED_AS_GOLD:
            raise LoadError(
                f"{where}: {spec['name']}{signature}: the second argument is the whole row, not the gold answer: call "
                "it row, and take row[COLUMN]"
            )
    elif spec["style"] == "verl":
        given = list(GIVEN_BY_VERL)
    else:
        given = [*GIVEN_BY_TRL, *checked_columns(required, spec, where)]
    try:
        signature.bind(*positional, **{name: None for name in given if takes_all or name in signature.parameters})
    except TypeError as error:
        shape = ", ".join([*positional, *given])
        raise LoadError(
            f"{where}: {spec['name']}{signature} does not fit style {spec['style']}, which gives ({shape}): {error}"
        ) from error
    known = {*given, *list(signature.parameters)[: len(positional)]}
    optional = [p.name for p in parameters if p.default is not p.empty and p.name not in known]
    # style trl: an optional parameter may be a column, so nothing is certain while the columns are unknown
    unfilled = () if spec["style"] == "trl" and spec["columns"] is None else tuple(optional)
    return None if takes_all else frozenset(signature.parameters), unfilled


def checked_columns(required: Sequence[str], spec: Mapping[str, Any], where: str) -> list[str]:
    """Return the columns that a function of style trl receives: those of the rows or, if unknown, those it requires.

    Raises LoadError for a required name that will not be provided.
    """
    columns = spec["columns"]
    known = list(required) if columns is None else list(columns)
    for name in required:
        if name in NOT_GIVEN and (columns is None or name not in columns):
            raise LoadError(f"{where}: {spec['name']} asks for {name}, which is not given; give it a default")
        if name not in (*GIVEN_BY_TRL, *known):
            hint = nearest(name, [*known, *GIVEN_BY_TRL]) or f"; they have {', '.join(known)}"
            raise LoadError(f"{where}: {spec['name']} asks for {name}, which is no column of the rows{hint}")
    return [name for name in known if name not in GIVEN_BY_TRL]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `; did you mean ...?`, or "" if nothing is similar."""
    import difflib  # noqa: PLC0415 - only for an error that ends the run

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


# --- logging ---------------------------------------------------------------------------------------------------------


class LogError(Exception):
    """The function has logged something invalid. The message is written for the user."""


class Log:
    """Values that one call on `count` completions logs besides rewards, with TRL's `log_extra` and `log_metric`."""

    def __init__(self, count: int, names: set[str]) -> None:
        """Start an empty log. `names`: names that the reward has logged before. New ones are added to it."""
        self._count, self._names, self._left = count, names, LOGGED_BYTES
        self._columns: dict[str, list[Any]] = {}
        self._metrics: dict[str, tuple[float, int]] = {}
        self._mistake: LogError | None = None

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add values to a column of the samples file. In the end there must be one value per completion."""
        where = self._named("log_extra", column)
        values = listed(values)
        if not isinstance(values, list | tuple):
            raise self._wrong(f"{where} needs a list of values, one per completion, not {type(values).__name__}")
        kept = self._columns.setdefault(column, [])
        if len(kept) + len(values) > self._count:
            raise self._wrong(f"{where} was given {len(kept) + len(values)} values for {self._count} completions")
        for value in map(loggable, values):
            self._left -= len(json.dumps(value))
            if self._left < 0:
                raise self._wrong(f"{where} goes beyond {LOGGED_BYTES} bytes, more than one call may log")
            kept.append(value)

    def log_metric(self, name: str, value: float) -> None:
        """Add one value of a metric. The metric is the average of all values that are logged in a step."""
        where = self._named("log_metric", name)
        try:
            added = number(value)
        except BadReturnError as error:
            raise self._wrong(f"{where} needs a finite number, not {type(value).__name__} {value!r:.80}") from error
        total, count = self._metrics.get(name, (0.0, 0))
        if not math.isfinite(total + added):
            raise self._wrong(f"{where} was given numbers whose sum is not finite")
        self._metrics[name] = (total + added, count + 1)

    def entries(self) -> dict[str, Any]:
        """Return what was logged, to be added to the answer.

        Raises BadReturnError for an invalid call whose error the function has suppressed, and for a column that lacks
        values.
        """
        if self._mistake is not None:
            raise BadReturnError("exception", f"LogError: {self._mistake}")
        for column, values in self._columns.items():
            if len(values) != self._count:
                raise BadReturnError(
                    "wrong_count",
                    f"log_extra({column!r}) was given {len(values)} values for {self._count} completions",
                )
        every = {"columns": self._columns, "metrics": self._metrics}
        return {kind: logged for kind, logged in every.items() if logged}

    def _named(self, function: str, name: Any) -> str:
        """Check and record the name that is logged. Return the call, in words."""
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
            raise self._wrong(f"{function} needs a name of 1 to {MAX_NAME} printable characters, not {name!r:.80}")
        if name not in self._names and len(self._names) >= MAX_PARTS:
            raise self._wrong(f"{function}({name!r}) is one name more than the {MAX_PARTS} that a reward may log by")
        self._names.add(name)
        return f"{function}({name!r})"

    def _wrong(self, sentence: str) -> LogError:
        self._mistake = self._mistake or LogError(sentence)
        return LogError(sentence)


def loggable(value: Any) -> str | float | bool | None:
    """Return `value` as it is kept in a samples file: a number, None, or its text, truncated to MAX_TEXT."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):  # scalars of numpy and torch
        value = value.item()
    if value is None or type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**63):
        return value  # type: ignore[no-any-return]
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... (+{len(text) - MAX_TEXT} characters)"


def listed(values: Any) -> Any:
    """Convert a one-dimensional array or tensor to a list of Python numbers. Return anything else unchanged."""
    return values.tolist() if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist") else values


# --- calling ---------------------------------------------------------------------------------------------------------


class TrainerState:
    """The part of the state of TRL's trainer that is available to reward functions here."""

    def __init__(self, known: Mapping[str, float]) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:  # called for missing attributes only
        raise AttributeError(f"trainer_state has no {name} here, only {', '.join(vars(self))}")


Item = tuple[str, Mapping[str, Any], list[int]]
"""One completion of a call: (completion, info, token ids)."""


def call(reward: Reward, context: bytes, items: Sequence[Item]) -> Answer:
    """Call the reward on `items`. Return one result each, whatever the function does, unless it ends the process.

    `context` is the pickle of (row, messages, state of the trainer). It is unpickled for every call, so each call gets
    its own deep copy: a function that changes its row cannot affect another completion. This is faster than
    copy.deepcopy.
    """
    try:
        row, messages, state = pickle.loads(context)
        log = Log(len(items), reward.logged)
        if reward.style == "trl":
            results = call_trl(reward, row, messages, TrainerState(state), items, log)
        else:
            [(completion, info, _)] = items
            if reward.style == "verl":
                results = [score_of(awaited(call_verl(reward, completion, row)), log)]
            else:
                given: dict[str, Any] = {
                    "info": dict(info),
                    "log_extra": lambda column, value: log.log_extra(column, [value]),
                    "log_metric": log.log_metric,
                }
                results = [value_of(awaited(reward.function(completion, row, **reward.given(given))))]
        return {"results": results, **log.entries()}
    except BadReturnError as error:
        return {"results": [failed(*error.args)] * len(items)}
    except BaseException as error:  # noqa: BLE001 - user code: SystemExit and KeyboardInterrupt fail this call only
        place = user_place(error, reward.file, reward.shown)
        said = described(error) + hinted(error, reward.index, reward.withheld) + (f" at {place}" if place else "")
        return {"results": [failed("exception", said)] * len(items)}


def call_trl(
    reward: Reward,
    row: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]] | None,
    state: TrainerState,
    items: Sequence[Item],
    log: Log,
) -> list[Result]:
    """Call the function on a whole group, with the argument names of TRL's GRPOTrainer.

    The function must return one number or None per completion.
    """
    prompts: list[Any] = [info["prompt"] for _, info, _ in items]
    completions: list[Any] = [completion for completion, _, _ in items]
    if messages is not None:
        prompts = [[dict(turn) for turn in messages] for _ in items]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    arguments = {name: [value] * len(items) for name, value in row.items()} | {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [ids for _, _, ids in items],
        "trainer_state": state,
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    returned = listed(awaited(reward.function(**reward.given(arguments))))
    if not isinstance(returned, list | tuple):
        raise BadReturnError("wrong_type", f"returned {type(returned).__name__}, not a list of numbers")
    if len(returned) != len(items):
        raise BadReturnError("wrong_count", f"returned {len(returned)} rewards for {len(items)} completions")
    results = []
    for value in returned:
        if isinstance(value, BaseException):  # fails this completion only
            results.append(failed("exception", described(value)))
            continue
        try:
            results.append(result(None if value is None else number(value)))
        except BadReturnError as error:  # fails this completion only
            results.append(failed(*error.args))
    return results


def call_verl(reward: Reward, completion: str, row: Mapping[str, Any]) -> Any:
    """Call compute_score(data_source, solution_str, ground_truth, extra_info) with the arguments that it accepts.

    Their values come from the columns of verl's files. As in verl, a missing `extra_info` is an empty one.
    """
    extra_info = row.get("extra_info")
    arguments = {
        "data_source": row.get("data_source"),
        "solution_str": completion,
        "extra_info": {} if extra_info is None else extra_info,
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
    """Await the result of an async function. One event loop serves all calls: clients kept between calls need it."""
    if not inspect.isawaitable(returned):
        return returned
    import asyncio  # noqa: PLC0415 - slower to import than everything else here, and most functions are not async

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
    """Return the result of style grpo: a number, None, or a mapping whose entries are summed and logged."""
    if not isinstance(returned, Mapping):
        return result(None if returned is None else number(returned))
    if not returned:
        raise BadReturnError("wrong_type", "returned an empty mapping")
    refuse_crowd(returned)
    parts = {str(key): number(value) for key, value in returned.items()}
    return result(number(sum(parts.values())), parts)


def score_of(returned: Any, log: Log) -> Result:
    """Return the result of style verl: a number, None, or a mapping with `score`.

    The other entries of the mapping are only logged: numbers as parts, the rest as columns of the samples file.
    """
    if not isinstance(returned, Mapping):
        return result(None if returned is None else number(returned))
    if "score" not in returned:
        raise BadReturnError("wrong_type", f"returned a mapping without 'score', with {list(returned)!r:.100}")
    refuse_crowd(returned)
    parts: dict[str, float] = {}
    for key, value in returned.items():
        if key == "score":
            continue
        try:
            parts[str(key)] = number(value)
        except BadReturnError:
            log.log_extra(str(key), [value])
    return result(number(returned["score"]), parts)


def refuse_crowd(returned: Mapping[Any, Any]) -> None:
    """Raise BadReturnError for more than MAX_PARTS entries: each entry becomes a metric."""
    if len(returned) > MAX_PARTS:
        raise BadReturnError(
            "wrong_type", f"returned a mapping of {len(returned)} entries; at most {MAX_PARTS} are taken"
        )


def number(value: Any) -> float:
    """Convert `value` to a finite float: Python numbers and the scalars of numpy and torch, but no arrays."""
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
    """Return the type and the message of `error` on one line."""
    try:
        message = str(error.msg if isinstance(error, SyntaxError) else error)
    except BaseException:  # noqa: BLE001 - the user's own exception class may fail to print
        message = "(its message cannot be printed)"
    message = " ".join(message.split())
    return f"{type(error).__name__}: {message[:160]}" if message else type(error).__name__


def hinted(error: BaseException, index: int, withheld: Collection[str]) -> str:
    """Return a hint, in parentheses, if the message of `error` names something that rewards do not get; else ""."""
    try:
        names = re.findall(r"\w+", str(error))
    except BaseException:  # noqa: BLE001 - see `described`
        return ""
    if kept := [name for name in dict.fromkeys(names) if name in withheld]:
        return f" ({withheld_words(kept, index)})"
    if isinstance(error, KeyError) and len(names) == 1 and names[0] in NOT_GIVEN:
        return f" (style trl gives no {names[0]})"
    return ""


def withheld_words(names: Sequence[str], index: int) -> str:
    """Return why reward number `index` does not see these environment variables, and how to pass them on."""
    every = ", ".join(names)
    return f"rewards see no {every}, which looks like a secret; rewards[{index}].env: [{every}] passes it on"


def user_place(error: BaseException, file: str, shown: str) -> str | None:
    """Return `path:line` of the last frame of `error` in the reward file or its folder, else outside this file."""
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
