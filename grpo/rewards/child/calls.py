"""Call a reward function in its style, and convert what it returns."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, NotRequired, TypedDict

from grpo.rewards.child.errors import columns_words, described, hinted, user_place
from grpo.rewards.child.loading import Reward
from grpo.rewards.child.log import Log, Loggable, listed
from grpo.rewards.child.results import BadReturnError, Result, failed, number, refuse_crowd, result

if TYPE_CHECKING:
    import asyncio

    from grpo.types import Unchecked


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
            results.append(result(None if value is None else number(value)))
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
        return result(None if returned is None else number(returned))
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
    return result(number(sum(parts.values())), parts)


def score_of(returned: Unchecked, log: Log) -> Result:
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
