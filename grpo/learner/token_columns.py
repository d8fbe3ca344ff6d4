"""Values per trained token of a step, written to tokens/ in the run folder by each rank: they never pass the driver."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from grpo.objective.losses import Rows

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("learner_logprobs", pa.list_(pa.float32())),
        ("advantages", pa.list_(pa.float32())),
        ("entropies", pa.list_(pa.float32())),
        ("importance_weights", pa.list_(pa.float32())),
    ]
)
"""`position`: the row of the completion in the samples file of the step. Each list has a value per trained token, at
the weights of the token's first update in the step."""


@dataclass(slots=True)
class TokenColumns:
    """The values of this rank's completions in one step."""

    _parts: list[pa.Table] = field(default_factory=list)

    def add(
        self,
        positions: torch.Tensor,
        rows: Rows,
        *,
        learner_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        entropies: torch.Tensor,
        importance_weights: torch.Tensor,
    ) -> None:
        """Add the rows of a microbatch.

        Args:
            positions: [B] int64; position of each row's completion in the step, -1 for a filler row, which is left out.
            learner_logprobs, advantages, entropies, importance_weights: [N], the tokens of `rows`.
        """
        lengths = torch.bincount(rows.ids, minlength=rows.count).cpu()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().numpy()
        columns = [
            pa.ListArray.from_arrays(offsets, values.detach().float().cpu().numpy())
            for values in (learner_logprobs, advantages, entropies, importance_weights)
        ]
        table = pa.table([pa.array(positions.numpy()), *columns], schema=SCHEMA)
        self._parts.append(table.filter(pa.array((positions >= 0).numpy())))

    def absorb(self, other: TokenColumns) -> None:
        """Append the rows of `other`."""
        self._parts += other._parts

    def write(self, file: Path) -> None:
        """Write the rows, in the order of the completions, as a parquet file: whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        table = pa.concat_tables([SCHEMA.empty_table(), *self._parts]).sort_by("position")
        partial = file.with_name(f"{file.name}.partial")
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, file)
