"""Checks of reward functions before a run: each must load and run on real rows. Gold answers are in
`grpo.rewards.golds`."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import select
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo.config import RewardConfig, part_names
from grpo.data.columns import line, nested
from grpo.rewards.child.errors import columns_words, withheld_words
from grpo.rewards.golds import Unsampled, of_reward, run_on_gold, score
from grpo.rewards.pool import RewardPool
from grpo.rewards.process import START_S, WorkerProcess, parse_greeting, scrubbed, spec_of, withheld
from grpo.types import Failed, Moment, Prompt, Scored, Unchecked, UserError

ANY_COMPLETION = "no answer"
MISSING = re.compile(r"KeyError\b[^']*'([^']+)'")


def check_loads(
    rewards: Sequence[RewardConfig],
    files: Sequence[Path],
    *,
    columns: Sequence[Sequence[str]] | None = None,
    deadline_s: float = START_S,
) -> list[tuple[str, ...]]:
    """Load every file as a worker does, each in a separate process.

    Return, for each function, the parameters that keep their defaults because its style does not provide them.

    Args:
        columns: Columns of the rows that each reward scores. If given, functions of style trl must require no others.

    Raises UserError naming the reward, the file and the line.
    """
    unfilled = list[tuple[str, ...]]()
    for i, (reward, file) in enumerate(zip(rewards, files, strict=True)):
        where = f"rewards[{i}]: {reward.file}"
        kept_back = withheld(os.environ, reward.env)
        worker = WorkerProcess(
            [spec_of(i, reward, file, None if columns is None else columns[i], kept_back=kept_back)],
            environment=scrubbed(os.environ, reward.env),
            memory_gib=reward.memory_gib,
            log=None,
        )
        until, lines, more = time.monotonic() + deadline_s, list[bytes](), True
        try:
            while not lines and more and time.monotonic() < until:
                writers = [worker.socket] if worker.has_unsent else []
                select.select([worker.socket], writers, [], max(0.0, until - time.monotonic()))
                worker.flush()
                lines, more = worker.receive()
        finally:
            ending = worker.kill(patience_s=0.0 if more else 1.0)
        if not lines:
            what = f"took longer than {deadline_s:g} s" if more else f"ended the worker, which {ending}"
            raise UserError(f"{where}: loading it {what}")
        greeting = parse_greeting(lines[0])
        if greeting.error is not None:
            raise UserError(greeting.error)
        unfilled += greeting.unfilled
    return unfilled


def try_out(
    rewards: Sequence[RewardConfig],
    files: Sequence[Path],
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    gold_template: str,
    answer_column: str,
    unsampled: Unsampled,
    log_dir: Path,
) -> list[str]:
    """Load every reward and run it alone, unweighted, on real rows.

    Return one line per reward and data set that it is for. Before them come lines, if needed, on what the style does
    not provide and on environment variables that are withheld from the reward.

    Args:
        prompts: Description of a data set -> some of its prompts.

    Raises UserError when a file does not load, when a function fails on every row, or when a reward with `gold: true`
    does not score the gold answer above 0 and above a corrupted one.
    """
    tried = [of_reward(reward, prompts) for reward in rewards]
    unfilled = check_loads(rewards, files, columns=[_common_columns(own) for own in tried])
    lines = []
    for i, (reward, file, name) in enumerate(zip(rewards, files, part_names(rewards), strict=True)):
        where, alone = f"rewards[{i}]: {name}", dataclasses.replace(reward, weight=1.0)
        lines += [f"{name}: {words}"] if (words := style_words(reward, tried[i], unfilled[i])) else []
        asked = asked_secrets(i, reward, file)
        lines += [f"{name}: warning: {asked}"] if asked else []
        with RewardPool([alone], files=[file], workers=1, log_dir=log_dir, first=i) as pool:
            for dataset, some in tried[i].items():
                try:
                    said = run_on_any(pool, f"{where} on {dataset}", some, unsampled, reward, file)
                except UserError as error:  # the cause may be a variable that it does not see
                    raise error if not asked or asked in str(error) else UserError(f"{error} ({asked})") from error
                if reward.gold:
                    said = run_on_gold(pool, f"{where} on {dataset}", i, some, gold_template, answer_column, unsampled)
                lines.append(f"{name} on {dataset}: {said}")
    return lines


def style_words(reward: RewardConfig, prompts: Mapping[str, Sequence[Prompt]], unfilled: Sequence[str]) -> str:
    """Return what the style of `reward` does not provide on the rows of `prompts`, in words; "" if nothing.

    Args:
        unfilled: Parameters of the function that keep their defaults if the rows have no such column.
    """
    words, rows = list[str](), [prompt.row for some in prompts.values() for prompt in some]
    if reward.style == "trl":
        words.append(f"no environments; trainer_state has {', '.join(Moment().trainer_state())}")
        unfilled = [name for name in unfilled if not any(name in row for row in rows)]
    if reward.style == "verl":
        words.append("extra_info has no num_turns and rollout_reward_scores")
        for column, instead in (("data_source", "None"), ("extra_info", "empty")):
            if lacking := sum(row.get(column) is None for row in rows):
                words.append(f"{column} is {instead} on {lacking} of {len(rows)} rows, which have no such column")
    if unfilled:
        words.append(f"the default is kept for {', '.join(unfilled)}")
    return f"style {reward.style}: {'; '.join(words)}" if words else ""


def asked_secrets(i: int, reward: RewardConfig, file: Path) -> str:
    """Return a note on environment variables that reward number `i` cannot see: those of its `env` that are not set,
    and withheld ones that its file mentions. "" if none."""
    unset = [name for name in reward.env if name not in os.environ]
    notes = [f"rewards[{i}].env names {', '.join(unset)}, which is not set"] if unset else []
    named = withheld(os.environ, reward.env) & set(re.findall(r"\w+", file.read_text(errors="replace")))
    return "; ".join([*notes, *([withheld_words(sorted(named), i)] if named else [])])


def _common_columns(prompts: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """Return the columns that the first row of every data set has."""
    rows = [some[0].row for some in prompts.values()]
    return [column for column in rows[0] if all(column in row for row in rows)]


def run_on_any(
    pool: RewardPool, where: str, prompts: Sequence[Prompt], unsampled: Unsampled, reward: RewardConfig, file: Path
) -> str:
    """Run the function on an empty and an arbitrary completion of each row. Return on how many rows it ran, in words.

    After a row on which every failure is a timeout, no further rows are tried.

    Raises UserError when it fails on every row that was tried, or has no statement that returns a value.
    """
    failed, tried, scored, abstained = list[str](), 0, False, False
    for prompt in prompts:
        outcomes = score(pool, prompt, ["", ANY_COMPLETION], unsampled)
        failures = [o for o in outcomes if isinstance(o, Failed) and o.kind != "abstained"]
        tried += 1
        scored = scored or any(isinstance(o, Scored) for o in outcomes)
        abstained = abstained or any(isinstance(o, Failed) and o.kind == "abstained" for o in outcomes)
        if failures:
            detail = failures[0].detail
            failed.append(f"{prompt.where}: {failures[0].kind}: {detail}{key_hint(detail, prompt.row)}")
        if failures and all(f.kind == "timeout" for f in failures):  # more timeouts would show nothing new
            break
    if failed and not (scored or abstained):
        raise UserError(f"{where} fails on every row tried; the first: {failed[0]}")
    if failed:
        return f"warning: ran on {tried - len(failed)} of {tried} rows tried; failed on {failed[0]}"
    if not scored:
        refuse_valueless(where, reward, file)
        return (
            f"warning: it returned None (abstained) on each of the {tried} rows tried; a completion that no reward "
            "scores counts as failed"
        )
    return f"ran on {tried} rows"


def refuse_valueless(where: str, reward: RewardConfig, file: Path) -> None:
    """Raise UserError if the reward function has no statement that returns a value."""
    for node in ast.parse(file.read_bytes()).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name != reward.function:
            continue
        valued = any(isinstance(inner, ast.Return) and inner.value is not None for inner in ast.walk(node))
        if not valued and not node.decorator_list:
            raise UserError(
                f"{where}: {reward.file}:{node.lineno}: {node.name} has no return statement with a value, so it gives "
                "no reward"
            )


def key_hint(detail: str, row: Mapping[str, Unchecked]) -> str:
    """Return a hint if a key is missing that is no column of the row: `nested_hint`, or the columns."""
    missing = MISSING.search(detail)
    if not missing or missing[1] in row or "no column" in detail:
        return nested_hint(detail, row)
    return nested_hint(detail, row) or f"; the row has {columns_words(missing[1], row)}"


def nested_hint(detail: str, row: Mapping[str, Unchecked]) -> str:
    """Return the `columns` line to add, as a hint, if the missing key is inside another column; else ""."""
    missing = MISSING.search(detail)
    path = nested(missing[1], row) if missing else None
    return f"; it is inside another: {line(missing[1], path)}" if missing and path else ""
