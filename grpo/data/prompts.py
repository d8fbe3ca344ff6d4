"""Turn the configured data sets into prompts, before any engine starts.

    read_data     every set of a run: read, remove overlaps with the evaluation, apply the limit
    read_set      one set: read, map columns, filter
    make_prompts  rows: render, tokenize once, check lengths

Each filter reports the rows that it drops: as a summary in the plan (`notes`) and one by one (`dropped`).

After this point only token ids are passed on; the text of a `Prompt` is a view. The special tokens are those that the
tokenizer adds by default (style template) or that the chat template writes (style chat), with at most one BOS at the
start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from grpo.config import Config, DataConfig, DatasetConfig
from grpo.data.columns import hint
from grpo.data.overlap import find_overlaps
from grpo.data.rows import Row, dataset_name, read_rows
from grpo.data.template import render_template, values_of
from grpo.data.tokenizer import encode, without_doubled_ends
from grpo.suggest import first_of, one_line
from grpo.types import Prompt, Unchecked, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = tuple[Mapping[str, str], ...]

SWITCH = re.compile(r"(?<!<)/(?:no_)?think\b|/system_override")
"""Words in a turn that switch the mode of a template; the template removes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of one data set, in the order of its rows."""

    name: str
    option: str
    """Option that configures it: `data.train[0]`."""
    prompts: tuple[Prompt, ...]
    """At least one."""
    dropped: tuple[str, ...]
    """`<prompt id> (<reason>)` of each row that a filter has dropped."""
    notes: tuple[str, ...]
    """Messages about the effect of the filters, for the plan."""


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[PromptSet], list[PromptSet]]:
    """Return the filtered prompts of every training set and every evaluation set.

    Raises UserError, also if two data sets have the same name.
    """

    def read(option: str, sets: Sequence[DatasetConfig]) -> list[PromptSet]:
        names: dict[str, str] = {}
        for i, dataset in enumerate(sets):
            here, name = f"{option}[{i}]", dataset.name or dataset_name(dataset.path)
            if name in names:
                raise UserError(f"{names[name]} and {here} are both called {name}; rename one of them: {here}.name")
            names[name] = here
        return [
            read_set(dataset, data=config.data, tokenizer=tokenizer, option=here)
            for dataset, here in zip(sets, names.values(), strict=True)
        ]

    held_out = read("data.eval.sets", config.data.eval.sets)
    held_out = [limited(dataset, of.limit) for dataset, of in zip(held_out, config.data.eval.sets, strict=True)]
    asked = [prompt for dataset in held_out for prompt in dataset.prompts]
    train = [without_overlaps(dataset, asked, config.data) for dataset in read("data.train", config.data.train)]
    return [limited(dataset, of.limit) for dataset, of in zip(train, config.data.train, strict=True)], held_out


def read_set(dataset: DatasetConfig, *, data: DataConfig, tokenizer: PreTrainedTokenizerBase, option: str) -> PromptSet:
    """Return the prompts of one data set, in the order of its rows, before `limit` is applied.

    Raises UserError naming the option and the row at fault.
    """
    name = dataset.name or dataset_name(dataset.path)
    if dataset.split != type(dataset)().split and Path(dataset.path).expanduser().is_file():
        raise UserError(f"{option}.split={dataset.split} has no effect: {dataset.path} is a file, which has no splits")
    rows = map_columns(read_rows(dataset.path, split=dataset.split, option=option), dataset.columns, option=option)
    dropped, notes = list[str](), list[str]()
    for column, (low, high) in dataset.between.items():
        numbers = [_number(row, column, option) for row in rows]
        kept = [row for row, number in zip(rows, numbers, strict=True) if low <= number <= high]
        if not kept:
            raise UserError(
                f"{option}.between.{column}=[{low:g}, {high:g}] leaves no row; the values lie between "
                f"{min(numbers):g} and {max(numbers):g}"
            )
        notes.append(f"kept       {len(kept)} of {len(rows)} rows of {option} by between {column} {low:g}..{high:g}")
        dropped += [
            f"{prompt_id(name, row)} ({column} {number:g})"
            for row, number in zip(rows, numbers, strict=True)
            if not low <= number <= high
        ]
        rows = kept
    made = make_prompts(rows, data=data, tokenizer=tokenizer, dataset=name, option=option)
    return dataclasses.replace(made, dropped=(*dropped, *made.dropped), notes=(*notes, *made.notes))


def map_columns(rows: Sequence[Row], columns: Mapping[str, str], *, option: str) -> list[Row]:
    """Return rows with added columns, each a format string over the row's own columns. A string that consists of one
    field gives the value itself, so lists and numbers keep their type.

    Raises UserError naming the option and the row.
    """
    mapped = []
    for row in rows:
        new: dict[str, Unchecked] = {}
        for column, template in columns.items():
            name = f"{option}.columns.{column}"
            if _is_one_field(template):
                [new[column]] = values_of(template, row, option=name)
            else:
                new[column] = render_template(template, row, option=name)
        mapped.append(dataclasses.replace(row, values={**row.values, **new}) if new else row)
    return mapped


def _is_one_field(template: str) -> bool:
    """Return whether the template is exactly one field, without format or conversion."""
    try:
        return [(text, spec, how) for text, _, spec, how in string.Formatter().parse(template)] == [("", "", None)]
    except ValueError:  # _fields reports the error
        return False


def _number(row: Row, column: str, option: str) -> float:
    """Return the number in a row's column; a text that parses as a number counts as one. Raises UserError."""
    if column not in row.values:
        raise UserError(
            f"{option}.between.{column}: {row.where} has no such column; it has {', '.join(row.values)}"
            f"{hint(column, row.values)}"
        )
    value = row.values[column]
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{option}.between.{column}: {row.where} has {value!r:.80}, which is not a number")
    return number


