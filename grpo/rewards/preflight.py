"""Checks of reward functions before a run.

Each must load, run on real rows, score a gold answer above a corrupted one, and be able to read the gold answer of
every row.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import os
import re
import select
import string
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from grpo.config import RewardConfig, part_names
from grpo.data.columns import hint, line, nested, render
from grpo.rewards.child.errors import withheld_words
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.rewards.process import START_S, WorkerProcess, parse_greeting, scrubbed, spec_of, withheld
from grpo.types import Failed, Moment, Prompt, Scored, UserError

T = TypeVar("T")

ANY_COMPLETION = "no answer"
GOLD = "answer"
"""The name of the gold answer in data.gold_template, whatever column holds it."""
MAX_GOLDS = 20_000
"""Maximum number of rows per data set whose gold answers are scored."""
GOLDS_UNDER_WAY = 512
SHOWN, SHOWN_BROKEN = 10, 3
SAY_EVERY_S = 5.0
NEXT_DIGIT = str.maketrans(string.digits, "1234567890")
NEXT_LETTER = str.maketrans(string.ascii_letters, string.ascii_letters[1:] + "a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsampled:
    """Builds reward items for completions that were not sampled."""

    encode: Callable[[str], Sequence[int]]
    """Returns the ids that a sampler would have sampled for the text, including the end token."""
    moment: Moment

    def item(self, prompt: Prompt, completion: str) -> RewardItem:
        """Return the reward item of `completion`."""
        ids = self.encode(completion)
        return RewardItem(
            completion=completion,
            row=prompt.row,
            messages=prompt.messages,
            info={"token_count": len(ids), "finish_reason": "stop", "prompt": prompt.text, "step": self.moment.step},
            dataset=prompt.dataset,
            completion_ids=ids,
            moment=self.moment,
        )


def corrupt(answer: str) -> str:
    """Return a different answer: replace each digit by the next one; without digits, each letter; else append an x."""
    if any(c in string.digits for c in answer):
        return answer.translate(NEXT_DIGIT)
    if any(c in string.ascii_letters for c in answer):
        return answer.translate(NEXT_LETTER)
    return answer + "x"


def declares_gold(file: Path) -> bool:
    """Return whether the file says `GOLD = True` at its top level.

    This means that its function compares with the row's gold answer. The file is parsed, not executed.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # loading the file will report this, with the line
        return False
    return any(ast.unparse(node) in ("GOLD = True", "GOLD: bool = True") for node in tree.body)


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
    tried = [_of_reward(reward, prompts) for reward in rewards]
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
        words.append(f"the default is kept of {', '.join(unfilled)}")
    return f"style {reward.style}: {'; '.join(words)}" if words else ""


def asked_secrets(i: int, reward: RewardConfig, file: Path) -> str:
    """Return a note on environment variables that reward number `i` cannot see: those of its `env` that are not set,
    and withheld ones that its file mentions. "" if none."""
    unset = [name for name in reward.env if name not in os.environ]
    notes = [f"rewards[{i}].env names {', '.join(unset)}, which is not set"] if unset else []
    named = withheld(os.environ, reward.env) & set(re.findall(r"\w+", file.read_text(errors="replace")))
    return "; ".join([*notes, *([withheld_words(sorted(named), i)] if named else [])])


def _of_reward(reward: RewardConfig, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, Sequence[Prompt]]:
    """Return the data sets whose rows the reward scores."""
    return {label: some for label, some in prompts.items() if some and reward.applies_to(some[0].dataset)}


