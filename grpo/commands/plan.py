"""`grpo plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from grpo import config as config_module
from grpo.planning.report import plan_lines
from grpo.planning.shapes import gpu_of
from grpo.types import ExitCode


def plan_command(parsed: argparse.Namespace, overrides: Sequence[str]) -> ExitCode:
    """Print the predicted memory and time. Return DONE if the recipe fits, else USAGE."""
    gpu = gpu_of(parsed.gpu, memory=parsed.gpu_memory, tflops=parsed.tflops, bandwidth=parsed.bandwidth)
    text, fits = plan_lines(
        config_module.load(parsed.recipe, overrides), gpu=gpu, nodes=parsed.nodes,
        gpus_per_node=parsed.gpus_per_node, prompt=parsed.prompt_tokens, completion=parsed.completion_tokens,
    )  # fmt: skip
    print(text)
    return ExitCode.DONE if fits else ExitCode.USAGE