def without_overlaps(train: PromptSet, held_out: Sequence[Prompt], data: DataConfig) -> PromptSet:
    """Return `train` with a note about the prompts that overlap with the evaluation, and without these prompts if
    `data.contaminated` is drop.

    Raises UserError when no prompt is left.
    """
    overlaps = find_overlaps(train.prompts, held_out, data)
    if not overlaps:
        return train
    total, exact = len(train.prompts), sum(overlap.exact for overlap in overlaps)
    drop = data.contaminated == "drop"
    if drop and len(overlaps) == total:
        raise UserError(
            f"{train.option}: data.contaminated=drop leaves no prompt: all {total} overlap with data.eval.sets, the "
            f"first one with {overlaps[0].held_out.prompt_id}"
        )
    shown = first_of([f"{o.prompt.prompt_id} with {o.held_out.prompt_id}" for o in overlaps])
    by_words = f" and {len(overlaps) - exact} by {data.overlap_ngram} words in a row" if data.overlap_ngram else ""
    note = (
        f"{'dropped' if drop else 'warning':11}{len(overlaps)} of {total} prompts of {train.option} overlap with "
        f"data.eval.sets, {exact} as the same text{by_words}: {shown}"
    )
    if not drop:
        return dataclasses.replace(train, notes=(*train.notes, note))
    gone = {overlap.prompt.prompt_id for overlap in overlaps}
    return dataclasses.replace(
        train,
        prompts=tuple(prompt for prompt in train.prompts if prompt.prompt_id not in gone),
        dropped=(
            *train.dropped, *(f"{o.prompt.prompt_id} (overlaps with {o.held_out.prompt_id})" for o in overlaps)
        ),
        notes=(*train.notes, note),
    )  # fmt: skip


def limited(prompts: PromptSet, limit: int | None) -> PromptSet:
    """Return the first `limit` prompts of the set, with a note; the set itself if it has no more."""
    total = len(prompts.prompts)
    if limit is None or limit >= total:
        return prompts
    note = f"limit      the first {limit} of {total} prompts of {prompts.option}"
    return dataclasses.replace(prompts, prompts=prompts.prompts[:limit], notes=(*prompts.notes, note))


