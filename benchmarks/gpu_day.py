"""Measure all figures of docs/gpu.md on a GPU, in pieces. Resumable.

    python -m benchmarks.gpu_day                   # all pieces that are not done yet; each takes at most 8 minutes
    python -m benchmarks.gpu_day kernels smollm2   # these, even if they are done
    python -m benchmarks.gpu_day --toy             # on CPU at toy sizes, in a few minutes: tests the code, no figures

Each piece is a separate process with a time limit. Its figures are written to OUT/<piece>.json with the machine, the
versions and the commit. The page OUT/README.md is then written from all existing pieces. A failed piece is reported
with its exit code or time limit, and the remaining pieces run.

    kernels      bfloat16 products in TFLOP/s, a device copy in GB/s, attention against its plain form, checksums
    test_...     pytest -m gpu, one piece for the transfer of weights and one for each run on a GPU
    arithmetic   recipes/arithmetic_cpu.yaml on the GPU: accuracy, seconds of each part of a step
    smollm2      recipes/smollm2_word_problems.yaml on the GPU: the same, tokens/s, sync GB/s, peak and planned memory
    rows_16k     the learner alone: Qwen3-0.6B's shape, random weights, one row of 16,384 tokens per microbatch
    rows_64k     the same with 65,536 tokens; both: tokens/s, MFU, peak memory

For the last two, prime-rl published these figures for one H100 with FlashAttention 3 and recomputation: 11.9k and 10.2k
tokens/s, 12.5 and 19.6 GiB.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.result import Figure, print_result

if TYPE_CHECKING:
    import torch

    from grpo.batching import TrainingRow
    from grpo.learner.zero.engine import Learner
    from grpo.planning.shapes import Gpu

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = "tests/gpu/test_cuda_runs.py"
LIMIT_S = 480
Figures = dict[str, Figure]

PUBLISHED: dict[str, Figures] = {
    "rows_16k": {"tokens_per_s": 11_900, "peak_gib": 12.5}, "rows_64k": {"tokens_per_s": 10_200, "peak_gib": 19.6},
}  # fmt: skip
"""Figures from prime-rl's documentation."""

QWEN3_06B = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TOY_QWEN3 = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """Settings of the pieces."""

    device: str
    toy: bool
    work: Path

    def size(self, whole: int, toy: int) -> int:
        return toy if self.toy else whole


# --- pieces ----------------------------------------------------------------------------------------------------------


def kernels(day: Day) -> Figures:
    import torch

    from grpo.sync.weights import checksum

    device = torch.device("cuda" if day.device == "gpu" else "cpu")
    n, elements = day.size(8192, 128), day.size(1 << 29, 1 << 16)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_s = timed(lambda: a @ b, device)
    source = torch.empty(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s = timed(lambda: target.copy_(source), device)
    checksum_s = timed(lambda: checksum(source), device)
    return {
        "bfloat16_tflops": 2 * n**3 / product_s / 1e12,
        "copy_gb_per_s": 2 * source.numel() * 2 / copy_s / 1e9,
        "checksum_gb_per_s": source.numel() * 2 / checksum_s / 1e9,
        "attention_error": attention_error(device, day.size(512, 16)),
    }


def attention_error(device: torch.device, length: int) -> float:
    """Return the largest difference between torch's causal attention in bfloat16 and its plain form in float32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, length, 64, device=device) for _ in range(3))
    scores = (q @ k.transpose(-1, -2)) / 8
    hidden = torch.ones(length, length, device=device, dtype=torch.bool).triu(1)
    plain = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    fast = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True)
    return float((fast.float() - plain).abs().max())


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of five calls, after two for warm-up."""
    import torch

    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def tests(day: Day, names: Sequence[str]) -> Figures:
    """Run tests of GPU_TESTS that need a GPU. At toy sizes they are only collected."""
    only = ["--collect-only"] if day.toy else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *(f"{GPU_TESTS}::{name}" for name in names), *only],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout[-5000:], flush=True)
    if done.returncode:
        raise SystemExit(f"the tests ended with {done.returncode}")
    return {"last_line": done.stdout.strip().splitlines()[-1]}


