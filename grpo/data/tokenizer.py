"""The tokenizer of a model folder: load it, encode prompts, decode completions, and the ids that end a completion."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers.models import BPE

from grpo.data.disguise import disguise_of
from grpo.data.hub import hub_or_cache, is_path, nearest_path
from grpo.data.rows import Row
from grpo.suggest import one_line
from grpo.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Tags that rewards read; some tokenizers declare them special."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_tokenizer(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder in Hugging Face layout, or of a hub id. Raises UserError naming model.path."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    local = Path(path).expanduser()
    if local.is_dir():
        if not any(next(local.glob(pattern), None) for pattern in TOKENIZER_FILES):
            raise UserError(f"model.path: folder {path} has no tokenizer (no tokenizer.json, vocabulary or model file)")
    elif local.exists():
        raise UserError(f"model.path: {path} is a file; it must be a folder in Hugging Face layout, or a hub id")
    elif is_path(path):
        raise UserError(f"model.path: folder {path} does not exist{nearest_path(local)}")
    for file in sorted(local.glob("*")) if local.is_dir() else []:
        if file.suffix in (".json", ".model", ".jinja", ".txt") and file.is_file() and (found := disguise_of(file)):
            raise UserError(f"model.path: {file} is {found}")
    # A damaged tokenizer may raise any exception: from its JSON, its class, or the Rust library (a bare Exception).
    remark = ""
    try:
        if local.is_dir():
            return AutoTokenizer.from_pretrained(str(local), trust_remote_code=trust_remote_code)
        with hub_or_cache() as remark:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"model.path: the tokenizer of {path} cannot be loaded{remark}: {one_line(error)}") from error


def encode(
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


def without_doubled_ends(
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


def completion_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int]]) -> list[str]:
    """Decode completions without special tokens except `TAGS`: without `</think>` each would look unfinished."""
    named, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    kept = {i: token.content for i, token in added.items() if token.content in TAGS and (token.special or i in named)}
    if not kept:
        return list(tokenizer.batch_decode(token_ids, skip_special_tokens=True))
    texts = []
    for ids in token_ids:
        tags = [k for k, token_id in enumerate(ids) if token_id in kept]
        starts, ends = [0, *(k + 1 for k in tags)], [*tags, len(ids)]
        parts = tokenizer.batch_decode(
            [list(ids[start:end]) for start, end in zip(starts, ends, strict=True)], skip_special_tokens=True
        )
        texts.append(parts[0] + "".join(kept[ids[k]] + part for k, part in zip(tags, parts[1:], strict=True)))
    return texts


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model_path: str, extra: Sequence[int]) -> tuple[int, ...]:
    """Return all ids that end a completion, sorted: the tokenizer's EOS, the EOS ids in the model's
    generation_config.json and config.json, and `extra` (sampling.stop_token_ids).

    Only ids that the files state count: a config class would set a missing eos_token_id to the default of its
    architecture, which may be an ordinary token of this tokenizer. Raises UserError when no id ends a completion, and
    for an extra id that the tokenizer does not have.
    """
    known = set(tokenizer.get_vocab().values()) if extra else set()
    for token_id in extra:
        if token_id not in known:
            raise UserError(f"sampling.stop_token_ids: {token_id} is not a token of {model_path}")
    ids = {*extra, *_as_ids(tokenizer.eos_token_id), *_model_eos(model_path)}
    if not ids:
        raise UserError(
            f"model.path: neither the tokenizer nor the configs of {model_path} name an end token; "
            "give one in sampling.stop_token_ids"
        )
    return tuple(sorted(ids))


def _model_eos(model_path: str) -> set[int]:
    """Return the EOS ids in generation_config.json and config.json (also in its text_config); none if absent."""
    from transformers import GenerationConfig, PreTrainedConfig  # noqa: PLC0415

    readers: dict[str, Callable[[str], dict[str, Any]]] = {
        "generation_config.json": lambda path: GenerationConfig.from_pretrained(path).to_dict(),
        "config.json": lambda path: PreTrainedConfig.get_config_dict(path)[0],
    }
    local = Path(model_path).expanduser()
    found: set[int] = set()
    for name, read in readers.items():
        if local.is_dir():
            if not (local / name).is_file():
                continue
            try:
                values = read(str(local))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"model.path: {local / name} cannot be read: {one_line(error)}") from error
        else:
            with hub_or_cache():
                try:
                    values = read(model_path)
                except OSError:  # the repository has no such file; load_tokenizer has reported a missing repository
                    continue
        found |= _as_ids(values.get("eos_token_id")) | _as_ids((values.get("text_config") or {}).get("eos_token_id"))
    return found


def _as_ids(value: int | list[int] | tuple[int, ...] | None) -> set[int]:
    if value is None:
        return set()
    return {int(v) for v in value} if isinstance(value, list | tuple) else {int(value)}
