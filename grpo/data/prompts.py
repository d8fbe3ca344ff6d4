"""Turn rows into prompts: render, tokenize once and check lengths, before any engine starts.

After this point only token ids are passed on; the text of a `Prompt` is a view. This module decides all special tokens:
the ids are what the tokenizer adds by default (style template) or what the chat template writes (style chat), with at
most one BOS at the start.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import jinja2
from tokenizers.models import BPE

from grpo.config import DataConfig
from grpo.data.columns import hint
from grpo.data.rows import Row
from grpo.data.template import render_template
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
        token_ids = _encode(tokenizer, rows, texts, option, add_special_tokens=False)
    else:
        turns = [None] * len(rows)
        texts = [render_template(data.template, row, option=f"{option}: data.template") for row in rows]
        for row, text in zip(rows, texts, strict=True):
            if not text.strip():
                raise UserError(f"{option}: {row.where}: the prompt is empty")
        token_ids = _without_doubled_ends(
            _encode(tokenizer, rows, texts, option, add_special_tokens=True), texts[0], tokenizer
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


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], texts: list[str], option: str, *, add_special_tokens: bool
) -> list[list[int]]:
    """Return the ids of each text. Raise UserError for a character that the tokenizer cannot represent.

    An unknown token counts as a representation, because it is the tokenizer's own. Without one, some tokenizers raise,
    some return None as the id, and some drop the character.
    """
    options = {
        "add_special_tokens": add_special_tokens,
        "padding": False,
        "truncation": False,
        "return_attention_mask": False,
        "verbose": False,
    }
    # The tokenizers library raises a bare Exception, the classes written in Python raise exceptions of any type.
    try:
        encoded = tokenizer(texts, **options)
    except Exception as error:
        for row, text in zip(rows, texts, strict=True):
            try:
                tokenizer([text], **options)
            except Exception as inner:
                raise UserError(f"{option}: {row.where}: cannot be tokenized: {one_line(inner)}") from inner
        raise UserError(f"{option}: the prompts cannot be tokenized: {one_line(error)}") from error
    token_ids: list[list[int]] = encoded["input_ids"]
    for i, ids in enumerate(token_ids):
        if None in ids:
            raise UserError(f"{option}: {rows[i].where}: the tokenizer has no id for a part of {texts[i][:80]!r}")
    left_out = _left_out(tokenizer, texts)
    if left_out:
        added = re.compile("|".join(re.escape(t) for t in sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
        for row, text in zip(rows, texts, strict=True):
            lost = sorted(left_out.intersection(added.sub("", text)))
            if lost:
                raise UserError(
                    f"{option}: {row.where}: the tokenizer leaves out {''.join(lost)!r}, which it cannot represent"
                )
    return token_ids


def _left_out(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> set[str]:
    """Return the characters of `texts` that are encoded as no tokens, or without some of their bytes.

    Only BPE without an unknown token and without all 256 bytes drops characters. It does so whatever the context, so
    each distinct character is tested once. The result may include characters that occur only in special tokens. White
    space and unprintable characters are not tested: normalizers remove them on purpose.
    """
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.model, BPE):
        return set()
    characters = sorted(c for c in set().union(*texts) if c.isprintable() and not c.isspace())
    if not characters:
        return set()
    encoded = tokenizer(characters, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    decoded = tokenizer.batch_decode(encoded)
    return {
        character
        for character, ids, text in zip(characters, encoded, decoded, strict=True)
        if not ids or ("\ufffd" in text and character != "\ufffd")
    }


def _without_doubled_ends(
    token_ids: list[list[int]], first_text: str, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Remove two kinds of tokens that a tokenizer may add to a text and that a prompt must not have.

    - A BOS before a text that itself begins with BOS: the row or the template already supplies it.
    - An EOS after the text (add_eos_token): it marks the end of the text, which the completion must continue. It is
      removed rather than refused, because the setting belongs to the tokenizer's files and serves training on whole
      texts. An EOS at the end of the text itself stays: there it is a separator of the format.
    """
    bare = tokenizer([first_text], add_special_tokens=False, padding=False, truncation=False)["input_ids"][0]
    full = token_ids[0]
    front = next((k for k in range(len(full) - len(bare) + 1) if full[k : k + len(bare)] == bare), None)
    if front is None:
        raise UserError("model.path: the tokenizer splits a text differently when it adds special tokens")
    prefix, suffix = full[:front], full[front + len(bare) :]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = len(suffix) if eos is not None and eos in suffix else 0
    out = []
    for ids in token_ids:
        start = 1 if bos is not None and prefix == [bos] and ids[1:2] == [bos] else 0
        out.append(ids[start : len(ids) - ends])
    return out


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
