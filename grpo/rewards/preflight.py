"""Reward functions before a run: they must load, run on real rows, and tell a gold answer from a corrupted one."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from pathlib import Path

from grpo.config import RewardConfig
from grpo.rewards.pool import RewardItem, RewardPool, part_name
from grpo.types import Failed, Scored, UserError


def corrupt(answer: str) -> str:
    """An answer that is surely another: each digit plus one, else each letter the next one, else an x behind it."""
    if any(c.isdigit() for c in answer):
        return "".join(str((int(c) + 1) % 10) if c in string.digits else c for c in answer)
    letters = string.ascii_letters
    if any(c in letters for c in answer):
        return "".join(letters[(letters.index(c) + 1) % len(letters)] if c in letters else c for c in answer)
    return answer + "x"


def try_out(
    rewards: Sequence[RewardConfig],
    files: Sequence[Path],
    samples: Sequence[RewardItem],
    *,
    gold_template: str,
    answer_column: str,
    log_dir: Path,
) -> list[str]:
    """Run every reward on `samples` (items of real rows, any completion). Returns a line about each.

    Raises UserError when a file does not load, a function fails on every row, or a reward with `gold: true` does not
    score the gold answer above 0 or scores a corrupted one as highly.
    """
    lines = []
    for i, reward in enumerate(rewards):
        alone = dataclasses.replace(reward, weight=1.0)
        with RewardPool([alone], files=[files[i]], workers=1, log_dir=log_dir) as pool:
            try:
                lines.append(_try_one(pool, reward, samples, gold_template, answer_column))
            except UserError as error:
                raise UserError(str(error).replace("rewards[0]", f"rewards[{i}]", 1)) from error
    return lines


def _try_one(
    pool: RewardPool, reward: RewardConfig, samples: Sequence[RewardItem], gold_template: str, answer_column: str
) -> str:
    name, deadline = part_name(reward), reward.timeout_s * 4 + 120
    outcomes = []
    for sample in samples:
        texts = ["", "no answer"] + (_gold_texts(sample, gold_template, answer_column) if reward.gold else [])
        items = [dataclasses.replace(sample, completion=text) for text in texts]
        outcomes.append((sample, texts, pool.submit(items).result(timeout=deadline)))
    failures = [o for _, _, group in outcomes for o in group if isinstance(o, Failed) and o.kind != "abstained"]
    if failures and len(failures) == sum(len(group) for _, _, group in outcomes):
        raise UserError(
            f"rewards[0]: {name} fails on every row tried; the first: {failures[0].kind}: {failures[0].detail}"
        )
    if not reward.gold:
        return f"{name}: ran on {len(samples)} rows"
    for sample, texts, group in outcomes:
        _judge_gold(name, sample, texts, group)
    shown = outcomes[0][2]
    assert isinstance(shown[2], Scored)
    assert isinstance(shown[3], Scored)
    return f"{name}: gold {shown[2].value:g}, corrupted {shown[3].value:g}, checked on {len(samples)} rows"


def _gold_texts(sample: RewardItem, gold_template: str, answer_column: str) -> list[str]:
    """The gold answer and a corrupted one, written as completions."""
    if answer_column not in sample.row:
        raise UserError(
            f"data.answer_column={answer_column}: the rows have no such column but {', '.join(sample.row)}; a reward "
            "with gold: true needs the gold answer"
        )
    answer = str(sample.row[answer_column])
    try:
        return [gold_template.format(**{**sample.row, answer_column: a}) for a in (answer, corrupt(answer))]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"data.gold_template={gold_template!r} does not fit the rows: {error!r}") from error


def _judge_gold(name: str, sample: RewardItem, texts: Sequence[str], group: Sequence[Scored | Failed]) -> None:
    gold, wrong = group[2], group[3]
    if isinstance(gold, Failed):
        raise UserError(
            f"rewards[0]: {name} fails on the gold answer {texts[2]!r} of row {dict(sample.row)}: {gold.detail}"
        )
    wrong_value = wrong.value if isinstance(wrong, Scored) else 0.0
    if gold.value <= 0 or wrong_value >= gold.value:
        raise UserError(
            f"rewards[0]: {name} gives the gold answer {texts[2]!r} {gold.value:g} and the corrupted {texts[3]!r} "
            f"{wrong_value:g} on row {dict(sample.row)}; gold must score above 0 and above a corrupted answer"
        )