def make_prompts(
    rows: Sequence[Row], *, data: DataConfig, tokenizer: PreTrainedTokenizerBase, dataset: str, option: str
) -> PromptSet:
    """Render and tokenize all rows as `data` configures.

    Prompts longer than data.max_prompt_tokens are refused or dropped (data.overlong_prompts), never truncated.

    Args:
        dataset: short name, used in prompt ids.
        option: named in messages.

    Raises UserError naming the row or the option at fault.
    """
    if not rows:
        raise UserError(f"{option}: there are no rows")
    _refuse_pictures(rows, option)
    if data.style == "chat":
        turns: list[Messages | None] = [_messages(row, data, option) for row in rows]
        texts = _apply_chat_template(rows, turns, data, tokenizer, option)
        token_ids = encode(tokenizer, rows, texts, option, add_special_tokens=False)
    else:
        turns = [None] * len(rows)
        texts = [render_template(data.template, row, option=f"{option}: data.template") for row in rows]
        for row, text in zip(rows, texts, strict=True):
            if not text.strip():
                raise UserError(f"{option}: {row.where}: the prompt is empty")
        token_ids = without_doubled_ends(
            encode(tokenizer, rows, texts, option, add_special_tokens=True), texts[0], tokenizer
        )
    bos = tokenizer.bos_token_id
    prompts = []
    for row, text, ids, messages in zip(rows, texts, token_ids, turns, strict=True):
        if not ids:
            raise UserError(f"{option}: {row.where}: the prompt {text[:80]!r} has no tokens")
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(
                f"{option}: {row.where}: the prompt begins with two BOS tokens ({tokenizer.bos_token!r}, ids "
                f"{ids[:4]}...); take one out of the chat template, data.template or the row"
            )
        prompts.append(
            Prompt(
                prompt_id=prompt_id(dataset, row),
                token_ids=tuple(ids),
                text=text,
                row=row.values,
                messages=messages,
                dataset=dataset,
                where=row.where,
            )
        )
    return _within_limit(prompts, data, dataset, option)


def prompt_id(dataset: str, row: Row) -> str:
    """Return `<data set>:<row index>:<content hash>`; the content is the row with its mapped columns."""
    canonical = json.dumps(row.values, sort_keys=True, separators=(",", ":"), default=str)
    return f"{dataset}:{row.index}:{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the hex SHA-256 of prompt ids and token ids in order: equal means the same tokens from the same rows."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt_id, prompt.token_ids]).encode() + b"\n")
    return digest.hexdigest()


def shown(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], *, ids: bool) -> list[str]:
    """Return lines that show a prompt: the text that its ids decode to, with special tokens, and the tokens that end a
    completion. Invisible white space is written as an escape."""
    text = tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ended_by = ", ".join(f"{end} {tokenizer.convert_ids_to_tokens(end)!r}" for end in ends) or "nothing"
    lines = re.findall(r"[^\n]*\n|[^\n]+", str(text))
    return [
        f"first      {prompt.prompt_id}, {len(prompt.token_ids)} tokens; a completion ends on {ended_by}",
        *(f"           {_visible(line)}" for line in lines),
        *([f"ids        {list(prompt.token_ids)}"] if ids else []),
    ]


def _visible(line: str) -> str:
    body, end = line.removesuffix("\n"), "\\n" if line.endswith("\n") else ""
    kept = body.rstrip(" ")
    written = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    return written + "\\x20" * (len(body) - len(kept)) + end


def _messages(row: Row, data: DataConfig, option: str) -> Messages:
    """Return the turns of a row: its messages column, or the system prompt followed by the rendered template."""
    if data.messages_column is None:
        text = render_template(data.template, row, option=f"{option}: data.template")
        user = {"role": "user", "content": text}
        return (user,) if data.system_prompt is None else ({"role": "system", "content": data.system_prompt}, user)
    column = data.messages_column
    if column not in row.values:
        raise UserError(
            f"{option}: data.messages_column: {row.where} has no column {column!r}; it has {', '.join(row.values)}"
            f"{hint(column, row.values)}"
        )
    turns = row.values[column]
    place = f"{option}: data.messages_column: {row.where}: column {column!r}"
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{place} must be a list of {{role, content}} turns, not {turns!r:.80}")
    out: list[Mapping[str, str]] = []
    for i, turn in enumerate(turns):
        # Columnar files give every turn the keys of all turns, null for a key that the turn lacks.
        given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
        if set(given) != {"role", "content"} or not all(isinstance(v, str) for v in given.values()):
            raise UserError(
                f"{place}: turn {i} must have the strings role and content and nothing else, not {turn!r:.80}"
            )
        out.append(given)
    if out[-1]["role"] == "assistant":
        raise UserError(f"{place} ends with an assistant turn; the prompt would contain the answer")
    return tuple(out)


