"""The rows that a flat axis of tokens belongs to, and sums along them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """The row of each of N tokens. A tensor with one value per token is [N]; one with one value per row is [B].

    The tokens of a row are adjacent and in order. The rows may follow each other in any order, and a row may have no
    token. Where the rows were stored is not known here: padded rows, and rows packed end to end, give the same numbers.
    `per_row[rows.ids]` repeats a value per row at each token of the row.
    """

    ids: torch.Tensor
    """[N] int64; index of each token's row."""
    count: int
    """B"""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the tokens of each row, [N] -> [B]; 0 for a row without tokens.

        It is computed in float64, because the error of a running sum in float32 grows with the length of the row.
        """
        sums = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.ids, values.double()).to(values.dtype)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the tokens of each row, [N] -> [B]; 0 for a row without tokens."""
        return self.sum(values) / self.sum(torch.ones_like(values)).clamp(min=1)

    def last_tokens(self) -> torch.Tensor:
        """Return [N] bool, true at the last token of each row."""
        last = torch.ones_like(self.ids, dtype=torch.bool)
        last[:-1] = self.ids[:-1] != self.ids[1:]
        return last
