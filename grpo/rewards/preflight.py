"""Reward functions before a run: they must load, run on real rows, and tell a gold answer from a corrupted one."""

from __future__ import annotations

import dataclasses
import os
import select
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo.config import RewardConfig, part_names
from grpo.rewards.pool import RewardItem, RewardPool
from grpo.rewards.process import START_S, WorkerProcess, parse_greeting, scrubbed, spec_of
from grpo.types import Failed, Scored, UserError

ANY_COMPLETION = "no answer"
NEXT_DIGIT = str.maketrans(string.digits, "1234567890")
NEXT_LETTER = str.maketrans(string.ascii_letters, string.ascii_letters[1:] + "a")


def corrupt(answer: str) -> str:
    """An answer that is surely another: each digit plus one, else each letter the next one, else an x behind it."""
    if any(c in string.digits for c in answer):
        return answer.translate(NEXT_DIGIT)
    if any(c in string.ascii_letters for c in answer):
        return answer.translate(NEXT_LETTER)
    return answer + "x"


def check_loads(
    rewards: Sequence[RewardConfig],
    files: Sequence[Path],
    *,
    columns: Sequence[str] | None = None,
    deadline_s: float = START_S,
) -> None:
    """Load every file as a worker does, each in a process of its own.

    `columns`: those of the rows; with them, functions of style trl are checked to ask for no other.

    Raises UserError naming the reward, the file and the line.
    """
    for i, (reward, file) in enumerate(zip(rewards, files, strict=True)):
        where = f"rewards[{i}]: {reward.file}"
        worker = WorkerProcess(
            [spec_of(i, reward, file, columns)],
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
        load_error = parse_greeting(lines[0])
        if load_error is not None:
            raise UserError(load_error)


def try_out(
    rewards: Sequence[RewardConfig],
    files: Sequence[Path],
    samples: Mapping[str, Sequence[RewardItem]],
    *,
    gold_template: str,
    answer_column: str,
    log_dir: Path,
) -> list[str]:
    """Load every reward and run it by itself, unweighted, on real rows. Returns a line about each.

    Args:
        samples: data set (the option that names it) -> items of some of its rows; their completions are ignored.

    Raises UserError when a file does not load, a function fails on every row, or a reward with `gold: true` does not
    score the gold answer above 0 or scores a corrupted one as highly.
    """
    columns = next((list(items[0].row) for items in samples.values() if items), None)
    check_loads(rewards, files, columns=columns)
    lines = []
    for i, (reward, file, name) in enumerate(zip(rewards, files, part_names(rewards), strict=True)):
        where, alone = f"rewards[{i}]: {name}", dataclasses.replace(reward, weight=1.0)
        with RewardPool([alone], files=[file], workers=1, log_dir=log_dir) as pool:
            scored = sum(run_on_any(pool, f"{where} on {option}", items) for option, items in samples.items())
            every = [item for items in samples.values() for item in items]
            if reward.gold:
                lines.append(f"{name}: {run_on_gold(pool, where, every, gold_template, answer_column)}")
            elif scored:
                lines.append(f"{name}: ran on {len(every)} rows")
            else:
                lines.append(f"{name}: warning: it returned None (abstained) on each of the {len(every)} rows tried")
    return lines


def run_on_any(pool: RewardPool, where: str, samples: Sequence[RewardItem]) -> int:
    """The function must not fail on every row, whatever it thinks of an empty and an arbitrary completion.

    Returns the number of completions that got a number; the rows behind the first of them are not tried.
    """
    first: Failed | None = None
    abstained = False
    for sample in samples:
        outcomes = score(pool, sample, ["", ANY_COMPLETION])
        scored = sum(isinstance(o, Scored) for o in outcomes)
        if scored:
            return scored
        failures = [o for o in outcomes if isinstance(o, Failed) and o.kind != "abstained"]
        abstained = abstained or len(failures) < len(outcomes)
        first = first or next(iter(failures), None)
        if failures and all(f.kind == "timeout" for f in failures):  # waiting as long on every row tells no more
            break
    if first is not None and not abstained:
        raise UserError(f"{where} fails on every row tried; the first: {first.kind}: {first.detail}")
    return 0


def run_on_gold(
    pool: RewardPool, where: str, samples: Sequence[RewardItem], gold_template: str, answer_column: str
) -> str:
    """On every row the gold answer must score above 0, and above a corrupted one. Returns the first row's values."""
    shown = ""
    for sample in samples:
        texts = [*gold_texts(sample, where, gold_template, answer_column), ""]
        outcomes = [score(pool, sample, [text])[0] for text in texts]  # one at a time: trl sees groups
        gold, wrong, _ = outcomes
        said = [f"{o.value:g}" if isinstance(o, Scored) else f"{o.kind} ({o.detail})" for o in outcomes]
        if not (isinstance(gold, Scored) and isinstance(wrong, Scored) and wrong.value < gold.value > 0):
            raise UserError(
                f"{where} gives the gold answer {texts[0]!r} {said[0]}, the corrupted {texts[1]!r} {said[1]} and an "
                f"empty completion {said[2]} on row {dict(sample.row)!r:.300}; gold must score above 0 and above a "
                "corrupted answer (how it is written as a completion: data.gold_template)"
            )
        shown = shown or f"gold {said[0]}, corrupted {said[1]} on {len(samples)} rows"
    return shown


def score(pool: RewardPool, sample: RewardItem, texts: Sequence[str]) -> list[Scored | Failed]:
    """The outcomes of `texts` as one group of completions of the sample's prompt. The pool keeps the deadlines."""
    return pool.submit([dataclasses.replace(sample, completion=text) for text in texts]).result()


def gold_texts(sample: RewardItem, where: str, gold_template: str, answer_column: str) -> tuple[str, str]:
    """The gold answer and a corrupted one, written as completions."""
    if answer_column not in sample.row:
        raise UserError(
            f"{where} has gold: true and needs the gold answer, but data.answer_column={answer_column} is no column "
            f"of the row {dict(sample.row)!r:.300}"
        )
    answer = sample.row[answer_column]
    wrong = corrupt(str(answer))
    try:
        # a number stays one, for templates like {answer:d}
        other = {**sample.row, answer_column: type(answer)(wrong) if isinstance(answer, int | float) else wrong}
        return gold_template.format(**sample.row), gold_template.format(**other)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"data.gold_template={gold_template!r} does not fit the rows: {error!r}") from error
