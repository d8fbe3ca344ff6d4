"""Compare the memory predicted by `grpo plan` with the engines' memory on CPU, for random models above 100M parameters.

    python -m benchmarks.plan_memory [--tokens 2048]

Each line is one process: a learner rank (two optimizer steps of two microbatches, at each ZeRO stage and in both
dtypes) or a sampler (96 prompts of 96 tokens, with 32 tokens sampled for each). The measured figure is the peak
anonymous and shared memory, minus the memory after all imports and before loading. The mapped files of the models do
not count. glibc is configured to return freed memory (`GIVE_BACK`), so that the figure is the memory of tensors.
Otherwise its heap keeps up to a third more. No weights are synced, so the plan's transfer is left out. Needs about
16 GB. The last line is one JSON object with the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import print_result
from grpo import config as config_module
from grpo.config import Config
from grpo.planning.memory import learner_memory, sampler_memory
from grpo.planning.shapes import shape_of

SIZES = {
    "134M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "334M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16},
}
"""Qwen2 with a vocabulary of 32,000 and untied embeddings."""

LEARNERS = (
    ("float32", 0, False), ("float32", 1, False), ("float32", 2, True), ("float32", 3, False), ("bfloat16", 1, False),
    ("bfloat16", 2, True), ("bfloat16", 3, False),
)  # fmt: skip
"""dtype, ZeRO stage, gradient checkpointing."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

RECIPE = """
model: {path: MODEL, dtype: DTYPE}
data: {train: train.jsonl, max_prompt_tokens: 128}
sampling: {max_tokens: 128}
sampler: {kv_cache_gib: 0.5, max_num_seqs: 96}
learner: {zero_stage: STAGE, gradient_checkpointing: CHECKPOINTING, tokens_per_microbatch: TOKENS}
algorithm: {prompts_per_step: 8, group_size: 4}
rewards: [{file: reward.py}]
run: {steps: 1}
"""