def _common_columns(prompts: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """Return the columns that the first row of every data set has."""
    rows = [some[0].row for some in prompts.values()]
    return [column for column in rows[0] if all(column in row for row in rows)]


def try_golds(
    rewards: Sequence[RewardConfig],
    files: Sequence[Path],
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    gold_template: str,
    answer_column: str,
    unsampled: Unsampled,
    workers: int,
    log_dir: Path,
    say: Callable[[str], None],
) -> list[str]:
    """Score the gold answers of the rows, at most MAX_GOLDS of each data set, with the rewards that have `gold: true`.

    Return one line per reward and data set: how many score above 0, and the first rows of those that do not.

    Args:
        prompts: Description of a data set -> its prompts.
        say: Called now and then with a progress line.

    Raises UserError naming the rows when a call fails: an answer that the reward cannot read is not a gold answer.
    """
    lines = []
    for i, (reward, file, name) in enumerate(zip(rewards, files, part_names(rewards), strict=True)):
        own = _of_reward(reward, prompts)
        if not reward.gold:
            continue
        alone = dataclasses.replace(reward, weight=1.0)
        with RewardPool([alone], files=[file], workers=workers, log_dir=log_dir, first=i) as pool:
            for label, some in own.items():
                where = f"rewards[{i}]: {name} on {label}"
                tried = evenly_spread(some, MAX_GOLDS)
                refuse_unfit_answers(tried, where, i, gold_template, answer_column)
                texts = (gold_text(prompt, where, gold_template, answer_column) for prompt in tried)
                unread = _golds_without_reward(pool, where, i, tried, texts, unsampled, say)
                said = f"{len(tried) - len(unread)} of {len(tried)} gold answers score above 0"
                if len(tried) < len(some):
                    said += f" (of {len(some)} rows, evenly spread)"
                if unread:
                    more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
                    said = f"warning: {said}; not those of {', '.join(unread[:SHOWN])}{more}"
                lines.append(f"{name} on {label}: {said}")
    return lines


def refuse_unfit_answers(prompts: Sequence[Prompt], where: str, i: int, gold_template: str, answer_column: str) -> None:
    """Raise UserError for answers that are empty, or that are a list or mapping which the template inserts.

    An empty answer equals an empty completion. A list or mapping would be written as Python. The error names rows.
    """
    answers = {prompt.where: prompt.row.get(answer_column) for prompt in prompts}
    empty = [
        f"{place}: it is empty" for place, answer in answers.items() if answer is not None and not str(answer).strip()
    ]
    if empty:
        raise UserError(unreadable(where, i, empty[:SHOWN_BROKEN]))
    for place, answer in answers.items():
        whole = {f"{{{answer_column}}}", f"{{{GOLD}}}"}
        if isinstance(answer, list | Mapping) and any(field in gold_template for field in whole):
            raise UserError(
                f"{where}: the answer of {place} is {answer!r:.80}, which data.gold_template={gold_template!r} would "
                f"write as Python; name a part of it: data.gold_template='{{{answer_column}[0]}}', or go on without: "
                f"rewards.{i}.gold=false"
            )


def _golds_without_reward(
    pool: RewardPool,
    where: str,
    i: int,
    prompts: Sequence[Prompt],
    texts: Iterator[str],
    unsampled: Unsampled,
    say: Callable[[str], None],
) -> list[str]:
    """Return the places of the rows whose gold answer gets no reward above 0. Bound the number of calls in flight."""
    unread, broken = list[str](), list[str]()
    pending: deque[tuple[Prompt, Future[list[Scored | Failed]]]] = deque()
    waiting, told = iter(zip(prompts, texts, strict=True)), time.monotonic()
    for done in range(len(prompts)):
        for prompt, text in itertools.islice(waiting, GOLDS_UNDER_WAY - len(pending)):
            pending.append((prompt, pool.submit([unsampled.item(prompt, text)])))
        prompt, future = pending.popleft()
        [outcome] = future.result()
        if isinstance(outcome, Failed) and outcome.kind != "abstained":
            broken.append(f"{prompt.where}: {outcome.kind}: {outcome.detail}")
            if len(broken) == SHOWN_BROKEN:
                break
        elif isinstance(outcome, Failed) or outcome.value <= 0:
            unread.append(prompt.where)
        if time.monotonic() - told > SAY_EVERY_S:
            say(f"{where}: {done + 1} of {len(prompts)} gold answers scored")
            told = time.monotonic()
    if broken:
        raise UserError(unreadable(where, i, broken))
    return unread


def evenly_spread(items: Sequence[T], count: int) -> Sequence[T]:
    """Return `count` evenly spaced items, or all of them if there are no more."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


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
            failed.append(f"{prompt.where}: {failures[0].kind}: {detail}{nested_hint(detail, prompt.row)}")
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
    tree = ast.parse(file.read_bytes())
    functions = [
        node for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == reward.function
    ]  # fmt: skip
    for function in functions:
        valued = any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))
        if not valued and not function.decorator_list:
            raise UserError(
                f"{where}: {reward.file}:{function.lineno}: {function.name} has no return statement with a value, so "
                "it gives no reward"
            )


def nested_hint(detail: str, row: Mapping[str, object]) -> str:
    """Return the `columns` line to add, as a hint, if the missing key is inside another column; else ""."""
    missing = re.search(r"KeyError\b[^']*'([^']+)'", detail)
    path = nested(missing[1], row) if missing else None
    return f"; it is inside another: {line(missing[1], path)}" if missing and path else ""


def run_on_gold(
    pool: RewardPool,
    where: str,
    i: int,
    prompts: Sequence[Prompt],
    gold_template: str,
    answer_column: str,
    unsampled: Unsampled,
) -> str:
    """Check that each gold answer scores above 0 and above a corrupted one. Return the first row's values, in words."""
    shown = ""
    for prompt in prompts:
        texts = [*gold_texts(prompt, where, gold_template, answer_column), ""]
        outcomes = [score(pool, prompt, [text], unsampled)[0] for text in texts]  # one at a time: trl sees groups
        gold, wrong, empty = outcomes
        if isinstance(gold, Failed) and isinstance(empty, Failed) and gold.kind == empty.kind == "exception":
            raise UserError(unreadable(where, i, [f"{prompt.where}: {gold.kind}: {gold.detail}"]))
        said = [f"{o.value:g}" if isinstance(o, Scored) else f"{o.kind} ({o.detail})" for o in outcomes]
        if not (isinstance(gold, Scored) and isinstance(wrong, Scored) and wrong.value < gold.value > 0):
            raise UserError(
                f"{where} gives the gold answer {texts[0]!r} {said[0]}, the corrupted {texts[1]!r} {said[1]} and an "
                f"empty completion {said[2]} on {prompt.where}: {dict(prompt.row)!r:.300}; gold must score above 0 and "
                "above a corrupted answer (how it is written as a completion: data.gold_template; not to try it: "
                f"rewards.{i}.gold=false)"
            )
        shown = shown or f"gold {said[0]}, corrupted {said[1]} on {len(prompts)} rows"
    return shown


def unreadable(where: str, i: int, rows: Sequence[str]) -> str:
    """Return the error message for rows whose gold answer makes reward number `i` fail."""
    return (
        f"{where} cannot read the gold answer of {'; '.join(rows)}; mend the data, or go on without: "
        f"rewards.{i}.gold=false (completions of such rows are then Failed, and in no average)"
    )


def score(pool: RewardPool, prompt: Prompt, texts: Sequence[str], unsampled: Unsampled) -> list[Scored | Failed]:
    """Score `texts` as one group of completions. The pool enforces the deadlines."""
    return pool.submit([unsampled.item(prompt, text) for text in texts]).result()


def gold_texts(prompt: Prompt, where: str, gold_template: str, answer_column: str) -> tuple[str, str]:
    """Return the gold answer and a corrupted one, written as completions."""
    gold = gold_text(prompt, where, gold_template, answer_column)
    answer = prompt.row[answer_column]
    wrong = corrupt(str(answer))
    try:
        # a number stays a number, for templates like {answer:d}
        other = type(answer)(wrong) if isinstance(answer, int | float) else wrong
        return gold, closing(prompt, gold_template) + render(
            gold_template, {**prompt.row, answer_column: other, GOLD: other}
        )
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise _unfit_template(gold_template, prompt, error) from error


def gold_text(prompt: Prompt, where: str, gold_template: str, answer_column: str) -> str:
    """Return the gold answer, written as a completion."""
    if answer_column not in prompt.row:
        raise UserError(
            f"{where} has gold: true, by the recipe or by GOLD in its file, and needs the gold answer, but "
            f"data.answer_column={answer_column} is no column of {prompt.where}: {dict(prompt.row)!r:.300}"
            + (hint(answer_column, prompt.row) or "; name the column that holds it: data.answer_column=COLUMN")
        )
    try:
        return closing(prompt, gold_template) + render(gold_template, {**prompt.row, GOLD: prompt.row[answer_column]})
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise _unfit_template(gold_template, prompt, error) from error


def _unfit_template(gold_template: str, prompt: Prompt, error: Exception) -> UserError:
    """Return the error for a template that a row does not fit."""
    return UserError(
        f"data.gold_template={gold_template!r} does not fit {prompt.where}: {error!r}; it may name answer, which is "
        f"the gold answer, and the columns {', '.join(prompt.row)}"
    )


def closing(prompt: Prompt, gold_template: str) -> str:
    """Return "</think>" if the prompt opens a reasoning block that the template does not close, else ""."""
    begun = prompt.text.rstrip().endswith("<think>")
    return "</think>" if begun and "</think>" not in gold_template else ""
