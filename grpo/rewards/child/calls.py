"""Call a reward function in its style, and check and convert what it returns and logs."""

from __future__ import annotations

import inspect
import json
import math
import pickle
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, NoReturn, NotRequired, TypedDict

from grpo.rewards.child.errors import columns_words, described, hinted, user_place
from grpo.rewards.child.loading import Reward

if TYPE_CHECKING:
    import asyncio

    from grpo.types import Unchecked

MAX_PARTS = 64
"""Maximum number of entries in a mapping that a reward returns, and of different names that it logs."""
LOGGED_BYTES = 1 << 20
"""Maximum size of what one call may log, as JSON."""
MAX_TEXT, MAX_NAME = 2000, 100
"""Maximum characters of a logged text (longer ones are truncated) and of a logged name."""
Loggable = str | float | bool | None
"""A value in a samples file."""


class Returned(TypedDict):
    """Result of one completion. `value`: None if the reward abstains."""

    value: float | None
    parts: Mapping[str, float]


class Failure(TypedDict):
    """Failure of one completion. `failed`: its kind."""

    failed: str
    detail: str


Result = Returned | Failure


class BadReturnError(Exception):
    """A function returned something that is not a reward. `args`: (kind, detail)."""


class Answer(TypedDict):
    """Answer to a call."""

    results: list[Result]
    """One for each completion."""
    columns: NotRequired[dict[str, list[Loggable]]]
    """Name -> one logged value for each completion."""
    metrics: NotRequired[dict[str, tuple[float, int]]]
    """Name -> (sum, count) of the logged values."""
    changed: NotRequired[str]
    """What the call has changed in the worker's process."""


class Info(TypedDict):
    """Properties of a completion, for functions of style grpo."""

    token_count: int
    finish_reason: str
    prompt: str
    """Text of the prompt."""
    step: int


Item = tuple[str, Info, list[int]]
"""One completion of a call: (completion, info, token ids)."""


class TrainerState:
    """The part of the state of TRL's trainer that is available to reward functions here."""

    def __init__(self, known: Mapping[str, float]) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> NoReturn:  # called for missing attributes only
        raise AttributeError(f"trainer_state has no {name} here, only {', '.join(vars(self))}")


def call(reward: Reward, context: bytes, items: Sequence[Item]) -> Answer:
    """Call the reward on `items`. Return one result each, whatever the function does, unless it ends the process.

    `context` is the pickle of (row, messages, state of the trainer). It is unpickled for every call, so each call gets
    its own deep copy: a function that changes its row cannot affect another completion. This is faster than
    copy.deepcopy.
    """
    try:
        row, messages, state = pickle.loads(context)
        log = Log(len(items), reward.logged)
        if reward.spec["style"] == "trl":
            results = call_trl(reward, row, messages, TrainerState(state), items, log)
        else:
            [(completion, info, _)] = items
            if reward.spec["style"] == "verl":
                results = [score_of(awaited(call_verl(reward, completion, row)), log)]
            else:
                given: dict[str, Unchecked] = {
                    "info": dict(info),
                    "log_extra": lambda column, value: log.log_extra(column, [value]),
                    "log_metric": log.log_metric,
                }
                results = [value_of(awaited(reward.function(completion, row, **reward.given(given))))]
        return {"results": results, "columns": log.columns(), "metrics": log.metrics}
    except BadReturnError as error:
        return {"results": [failed(*error.args)] * len(items)}
    except BaseException as error:  # noqa: BLE001 - user code: SystemExit and KeyboardInterrupt fail this call only
        spec = reward.spec
        place = user_place(error, spec["file"], spec["shown"], reward.defined)
        said = described(error) + hinted(error, spec["index"], spec["withheld"]) + (f" at {place}" if place else "")
        return {"results": [failed("exception", said)] * len(items)}