class Peak:
    """Peak anonymous and shared memory of this process inside the `with` block, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.bytes = max(self.bytes, taken())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def taken() -> int:
    """Return the bytes of this process's memory, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def learner(config: Config, folder: Path) -> int:
    """Return the peak bytes, above the imports, while one learner rank runs two steps."""
    import numpy as np
    from torch.distributed import FileStore

    from grpo.batching import TrainingRow, rank_steps
    from grpo.learner.zero import setup
    from grpo.learner.zero.engine import Learner

    device = setup.init_process_group(config, 0, FileStore(str(folder / "store"), 1))
    gc.collect()
    before = taken()
    random = np.random.default_rng(0)
    rows = [
        TrainingRow(
            rollout_index=i, prompt_ids=random.integers(0, 32_000, 64).tolist(), prompt=i // 4, reward=float(i % 2),
            completion_ids=random.integers(0, 32_000, 65, dtype=np.int32), advantage=1.0 - 2 * (i % 2),
            sampler_logprobs=np.full(65, -10.0, dtype=np.float32), sampled_mask=np.ones(65, dtype=np.bool_),
            has_spread=True, truncated=False,
        )
        for i in range(2 * config.learner.tokens_per_microbatch // 128)
    ]  # fmt: skip
    [step] = rank_steps(
        [rows], ranks=1, tokens_per_microbatch=config.learner.tokens_per_microbatch, aggregation="token_mean",
        constant_length=128, epochs=1, kl_coef=0.0,
    )  # fmt: skip
    engine = Learner(config, 0, device, folder)
    with Peak() as peak:
        engine.step(step)
        engine.step(step)
    return peak.bytes - before


def sampler(config: Config) -> int:
    """Return the peak bytes, above the imports, while a sampler samples."""
    from grpo.sampler.vllm.engine import Sampler
    from grpo.types import SampleRequest, SamplingSettings

    gc.collect()
    before = taken()
    requests = [
        SampleRequest(index=i, token_ids=tuple((i * 331 + j * 7) % 32_000 for j in range(96)), seeds=(i,))
        for i in range(96)
    ]
    engine = Sampler(config, "shared_memory", 0)
    with Peak() as peak:
        for _ in engine.sample(
            requests, SamplingSettings(temperature=1.0, max_tokens=32, end_token_ids=(), stop=()), 1.0
        ):
            pass
    return peak.bytes - before


def make_models(folder: Path) -> None:
    """Write a model with random weights for each size."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for name, size in SIZES.items():
        torch.manual_seed(0)
        heads = size["num_attention_heads"]
        shape = {"vocab_size": 32_000, "num_key_value_heads": heads, "max_position_embeddings": 512, **size}
        settings: dict[str, Any] = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0}
        Qwen2ForCausalLM(Qwen2Config(**shape, **settings)).save_pretrained(folder / name)


def run(role: str, recipe: Path, config: Config) -> int:
    """Return the role's bytes, measured in a separate process with the environment of the engines' actors."""
    from grpo.cluster.environment import learner_environment, sampler_environment

    environment = learner_environment(config, 0) if role == "learner" else sampler_environment(config)
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--role", role, "--recipe", str(recipe)]
    done = subprocess.run(command, env=os.environ | environment | GIVE_BACK, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{role} of {recipe}:\n{done.stderr[-3000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def compare(folder: Path, tokens: int) -> None:
    """Print a line for each process (predicted, measured, ratio), then `report`."""
    make_models(folder)
    rows: list[dict[str, str | float]] = []
    for size in SIZES:
        cases = [("learner", *case) for case in LEARNERS] + [("sampler", dtype, 0, False) for dtype in
                 ("float32", "bfloat16")]  # fmt: skip
        for role, dtype, stage, checkpointing in cases:
            here = Path(tempfile.mkdtemp(dir=folder))
            stage = max(stage, 1) if dtype == "bfloat16" else stage
            values = {"MODEL": folder / size, "DTYPE": dtype, "STAGE": stage, "TOKENS": tokens}
            text = RECIPE.replace("CHECKPOINTING", str(checkpointing).lower())
            for word, value in values.items():
                text = text.replace(word, str(value))
            recipe = here / "recipe.yaml"
            recipe.write_text(text)
            config = config_module.load(recipe)
            shape = shape_of(config.model.path)
            parts = sampler_memory(config, shape, 0) if role == "sampler" else learner_memory(config, shape)[0]
            predicted = sum(value for name, value in parts.items() if name != "transfer")
            measured = run(role, recipe, config)
            what = f"{role} {dtype}" + (f" zero {stage}{' checkpointing' * checkpointing}" if role == "learner" else "")
            row = {"model": size, "process": what, "predicted_gb": predicted / 1e9, "measured_gb": measured / 1e9}
            rows.append(row | {"ratio": predicted / measured})
            print(
                f"{size} {what:38} predicted {predicted / 1e9:6.2f} GB  measured {measured / 1e9:6.2f}  "
                f"{predicted / measured:.3f}",
                flush=True,
            )
    report(rows, tokens)


def report(rows: Sequence[Mapping[str, str | float]], tokens: int) -> None:
    """Print the largest deviation of a prediction, then one JSON object with all rows (GB, predicted / measured)."""
    ratios = [float(row["ratio"]) for row in rows]
    worst = max(*ratios, *(1 / ratio for ratio in ratios))
    print(f"furthest off: {worst - 1:.1%}")
    print_result("plan_memory", tokens_per_microbatch=tokens, furthest_off=worst - 1, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="learner.tokens_per_microbatch")
    parser.add_argument("--role", choices=("learner", "sampler"), help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.role:
        config = config_module.load(parsed.recipe)
        print(learner(config, parsed.recipe.parent) if parsed.role == "learner" else sampler(config))
        return
    with tempfile.TemporaryDirectory(prefix="grpo-plan-memory-") as folder:
        compare(Path(folder), parsed.tokens)


if __name__ == "__main__":
    main()
