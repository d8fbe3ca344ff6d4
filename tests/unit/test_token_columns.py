"""Values per token that a learner rank writes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch

from grpo.learner.tally import Tally
from grpo.learner.token_columns import TokenColumns
from grpo.objective.losses import Rows


def test_rows_are_written_in_the_order_of_the_completions_without_fillers(tmp_path: Path) -> None:
    columns = TokenColumns()
    columns.add(
        torch.tensor([4, -1, 2]), Rows(torch.tensor([0, 0, 2]), 3), learner_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        advantages=torch.tensor([0.5, 0.5, -1.0]), entropies=torch.tensor([0.25, 0.75, 1.5]),
        importance_weights=torch.tensor([1.0, 0.0, 2.0]),
    )  # fmt: skip
    more = TokenColumns()
    more.add(
        torch.tensor([0]), Rows(torch.tensor([0]), 1), learner_logprobs=torch.tensor([-4.0], requires_grad=True),
        advantages=torch.tensor([0.0]), entropies=torch.tensor([2.0]), importance_weights=torch.tensor([1.0]),
    )  # fmt: skip
    columns.absorb(more)
    columns.write(tmp_path / "tokens" / "step-000001-rank-0.parquet")
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["step-000001-rank-0.parquet"]
    assert pq.read_table(tmp_path / "tokens" / "step-000001-rank-0.parquet").to_pydict() == {
        "position": [0, 2, 4],
        "learner_logprobs": [[-4.0], [-3.0], [-1.0, -2.0]],
        "advantages": [[0.0], [-1.0], [0.5, 0.5]],
        "entropies": [[2.0], [1.5], [0.25, 0.75]],
        "importance_weights": [[1.0], [2.0], [1.0, 0.0]],
    }


def test_a_step_without_rows_has_an_empty_file(tmp_path: Path) -> None:
    TokenColumns().write(tmp_path / "step-000001-rank-0.parquet")
    assert pq.read_table(tmp_path / "step-000001-rank-0.parquet").num_rows == 0


def test_a_tally_without_columns_takes_none() -> None:
    tally = Tally()
    tally.absorb(Tally(token_columns=TokenColumns()))
    assert tally.token_columns is None
