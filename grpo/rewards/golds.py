"""Gold answers as completions: they must score above 0, and above corrupted ones."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import string
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from grpo.config import RewardConfig, part_names
from grpo.data.columns import hint, render
from grpo.rewards.groups import RewardItem
from grpo.rewards.pool import RewardPool
from grpo.suggest import first_of
from grpo.types import Failed, Moment, Prompt, Scored, UserError

T = TypeVar("T")

GOLD = "answer"
"""The name of the gold answer in data.gold_template, whatever column holds it."""
MAX_GOLDS = 20_000
"""Maximum number of rows per data set whose gold answers are scored."""
GOLDS_UNDER_WAY = 512
SHOWN_BROKEN = 3
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


def score(pool: RewardPool, prompt: Prompt, texts: Sequence[str], unsampled: Unsampled) -> list[Scored | Failed]:
    """Score `texts` as one group of completions. The pool enforces the deadlines."""
    return pool.submit([unsampled.item(prompt, text) for text in texts]).result()


def of_reward(reward: RewardConfig, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, Sequence[Prompt]]:
    """Return the data sets whose rows the reward scores."""
    return {label: some for label, some in prompts.items() if some and reward.applies_to(some[0].dataset)}


def declares_gold(file: Path) -> bool:
    """Return whether the file says `GOLD = True` at its top level.

    This means that its function compares with the row's gold answer. The file is parsed, not executed.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # loading the file will report this, with the line
        return False
    return any(ast.unparse(node) in ("GOLD = True", "GOLD: bool = True") for node in tree.body)


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
        own = of_reward(reward, prompts)
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
                    said = f"warning: {said}; not those of {first_of(unread)}"
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
                f"write as Python; name a part of it: data.gold_template='{{{answer_column}[0]}}', or turn the "
                f"test off: rewards.{i}.gold=false"
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
        gold_answer = gold_text(prompt, where, gold_template, answer_column)
        texts = [gold_answer, gold_text(prompt, where, gold_template, answer_column, corrupted=True), ""]
        outcomes = [score(pool, prompt, [text], unsampled)[0] for text in texts]  # one at a time: trl sees groups
        gold, wrong, empty = outcomes
        if isinstance(gold, Failed) and isinstance(empty, Failed) and gold.kind == empty.kind == "exception":
            raise UserError(unreadable(where, i, [f"{prompt.where}: {gold.kind}: {gold.detail}"]))
        said = [f"{o.value:g}" if isinstance(o, Scored) else f"{o.kind} ({o.detail})" for o in outcomes]
        if not (isinstance(gold, Scored) and isinstance(wrong, Scored) and wrong.value < gold.value > 0):
            raise UserError(
                f"{where} gives the gold answer {texts[0]!r} {said[0]}, the corrupted {texts[1]!r} {said[1]} and an "
                f"empty completion {said[2]} on {prompt.where}: {dict(prompt.row)!r:.300}; gold must score above 0 and "
                "above a corrupted answer (data.gold_template sets how it is written as a completion; to turn the test "
                f"off: rewards.{i}.gold=false)"
            )
        shown = shown or f"gold {said[0]}, corrupted {said[1]} on {len(prompts)} rows"
    return shown


def unreadable(where: str, i: int, rows: Sequence[str]) -> str:
    """Return the error message for rows whose gold answer makes reward number `i` fail."""
    return (
        f"{where} cannot read the gold answer of {'; '.join(rows)}; correct the data, or turn the test off: "
        f"rewards.{i}.gold=false (completions of such rows are then Failed and left out of averages)"
    )


def gold_text(prompt: Prompt, where: str, gold_template: str, answer_column: str, *, corrupted: bool = False) -> str:
    """Return the gold answer, or a corrupted one, written as a completion."""
    if answer_column not in prompt.row:
        raise UserError(
            f"{where} has gold: true, by the recipe or by GOLD in its file, and needs the gold answer, but "
            f"data.answer_column={answer_column} is no column of {prompt.where}: {dict(prompt.row)!r:.300}"
            + (hint(answer_column, prompt.row) or "; name the column that holds it: data.answer_column=COLUMN")
        )
    answer = prompt.row[answer_column]
    try:
        if corrupted:  # a number stays a number, for templates like {answer:d}
            wrong = corrupt(str(answer))
            answer = type(answer)(wrong) if isinstance(answer, int | float) else wrong
        return closing(prompt, gold_template) + render(
            gold_template, {**prompt.row, answer_column: answer, GOLD: answer}
        )
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"data.gold_template={gold_template!r} does not fit {prompt.where}: {error!r}; it may name answer, which "
            f"is the gold answer, and the columns {', '.join(prompt.row)}"
        ) from error


def closing(prompt: Prompt, gold_template: str) -> str:
    """Return "</think>" if the prompt opens a reasoning block that the template does not close, else ""."""
    begun = prompt.text.rstrip().endswith("<think>")
    return "</think>" if begun and "</think>" not in gold_template else ""


def corrupt(answer: str) -> str:
    """Return a different answer: replace each digit by the next one; without digits, each letter; else append an x."""
    if any(c in string.digits for c in answer):
        return answer.translate(NEXT_DIGIT)
    if any(c in string.ascii_letters for c in answer):
        return answer.translate(NEXT_LETTER)
    return answer + "x"
