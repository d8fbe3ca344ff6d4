"""The samples that carry an evaluation: what is not whole is removed, and its prompts are sampled again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_compare import REWARDS, group

from grpo.config import RewardConfig
from grpo.lifecycle.evaluation_folder import Writer, finished_prompts
from grpo.run.samples import write_groups

GROUPS = [group(i, [1.0, 0.0, 1.0]) for i in range(6)]
IDS = [one.prompt.prompt_id for one in GROUPS]
PLAN: Any = SimpleNamespace(
    eval_prompts=[one.prompt for one in GROUPS],
    config=SimpleNamespace(data=SimpleNamespace(eval=SimpleNamespace(samples_of=lambda name: 3))),
)
CONFIG: Any = SimpleNamespace(
    data=SimpleNamespace(answer_column="answer"), rewards=[RewardConfig(file=f"{name}.py") for name in REWARDS]
)


def copied(samples: Path) -> None:
    shutil.copy(samples / "000001.parquet", samples / "000001 copy.parquet")


def cut(samples: Path) -> None:
    file = samples / "000001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 7), file)


def doubled(samples: Path) -> None:
    file = samples / "000001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(3, table.schema.field(3), pa.array([0, 1, 1] * 3, pa.int32())), file)


def flipped(column: str) -> Callable[[Path], None]:
    def flip(samples: Path) -> None:
        file = samples / "000001.parquet"
        names = pq.read_schema(file).names
        found = pq.ParquetFile(file).metadata.row_group(0).column(names.index(column))
        data = bytearray(file.read_bytes())
        data[found.data_page_offset + found.total_compressed_size // 2] ^= 4
        file.write_bytes(data)

    return flip


def cut_short(samples: Path) -> None:
    file = samples / "000001.parquet"
    file.write_bytes(file.read_bytes()[:-9])


def without_a_column(samples: Path) -> None:
    file = samples / "000001.parquet"
    pq.write_table(pq.read_table(file).drop_columns("completion"), file)


def of_another_evaluation(samples: Path) -> None:
    write_groups(samples / "000001.parquet", 0, [group(77, [1.0, 1.0, 1.0])], rewards=REWARDS)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (copied, "has prompts of another file"),
        (cut, "does not hold all of d:5:x"),
        (doubled, "does not hold all of d:3:x"),
        (cut_short, "cannot be read"),
        (without_a_column, "cannot be read"),
        (of_another_evaluation, "does not hold all of d:77:x"),
        *(
            (flipped(column), "cannot be read")
            for column in ("prompt_id", "sample_index", "reward_part/right", "completion")
        ),
    ],
)
def test_a_file_that_is_not_whole_is_sampled_again(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    lines: list[str] = []
    for number in range(2):
        write_groups(samples / f"{number:06d}.parquet", 0, GROUPS[number * 3 : number * 3 + 3], rewards=REWARDS)
    assert finished_prompts(PLAN, tmp_path, lines.append) == {*IDS}
    assert lines == []
    damage(samples)
    done = finished_prompts(PLAN, tmp_path, lines.append)
    assert done == {*IDS} if damage is copied else done == {*IDS[:3]}
    assert [said in line and "it is removed" in line for line in lines] == [True]
    assert len(list(samples.glob("*.parquet"))) == (2 if damage is copied else 1)
    assert finished_prompts(PLAN, tmp_path, lines.append) == done
    assert len(lines) == 1


def test_files_of_any_name_are_no_obstacle_to_the_next_one(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("000004", "mine", "4 copy"):
        (samples / f"{name}.parquet").touch()
    writer = Writer(tmp_path, CONFIG)
    writer.add(GROUPS[0])
    writer.flush()
    assert (samples / "000005.parquet").stat().st_size > 0
