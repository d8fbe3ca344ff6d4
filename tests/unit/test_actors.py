"""What actors do for their own process."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys

import pytest

from grpo.cluster.actors import cpus_per_gpu, without_collections

SCRIPT = """
import os
import torch
from grpo.cluster.actors import set_threads

set_threads(3)
print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.parametrize(
    ("resources", "threads"),
    [
        ({"CPU": 96.0, "GPU": 8.0}, 12), ({"CPU": 30.0, "GPU": 4.0}, 7), ({"CPU": 2.0, "GPU": 8.0}, 1),
        ({"CPU": 16.0}, 16), ({"GPU": 1.0}, 1),
    ],
)  # fmt: skip
def test_the_share_of_a_nodes_cpus(resources: dict[str, float], threads: int) -> None:
    assert cpus_per_gpu(resources) == threads


def test_threads_are_set_for_torch_and_for_what_is_loaded_later() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "3"]


def test_collections_go_on_after_a_failed_import() -> None:
    with contextlib.suppress(ImportError), without_collections():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
