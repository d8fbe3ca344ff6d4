"""Turn data files into tokenized prompts, and determine the order in which they are drawn.

    read_data         config, tokenizer    -> PromptSets  read, mapped, filtered, tokenized once
    load_tokenizer    model path           -> tokenizer
    completion_texts  token ids            -> texts       the form that rewards read
    Cursor            number of prompts    -> endless shuffled stream of their indices, resumable
    MixedCursor       several data sets    -> the same, interleaved by their weights
    sample_seed       identity of a sample -> the seed of one completion

All of it runs before an engine starts, or takes negligible time. transformers, datasets and pyarrow take seconds to
import, so only the functions that need them import them. The order and the records need none of them.
"""

from __future__ import annotations

from grpo.data import columns
from grpo.data.disguise import disguise_of
from grpo.data.hub import hub_or_cache, is_path, nearest_path
from grpo.data.order import (
    Cursor,
    CursorState,
    MixedCursor,
    MixedState,
    most_in_one_draw,
    restore_cursor,
    sample_seed,
    start_cursor,
)
from grpo.data.prompts import PromptSet, fingerprint, read_data, shown
from grpo.data.rows import dataset_name
from grpo.data.tokenizer import completion_texts, end_token_ids, load_tokenizer

__all__ = [
    "Cursor",
    "CursorState",
    "MixedCursor",
    "MixedState",
    "PromptSet",
    "columns",
    "completion_texts",
    "dataset_name",
    "disguise_of",
    "end_token_ids",
    "fingerprint",
    "hub_or_cache",
    "is_path",
    "load_tokenizer",
    "most_in_one_draw",
    "nearest_path",
    "read_data",
    "restore_cursor",
    "sample_seed",
    "shown",
    "start_cursor",
]
