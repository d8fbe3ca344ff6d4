"""The tokenizer of a model folder, and the ids that end a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.data.disguise import disguise_of
from grpo.data.hub import hub_or_cache, is_path, nearest_path
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
