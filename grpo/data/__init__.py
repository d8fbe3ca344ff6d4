"""Data files to tokenized prompts, and the order in which they are used.

    read_rows       path or hub id   -> list[Row]       every row parsed, none skipped
    load_tokenizer  model path       -> tokenizer
    make_prompts    rows             -> PromptSet       tokenized once, length-checked, fingerprinted
    Cursor          number of prompts -> endless shuffled stream of their indices, resumable
    sample_seed     who is sampled   -> the seed of one completion

Everything here runs before an engine starts, or costs nothing. transformers, datasets and pyarrow take seconds to
import, so they are imported in the functions that need them: the order and the records alone need none of them.
"""

from __future__ import annotations

from grpo.data.hub import hub_or_cache, is_path
from grpo.data.order import Cursor, sample_seed
from grpo.data.prompts import PromptSet, make_prompts, render_template
from grpo.data.rows import Row, dataset_name, read_rows
from grpo.data.tokenizer import end_token_ids, load_tokenizer

__all__ = [
    "Cursor",
    "PromptSet",
    "Row",
    "dataset_name",
    "end_token_ids",
    "hub_or_cache",
    "is_path",
    "load_tokenizer",
    "make_prompts",
    "read_rows",
    "render_template",
    "sample_seed",
]