def _refuse_pictures(rows: Sequence[Row], option: str) -> None:
    """Raise UserError for images and sound (bytes, or objects that `datasets` has decoded): prompts are text only."""
    for row in rows:
        for column, value in row.values.items():
            if _holds_bytes(value):
                raise UserError(
                    f"{option}: {row.where}: column {column!r} holds bytes or an image, and prompts are text; to "
                    f"train on the text alone, empty it: {option}.columns.{column}="
                )


def _holds_bytes(value: Unchecked) -> bool:
    if isinstance(value, Mapping | list):
        return any(_holds_bytes(part) for part in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, bytes | bytearray) or type(value).__module__.split(".")[0] in ("PIL", "torchcodec")


def _apply_chat_template(
    rows: Sequence[Row],
    turns: Sequence[Messages | None],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
) -> list[str]:
    if not tokenizer.chat_template:
        raise UserError("data.style=chat needs a tokenizer with a chat template; this one has none, so use template")
    asked = list[str]()

    def today(form: str) -> str:
        """Format data.date for templates that write today's date."""
        asked.append(form)
        return datetime.fromisoformat(data.date or "2000-01-01").strftime(form)

    texts = []
    for row, messages in zip(rows, turns, strict=True):
        chat = [dict(turn) for turn in messages or ()]
        try:
            text = str(
                tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, strftime_now=today)
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{option}: {row.where}: the chat template refuses the turns: {one_line(error)}") from error
        for turn in messages or ():
            content = turn["content"]
            if turn["role"] == "assistant":  # templates remove the reasoning from earlier answers
                content = content.rpartition("</think>")[2]
            content = SWITCH.sub("", content)
            if not any(form.strip() in text for form in (content, turn["content"], json.dumps(turn["content"])[1:-1])):
                raise UserError(
                    f"{option}: {row.where}: the chat template leaves out the {turn['role']} turn {content[:60]!r}; "
                    "write it into a turn that it keeps"
                )
        texts.append(text)
    if asked and data.date is None:
        raise UserError(
            "model.path: the chat template writes today's date, so the prompts would be others tomorrow, and a resumed "
            f"run would be another; give a day to write: data.date={datetime.now().date()}"
        )
    if data.date is not None and not asked:
        raise UserError(f"data.date={data.date} has no effect: the chat template writes no date; leave it out")
    return texts


def _within_limit(prompts: list[Prompt], data: DataConfig, name: str, option: str) -> PromptSet:
    limit = data.max_prompt_tokens
    long = [prompt for prompt in prompts if len(prompt.token_ids) > limit]
    kept = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= limit)
    if long and (data.overlong_prompts == "refuse" or not kept):
        longest = max(len(prompt.token_ids) for prompt in long)
        listed = first_of([f"{prompt.where} ({len(prompt.token_ids)} tokens)" for prompt in long])
        way_out = "" if not kept else ", or data.overlong_prompts=drop to leave them out"
        raise UserError(
            f"{option}: {len(long)} of {len(prompts)} prompts are longer than data.max_prompt_tokens={limit}: "
            f"{listed}; set it to {longest} to hold all of them{way_out}"
        )
    dropped = tuple(f"{prompt.prompt_id} ({len(prompt.token_ids)} tokens)" for prompt in long)
    note = f"dropped    {len(long)} prompts of {option} with more than {limit} tokens: {first_of(dropped)}"
    return PromptSet(name=name, option=option, prompts=kept, dropped=dropped, notes=(note,) if long else ())
