"""A reward worker: `python -P worker.py FD PARENT MEMORY_BYTES`, started by its keeper, one call at a time.

From the parent come pickles behind their length, made by us from the data set's rows. Back goes one line of JSON per
call, in order, so that the parent unpickles nothing that a reward function touched. Each line also tells the parent
that the next call begins, which is when that call's deadline starts. Imports nothing heavy: a worker that is killed
must be replaced in a fraction of a second; and nothing of this package, as it is started by its path.
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
"""Largest file that a reward function may write."""
LOG_BYTES = 1 << 24
"""A log that has grown beyond this is cut before the next call."""
HEADER_BYTES = 8
"""Length of the pickle that follows, little endian."""
MAX_PARTS = 64
"""Entries of a mapping that a reward returns, and different names that it logs by."""
LOGGED_BYTES = 1 << 20
"""What one call may log, as JSON."""
MAX_TEXT, MAX_NAME = 2000, 100
"""Characters of a logged text, which is cut there, and of a name that something is logged by."""
GIVEN_BY_US = ("info", "log_extra", "log_metric")
GIVEN_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a function of style trl is called with besides the columns of the rows."""
GIVEN_BY_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
NOT_GIVEN = ("environments", "prompt_ids")
"""What functions written for TRL may ask for and style trl does not give: `environments` are TRL's where a trainer has
an `environment_factory`, which there is nothing like here."""

Result = dict[str, Any]
"""{"value": number | None, "parts": {key: number}} or {"failed": kind, "detail": text}, of one completion."""
Answer = dict[str, Any]
"""{"results": one Result per completion}, and where something was logged {"columns": {name: one value per completion},
"metrics": {name: [sum, count]}}."""


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
    index: int
    """In the recipe's rewards."""
    unfilled: tuple[str, ...]
    """Parameters that keep their defaults, as the style does not give them."""
    withheld: frozenset[str]
    """Environment variables that it does not see."""
    logged: set[str] = field(default_factory=set)
    """Names that it has logged by."""

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
    send(fd, {"ready": True, "unfilled": [reward.unfilled for reward in rewards]})
    while message := receive(stream):
        job = pickle.loads(message)
        for reward, items in job["calls"]:
            cut_log()
            answer = call(rewards[reward], job["context"], items)
            if os.getpid() != own:  # a copy that the function has forked: only one may answer
                os._exit(0)
            send(fd, answer | ({"changed": name} if (name := surroundings.changed()) else {}))


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
    """The place in `sys.path` after Python's own modules and before the installed packages: a `string.py` beside a
    reward file hides no module that others import, and a `utils.py` is not hidden by a package of that name."""
    own = os.path.dirname(os.__file__)
    return max((i + 1 for i, place in enumerate(sys.path) if place in (own, f"{own}/lib-dynload")), default=0)


def checked_names(
    function: Callable[..., Any], spec: Mapping[str, Any], where: str
) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """The names that `function` takes, None for any, and those of its parameters that keep their defaults, after trying
    to bind what its style gives.

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
            if name in required:  # it might bind, and then be called with other things than it means
                raise LoadError(f"{where}: {spec['name']}{signature} is written for {style}; set its style: {style}")
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
    # of style trl the columns are known before a run, and a parameter may be one
    unfilled = () if spec["style"] == "trl" and spec["columns"] is None else tuple(optional)
    return None if takes_all else frozenset(signature.parameters), unfilled


def checked_columns(required: Sequence[str], spec: Mapping[str, Any], where: str) -> list[str]:
    """Columns that a function of style trl will be given: the rows', or while they are unknown those it asks for.

    Raises LoadError for a name that will not be given.
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
    """`; did you mean ...?`, or nothing."""
    import difflib  # noqa: PLC0415 - only for a sentence that ends the run

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


# --- logging ---------------------------------------------------------------------------------------------------------


class LogError(Exception):
    """The function has logged what cannot be kept. Its text is the sentence for the user."""


class Log:
    """What one call on `count` completions logs besides rewards, by `log_extra` and `log_metric`, which are TRL's."""

    def __init__(self, count: int, names: set[str]) -> None:
        """`names`: those that the reward has logged by before; new ones are added."""
        self._count, self._names, self._left = count, names, LOGGED_BYTES
        self._columns: dict[str, list[Any]] = {}
        self._metrics: dict[str, tuple[float, int]] = {}
        self._mistake: LogError | None = None

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Take values of a column of the samples file; in the end there must be one per completion."""
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
        """Take one value of a metric, which is averaged over all that are logged in a step."""
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
        """What there is to add to the answer.

        Raises BadReturnError for a wrong call that the function has kept to itself, and for a column that lacks values.
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
        """The call, in words, after looking at the name that it logs by."""
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
    """`value` as it is kept in a samples file: a number, None, or else its text, which is cut at MAX_TEXT."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):  # scalars of numpy and torch
        value = value.item()
    if value is None or type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**63):
        return value  # type: ignore[no-any-return]
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... (+{len(text) - MAX_TEXT} characters)"


def listed(values: Any) -> Any:
    """A one-dimensional array or tensor as a list of Python's numbers, anything else as it is."""
    return values.tolist() if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist") else values


# --- calling ---------------------------------------------------------------------------------------------------------


class TrainerState:
    """What is known here of the state that TRL's trainer hands to reward functions."""

    def __init__(self, known: Mapping[str, float]) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:  # of what it has not
        raise AttributeError(f"trainer_state has no {name} here, only {', '.join(vars(self))}")


Item = tuple[str, Mapping[str, Any], list[int]]
"""(completion, info, ids of its tokens): what a call is about."""


def call(reward: Reward, context: bytes, items: Sequence[Item]) -> Answer:
    """One call on `items`; one result each, whatever the function does short of ending the process.

    `context` is the pickle of (row, messages, state of the trainer). Unpickling it for every call gives each its own
    deep copy, so that a function which changes its row cannot affect another completion; it is quicker than
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
    """A whole group, by the names that TRL's GRPOTrainer calls by: one number or None per completion."""
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
        if isinstance(value, BaseException):  # of this completion only
            results.append(failed("exception", described(value)))
            continue
        try:
            results.append(result(None if value is None else number(value)))
        except BadReturnError as error:  # of this completion only
            results.append(failed(*error.args))
    return results


def call_verl(reward: Reward, completion: str, row: Mapping[str, Any]) -> Any:
    """compute_score(data_source, solution_str, ground_truth, extra_info), by the names that it takes, from the columns
    of verl's files. As verl does, an absent `extra_info` is an empty one."""
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


def score_of(returned: Any, log: Log) -> Result:
    """Style verl: a number, None, or a mapping with `score`, whose other entries are only logged: numbers as parts, the
    rest as columns of the samples file."""
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


def hinted(error: BaseException, index: int, withheld: Collection[str]) -> str:
    """What the user may not know of the names in the message of `error`, in brackets; else nothing."""
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
    """Of environment variables that the reward number `index` does not see: why, and what to do."""
    every = ", ".join(names)
    return f"rewards see no {every}, which looks like a secret; rewards[{index}].env: [{every}] passes it on"


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
