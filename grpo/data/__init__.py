"""Turn data files into tokenized prompts, and determine the order in which they are drawn.

    read_set          a data set's options -> PromptSet   read, mapped, filtered, tokenized once
    read_rows         path or hub id       -> list[Row]   all rows parsed, none skipped
    load_tokenizer    model path           -> tokenizer
    completion_texts  token ids            -> texts       the form that rewards read
    make_prompts      rows                 -> PromptSet   tokenized once, length checked
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
from grpo.data.mixing import MixedCursor, MixedState, most_in_one_draw, restore_cursor, start_cursor
from grpo.data.order import Cursor, CursorState, sample_seed
from grpo.data.overlap import find_overlaps
from grpo.data.prompts import PromptSet, fingerprint, make_prompts, shown
from grpo.data.rows import Row, dataset_name, read_rows
from grpo.data.sets import limited, read_set, without_overlaps
from grpo.data.template import map_columns, render_template
from grpo.data.tokenizer import completion_texts, end_token_ids, load_tokenizer

__all__ = [
    "Cursor",
    "CursorState",
    "MixedCursor",
    "MixedState",
    "PromptSet",
    "Row",
    "columns",
    "completion_texts",
    "dataset_name",
    "disguise_of",
    "end_token_ids",
    "find_overlaps",
    "fingerprint",
    "hub_or_cache",
    "is_path",
    "limited",
    "load_tokenizer",
    "make_prompts",
    "map_columns",
    "most_in_one_draw",
    "nearest_path",
    "read_rows",
    "read_set",
    "render_template",
    "restore_cursor",
    "sample_seed",
    "shown",
    "start_cursor",
    "without_overlaps",
]
