"""The section data: data sets, prompts, and evaluation on held-out data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from omegaconf import MISSING

from grpo.config.declare import Bound, OnlyWith, OnResume, OnSubmit

HELD_OUT = OnlyWith("data.eval.sets")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """A data set; see docs/data.md."""

    path: Annotated[str, OnResume.CONTENT, OnSubmit.SHARED_OR_HUB] = MISSING
    """A .jsonl or .parquet file, a folder in `datasets` layout, or a Hugging Face Hub id. `PATH:config` selects one of
    several configs."""
    split: Annotated[str, OnResume.CONTENT] = MISSING
    """Split of a folder or hub data set; files have none."""
    name: Annotated[str | None, OnResume.CONTENT] = None
    """Name of the data set in metrics, prompt ids and `rewards[i].sets`. None: the name of the file or folder, or the
    hub id."""
    columns: Annotated[dict[str, str], OnResume.CONTENT] = field(default_factory=dict)
    """Columns to add: name -> Python format string over the columns of the row. A format string that is exactly one
    field gives the value itself, not its text."""
    between: Annotated[dict[str, list[float]], OnResume.CONTENT] = field(default_factory=dict)
    """Range filters: column -> [lowest, highest]. Rows whose number is outside this range are dropped."""
    limit: Annotated[int | None, OnResume.CONTENT, Bound(ge=1)] = None
    """Use only the first N rows that remain after all filters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSetConfig(DatasetConfig):
    """A data set to train on; see docs/data.md.

    data.train=train.jsonl
    data.train[0].limit=1000
    'data.train=[{path: easy.jsonl, weight: 3}, {path: hard.jsonl, weight: 1}]'
    """

    split: Annotated[str, OnResume.CONTENT] = "train"
    """Split of a folder or hub data set; files have none."""
    weight: Annotated[float | None, Bound(gt=0)] = None
    """Relative share of the prompts that are drawn from this data set. Set it for all data sets or for none: without
    weights, the rows of all data sets form one pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSetConfig(DatasetConfig):
    """A held-out data set; see docs/data.md.

    data.eval.sets=test.jsonl
    'data.eval.sets=[{path: test.jsonl}, {path: aime.jsonl, samples_per_prompt: 16}]'
    """

    split: Annotated[str, OnResume.CONTENT] = "test"
    """Split of a folder or hub data set; files have none."""
    samples_per_prompt: Annotated[int | None, Bound(ge=1)] = None
    """Completions sampled per prompt: the k of avg@k. None: `data.eval.samples_per_prompt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data; see docs/evaluation.md.

    data.eval.sets=test.jsonl data.eval.every=10 data.eval.samples_per_prompt=4
    data.eval.sets=test.jsonl data.eval.temperature=0
    """

    sets: list[EvalSetConfig] = field(default_factory=list)
    """Held-out data sets, or the path of a single one. Empty: no evaluation."""
    every: Annotated[int, Bound(ge=0), OnResume.FREE] = 0
    """Evaluate every N steps, in addition to before the first step and after the last. 0: only those two."""
    samples_per_prompt: Annotated[int, Bound(ge=1)] = 1
    """Completions sampled per prompt: the k of avg@k."""
    temperature: Annotated[float, Bound(ge=0)] = 1.0
    """Sampling temperature. 0 samples greedily, which is allowed in evaluation but not in training."""
    top_p: Annotated[float, Bound(gt=0, le=1)] = 1.0
    """Sample only from the most probable tokens whose cumulative probability reaches this value. 1: off."""
    top_k: Annotated[int, Bound(ge=0)] = 0
    """Sample only from the N most probable tokens. 0: off."""
    min_p: Annotated[float, Bound(ge=0, le=1)] = 0.0
    """Exclude tokens whose probability is below this fraction of the most probable token's. 0: off."""
    max_tokens: Annotated[int | None, Bound(ge=1)] = None
    """Maximum length of a completion, in tokens. None: `sampling.max_tokens`."""
    by: tuple[str, ...] = ()
    """Columns, such as level or subject, whose values also get separate evaluation results."""

    def samples_of(self, name: str) -> int:
        """Return the number of completions per prompt for the data set called `name`."""
        own = next((each.samples_per_prompt for each in self.sets if each.name == name), None)
        return own or self.samples_per_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts: the data sets, and how a row becomes a prompt; see docs/data.md.

    data.train=train.jsonl 'data.template={question} Answer:'
    data.style=chat 'data.system_prompt=Think first.' data.max_prompt_tokens=512
    """

    train: list[TrainSetConfig] = MISSING
    """Training data sets, or the path of a single one."""
    style: Literal["template", "chat"] = "template"
    """`template`: the rendered template is the prompt. `chat`: the rendered template is a user turn, formatted with the
    tokenizer's chat template."""
    template: str = "{question}"
    """Python format string over the columns of the row. It gives the prompt, or the user turn with `style: chat`."""
    system_prompt: Annotated[str | None, OnlyWith("style", "chat")] = None
    """System prompt, the first turn of a chat prompt."""
    messages_column: Annotated[str | None, OnlyWith("style", "chat")] = None
    """With `style: chat`, read the turns from this column instead of rendering the template."""
    date: Annotated[str | None, OnlyWith("style", "chat")] = None
    """Fixed date, such as 2026-01-31, for chat templates that insert today's date: otherwise the prompts would change
    from day to day."""
    answer_column: Annotated[str, OnResume.FREE] = "answer"
    """Column of the gold answer, used when rewards are tested before the run."""
    gold_template: Annotated[str, OnResume.FREE] = "{answer}"
    """Python format string that turns a gold answer into a completion, used when rewards are tested before the run."""
    max_prompt_tokens: Annotated[int, Bound(ge=1)] = 1024
    """Maximum length of a prompt, in tokens."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """Refuse the run if prompts exceed `max_prompt_tokens`, or drop these prompts. They are listed either way and never
    truncated."""
    contaminated: Annotated[Literal["report", "drop"], HELD_OUT, OnResume.CONTENT] = "report"
    """Report training prompts that overlap with an evaluation prompt, or drop them."""
    overlap_ngram: Annotated[int, Bound(ge=0), HELD_OUT, OnResume.CONTENT] = 13
    """Two prompts overlap if their texts are identical or share this many consecutive words. 0: only if identical."""
    seed: Annotated[int, Bound(ge=0, le=2**32 - 1)] = 0
    """Seed of the shuffled order of prompts; independent of `run.seed`."""
    eval: Annotated[EvalConfig, HELD_OUT] = field(default_factory=EvalConfig)