def call_trl(
    reward: Reward,
    row: Mapping[str, Unchecked],
    messages: Sequence[Mapping[str, str]] | None,
    state: TrainerState,
    items: Sequence[Item],
    log: Log,
) -> list[Result]:
    """Call the function on a whole group, with the argument names of TRL's GRPOTrainer.

    The function must return one number or None per completion.
    """
    prompts: list[Unchecked] = [info["prompt"] for _, info, _ in items]
    completions: list[Unchecked] = [completion for completion, _, _ in items]
    if messages is not None:
        prompts = [[dict(turn) for turn in messages] for _ in items]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    arguments: dict[str, Unchecked] = {
        **{name: [value] * len(items) for name, value in row.items()},
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
            results.append(result(value))
        except BadReturnError as error:  # fails this completion only
            results.append(failed(*error.args))
    return results


def call_verl(reward: Reward, completion: str, row: Mapping[str, Unchecked]) -> Unchecked:
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
            has = columns_words("ground_truth", row)
            raise BadReturnError(
                "exception", f"the row has no reward_model.ground_truth, ground_truth or answer; it has {has}"
            )
    return reward.function(**reward.given(arguments))


def value_of(returned: Unchecked) -> Result:
    """Return the result of style grpo: a number, None, or a mapping whose entries are summed and logged."""
    if not isinstance(returned, Mapping):
        return result(returned)
    if not returned:
        raise BadReturnError("wrong_type", "returned an empty mapping")
    refuse_crowd(returned)
    parts = {}
    for key, value in returned.items():
        try:
            parts[str(key)] = number(value, key)
        except BadReturnError as error:
            kind, detail = error.args
            if "score" in returned and key != "score":
                detail += "; style: verl takes score as the reward and logs the others"
            raise BadReturnError(kind, detail) from error
    return result(sum(parts.values()), parts)


def score_of(returned: Unchecked, log: Log) -> Result:
    """Return the result of style verl: a number, None, or a mapping with `score`.

    The other entries of the mapping are only logged: numbers as parts, the rest as columns of the samples file.
    """
    if not isinstance(returned, Mapping):
        return result(returned)
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
    return result(number(returned["score"], "score"), parts)


def awaited(returned: Unchecked) -> Unchecked:
    """Await the result of an async function. One event loop serves all calls: clients kept between calls need it."""
    if not inspect.isawaitable(returned):
        return returned
    import asyncio  # noqa: PLC0415 - slower to import than everything else here, and most functions are not async

    global _runner
    if _runner is None:
        _runner = asyncio.Runner()

    async def wait() -> Unchecked:
        return await returned

    return _runner.run(wait())


_runner: asyncio.Runner | None = None


def result(value: Unchecked, parts: Mapping[str, float] | None = None) -> Result:
    """Return the result of one completion. Raises BadReturnError unless `value` is a finite number or None."""
    return {"value": None if value is None else number(value), "parts": parts or {}}


def failed(kind: str, detail: str) -> Result:
    return {"failed": kind, "detail": detail}


def refuse_crowd(returned: Sized) -> None:
    """Raise BadReturnError for more than MAX_PARTS entries: each entry becomes a metric."""
    if len(returned) > MAX_PARTS:
        raise BadReturnError(
            "wrong_type", f"returned a mapping of {len(returned)} entries; at most {MAX_PARTS} are taken"
        )


def number(value: Unchecked, key: str | None = None) -> float:
    """Convert `value` to a finite float: Python numbers and the scalars of numpy and torch, but no arrays.

    Raises BadReturnError naming `key`, the key of the returned mapping that has the value, if there is one.
    """
    of = "" if key is None else f" for {key!r:.80}"
    is_array = getattr(value, "ndim", 0) != 0
    if is_array or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise BadReturnError("wrong_type", f"returned {type(value).__name__} {value!r:.80}{of}, not a number")
    try:
        converted = float(value)
    except OverflowError as error:
        raise BadReturnError("not_finite", f"returned an integer beyond the range of floats{of}") from error
    if not math.isfinite(converted):
        raise BadReturnError("not_finite", f"returned {converted}{of}")
    return converted


class LogError(Exception):
    """The function has logged something invalid. The message is written for the user."""


class Log:
    """Values that one call on `count` completions logs besides rewards, with TRL's `log_extra` and `log_metric`."""

    def __init__(self, count: int, names: set[str]) -> None:
        """Start an empty log. `names`: names that the reward has logged before. New ones are added to it."""
        self._count, self._names, self._left = count, names, LOGGED_BYTES
        self._columns: dict[str, list[Loggable]] = {}
        self.metrics: dict[str, tuple[float, int]] = {}
        """Name -> (sum, count) of the values."""
        self._mistake: LogError | None = None

    def log_extra(self, column: str, values: Unchecked) -> None:
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
        total, count = self.metrics.get(name, (0.0, 0))
        if not math.isfinite(total + added):
            raise self._wrong(f"{where} was given numbers whose sum is not finite")
        self.metrics[name] = (total + added, count + 1)

    def columns(self) -> dict[str, list[Loggable]]:
        """Return name -> one value for each completion.

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
        return self._columns

    def _named(self, function: str, name: Unchecked) -> str:
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


def loggable(value: Unchecked) -> Loggable:
    """Return `value` as it is kept in a samples file: a number, None, or its text, truncated to MAX_TEXT."""
    if getattr(value, "ndim", None) == 0 and callable(item := getattr(value, "item", None)):  # scalars of numpy, torch
        value = item()
    if value is None or isinstance(value, bool) or type(value) is float:
        return value
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... (+{len(text) - MAX_TEXT} characters)"


def listed(values: Unchecked) -> Unchecked:
    """Convert a one-dimensional array or tensor to a list of Python numbers. Return anything else unchanged."""
    return values.tolist() if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist") else values