def arithmetic(day: Day) -> Figures:
    overrides = ["learner.zero_stage=2", f"run.steps={day.size(125, 2)}"]
    if day.toy:
        overrides += ["algorithm.prompts_per_step=4", "optimizer.warmup_steps=1"]
    return train(day, "arithmetic.py", "arithmetic_cpu.yaml", overrides)


def smollm2(day: Day) -> Figures:
    if day.toy:  # the toy model runs the same code; the real one takes minutes on CPU
        return train(
            day, "arithmetic.py", "arithmetic_cpu.yaml",
            ["model.dtype=bfloat16", "learner.zero_stage=2", "run.steps=2", "algorithm.prompts_per_step=4",
             "optimizer.warmup_steps=1"],
        )  # fmt: skip
    return train(day, "smollm2.py", "smollm2_word_problems.yaml", ["run.steps=30", "learner.zero_stage=2"])


def train(day: Day, maker: str, recipe: str, overrides: Sequence[str]) -> Figures:
    """Create the recipe's model and data, train, and return figures from the run's metrics."""
    from grpo import config as config_module
    from grpo.planning.estimate import Lengths, estimate
    from grpo.planning.shapes import GPUS, shape_of

    subprocess.run([sys.executable, f"recipes/{maker}"], cwd=ROOT, check=True)
    options = [*overrides, f"run.dir={day.work / 'runs'}", "run.name=run", "run.tensorboard=false"]
    if day.device == "gpu":
        options += ["cluster.device=gpu", "sampler.gpu_memory_utilization=0.4"]
    shutil.rmtree(day.work / "runs", ignore_errors=True)
    with PeakMemory(day.device) as peak:
        done = subprocess.run([sys.executable, "-m", "grpo", "train", f"recipes/{recipe}", *options], cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"grpo train recipes/{recipe} ended with {done.returncode}")
    folder = day.work / "runs" / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"]]
    last = steps[len(steps) // 5 :]  # the first steps include compilation and capture

    def median(name: str) -> float:
        return statistics.median(line[name] for line in last)

    accuracies = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    config = config_module.load(ROOT / "recipes" / recipe, options)
    lengths = Lengths(prompt=100, completion=20, longest=config.sampling.max_tokens)
    gpu = this_gpu(day.device) or GPUS["h100"]
    plan = estimate(config, shape_of(config.model.path), gpu, lengths, nodes=1, gpus_per_node=1)
    planned = [sum(part.values()) for part in (plan.learner, plan.sampler, plan.sync)]
    names = ("step_s", "sample_s", "update_s", "sync_s", "reward_s", "idle_s")
    return {
        "steps": len(steps), "accuracy_before": accuracies[0], "accuracy_after": accuracies[-1],
        **{name: median(f"time/{name}") for name in names},
        "tokens_per_s": median("tokens/per_second"), "learner_tflops": median("perf/learner_tflops_per_rank"),
        "sync_gb_per_s": statistics.median(line["sync/bytes"] / line["sync/seconds"] for line in last) / 1e9,
        "mismatch_rms": median("mismatch/rms"), "probe_q90_over_noise": max(
            line["sync/probe_q90"] / line["sync/noise_q90"] for line in steps),
        "peak_gib": peak.gib, "planned_gib": max(planned) / 2**30 if day.device == "gpu" else None,
    }  # fmt: skip


class PeakMemory:
    """Peak used memory of the first GPU inside the `with` block, as reported by nvidia-smi; None on CPU."""

    def __init__(self, device: str) -> None:
        self._on, self._end = device == "gpu", threading.Event()
        self.gib: float | None = None

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        while self._on and not self._end.wait(0.5):
            said = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
            self.gib = max(self.gib or 0.0, float(said) / 1024)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def rows_16k(day: Day) -> Figures:
    return learner_alone(day, day.size(16_384, 64))


def rows_64k(day: Day) -> Figures:
    return learner_alone(day, day.size(65_536, 128))


def learner_alone(day: Day, length: int) -> Figures:
    """Run three driver steps of four rows with `length` tokens each. Return figures from the median of the last two."""
    import torch
    from torch.distributed import destroy_process_group

    from grpo.batching import rank_steps
    from grpo.planning.shapes import shape_of

    settings = TOY_QWEN3 if day.toy else QWEN3_06B
    learner = start_learner(day, settings, length)
    rows = random_rows(length, settings["vocab_size"])
    [step] = rank_steps(
        [rows], ranks=1, tokens_per_microbatch=length, aggregation="token_mean", constant_length=length, epochs=1,
        kl_coef=0.0,
    )  # fmt: skip
    on_gpu, gpu = learner.device.type == "cuda", this_gpu(day.device)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        learner.step(step)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    tokens_per_s = len(rows) * length / statistics.median(seconds[1:])
    shape = shape_of(str(day.work / "model"))
    attention = 2 * shape.layers * shape.queries * length  # half of it is masked
    completions = sum(len(row.completion_ids) for row in rows)  # only they are projected to the vocabulary
    flops = 3 * (2 * shape.body + attention + 2 * shape.embedding * completions / (len(rows) * length))
    implementation = learner.models.policy.module.config._attn_implementation
    destroy_process_group()
    return {
        "tokens_per_s": tokens_per_s, "attention": implementation,
        "mfu": tokens_per_s * flops / gpu.flops if gpu else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }  # fmt: skip


def start_learner(day: Day, settings: Mapping[str, int], length: int) -> Learner:
    """Return a learner of one rank with random weights, for rows of `length` tokens. The model is in `day.work`."""
    from grpo.cluster.environment import learner_environment

    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    import torch
    from torch.distributed import HashStore
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from grpo import config as config_module

    model = day.work / "model"
    torch.manual_seed(0)
    config_of = Qwen3Config(**settings, tie_word_embeddings=True, max_position_embeddings=2 * length, eos_token_id=0)
    Qwen3ForCausalLM(config_of).to(torch.bfloat16).save_pretrained(model)
    recipe = day.work / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {model}}}\ndata: {{train: x.jsonl, max_prompt_tokens: {length // 2}}}\n"
        f"sampling: {{max_tokens: {length - length // 2}}}\nrewards: [{{file: x.py}}]\nrun: {{steps: 3}}\n"
        f"learner: {{tokens_per_microbatch: {length}, gradient_checkpointing: true}}\n"
        f"algorithm: {{prompts_per_step: 2, group_size: 2}}\ncluster: {{device: {day.device}}}\n"
    )
    config = config_module.load(recipe, [])
    os.environ.update(learner_environment(config, 0))
    from grpo.learner.zero import setup
    from grpo.learner.zero.engine import Learner

    device = setup.init_process_group(config, 0, HashStore())
    return Learner(config, 0, device, day.work)


def random_rows(length: int, vocabulary: int) -> list[TrainingRow]:
    """Return four rows of two prompts with `length` tokens each, the second half of them completion."""
    import numpy as np

    from grpo.batching import TrainingRow

    random = np.random.default_rng(0)
    half = length // 2
    return [
        TrainingRow(
            rollout_index=i, prompt=i // 2, prompt_ids=random.integers(1, vocabulary, half).tolist(),
            completion_ids=random.integers(1, vocabulary, length - half, dtype=np.int32), reward=float(i % 2),
            sampler_logprobs=np.full(length - half, -np.log(vocabulary), dtype=np.float32),
            sampled_mask=np.ones(length - half, dtype=np.bool_), has_spread=True, truncated=False,
            advantage=1.0 - 2 * (i % 2),
        )
        for i in range(4)
    ]  # fmt: skip


def this_gpu(device: str) -> Gpu | None:
    """Return the data sheet of this machine's first GPU; None on CPU and for a GPU that `grpo plan` does not know."""
    import torch

    from grpo.planning.shapes import GPUS, known_as

    if device != "gpu":
        return None
    found = torch.cuda.get_device_properties(0)
    name = known_as(str(found.name), float(found.total_memory))
    return GPUS[name] if name else None


BOTH, ALONE = "test_engines_that_share_a_gpu_give_the_same_run_asleep_and_awake", "test_a_run_on_one_shared_gpu"
TESTS = {
    "test_transfer": (
        "test_checksum_on_the_device_sees_swaps", "test_cuda_ipc_carries_every_bit_to_another_process",
    ),
    "test_asleep": (f"{BOTH}[true]",), "test_awake": (f"{BOTH}[false]",),
    "test_float32": (f"{ALONE}[float32]",), "test_bfloat16": (f"{ALONE}[bfloat16]",),
}  # fmt: skip
"""Piece -> its tests: at most one run, which starts vLLM and DeepSpeed."""

PIECES: dict[str, Callable[[Day], Figures]] = {
    "kernels": kernels, **{piece: functools.partial(tests, names=names) for piece, names in TESTS.items()},
    "arithmetic": arithmetic, "smollm2": smollm2, "rows_16k": rows_16k, "rows_64k": rows_64k,
}  # fmt: skip


# --- the day ---------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    """Return the machine, date, commit and versions of the figures."""
    import torch

    from grpo.run import folder as run_folder

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device == "gpu" else f"{os.cpu_count()} CPU cores"
    versions = {name: str(version) for name, version in run_folder.versions().items()}
    return {"device": name, "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), **versions}


def run_piece(name: str, day_arguments: Sequence[str], out: Path) -> str:
    """Run one piece in a separate process. Return "" or the reason of its failure. Figures are in OUT/<piece>.json."""
    print(f"--- {name}", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--piece", name, "--out", str(out), *day_arguments]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        end_group(process.pid)
        process.wait()
        return f"it took more than {LIMIT_S} s"
    return f"it ended with {code}" if code else ""


def end_group(group: int, patience_s: float = 150.0) -> None:
    """Terminate all processes of a group, wait until they have ended, and kill the remaining ones.

    The wait is needed because a run finishes its step first, and the next piece needs the GPU.
    """
    deadline = time.monotonic() + patience_s
    os.killpg(group, signal.SIGTERM)
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.5)
    os.killpg(group, signal.SIGKILL)


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all pieces, as Markdown."""
    lines = ["# Figures of a GPU", "", "Made by `python -m benchmarks.gpu_day`.", ""]
    for name, result in results.items():
        on = result["machine"]
        lines += [f"## {name}", "", f"{on['device']}, {on['date']}, commit {on['commit'] or 'unknown'}.", ""]
        lines += ["| figure | measured | published |", "|---|---|---|"]
        for figure, value in result["figures"].items():
            shown = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
            lines.append(f"| {figure} | {shown} | {PUBLISHED.get(name, {}).get(figure, '')} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").split("\n\n", 1)[1],
    )  # fmt: skip
    parser.add_argument("pieces", nargs="*", choices=[[], *PIECES], help="run these, also where they are done")
    parser.add_argument("--toy", action="store_true", help="on CPU at toy sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    device = "cpu" if a.toy else "gpu"
    a.out.mkdir(parents=True, exist_ok=True)
    if a.piece:
        with tempfile.TemporaryDirectory() as work:
            figures = PIECES[a.piece](Day(device=device, toy=a.toy, work=Path(work)))
        result = {"machine": machine(device), "figures": figures}
        (a.out / f"{a.piece}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        return 0
    if not a.toy:
        import torch

        from grpo.cluster.cuda import check_machine
        from grpo.types import UserError

        try:
            check_machine(torch.cuda.device_count())
        except UserError as error:
            print(f"gpu_day: {error}; --toy runs everything on CPU at toy sizes", file=sys.stderr)
            return 2
    failed: dict[str, Figure] = {}
    for name in a.pieces or [name for name in PIECES if not (a.out / f"{name}.json").exists()]:
        why = run_piece(name, ["--toy"] if a.toy else [], a.out)
        if why:
            failed[name] = why
            print(f"{name} failed: {why}", flush=True)
    results = {name: json.loads((a.out / f"{name}.json").read_text()) for name in PIECES
               if (a.out / f"{name}.json").exists()}  # fmt: skip
    (a.out / "README.md").write_text(page(results))
    print_result("gpu_day", pieces={name: result["figures"] for name, result in results.items()}, failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
