"""Check that this tree computes bit for bit the same as another commit, for changes that must not affect results.

    python -m benchmarks.equality 1a2b3c4              # all cases, compared with that commit
    python -m benchmarks.equality 1a2b3c4 gspo gae     # these cases
    python -m benchmarks.equality --list

Each case is a short run of recipes/arithmetic_cpu.yaml with one variant of benchmarks/objective_variants.yaml. The
variants run with different engine options (ZeRO 0 to 3, two ranks, two samplers, bfloat16, a mix of data sets,
refills). The other commit runs in a separate worktree with this tree's environment on this machine. Floating-point
results depend on the processor, so no results are stored in the repository. Its runs are kept in --out and not
repeated.

Compared are the SHA-256 of the final weights, all columns of all samples files (prompts, order, seeds, tokens,
logprobs, rewards, advantages), all metrics except times and rates, and the accuracies in summary.json. The last line is
one JSON object. The exit code is 0 if all are equal, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from benchmarks.result import print_result

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/arithmetic_cpu.yaml"
OBJECTIVES = ROOT / "benchmarks" / "objective_variants.yaml"
COMMON = (
    "run.steps=3", "run.save_every=2", "run.tensorboard=false", "algorithm.prompts_per_step=16",
    "algorithm.minibatches_per_step=2", "learner.tokens_per_microbatch=256", "data.eval.sets[0].limit=32",
    "data.eval.every=2", "optimizer.warmup_steps=1", "run.seed=3", "cluster.cpus=4",
)  # fmt: skip
ENGINES: Mapping[str, Sequence[str]] = {
    "plain": (),
    "zero_1": ("learner.zero_stage=1",),
    "two_ranks_zero_2": ("learner.zero_stage=2", "cluster.learner_ranks=2"),
    "zero_3": ("learner.zero_stage=3",),
    "bfloat16": ("model.dtype=bfloat16", "learner.zero_stage=2"),
    "two_samplers": ("cluster.samplers=2", "cluster.learner_ranks=2"),
    "mix": (
        "data.train=[{path: recipes/tiny/arithmetic/train.jsonl, weight: 2},"
        " {path: recipes/tiny/arithmetic/eval.jsonl, name: other, weight: 1}]",
        "data.eval.sets=[]",
        "data.eval.every=0",
        "data.eval.samples_per_prompt=1",
    ),
}
REFRESH = "algorithm.reference_refresh_every="
"""Its value in the list is beyond the end of these runs."""
UNEQUAL_METRICS = ("time", "time/", "tokens/per_second", "perf/", "memory/", "sync/seconds")
"""Prefixes of metrics that depend on the clock or the machine."""
UNEQUAL_COLUMNS = ("time", "reward_s")


def cases() -> dict[str, list[str]]:
    """Return name -> options: each objective once, with the engine options assigned to them in turn."""
    listed: Mapping[str, list[str]] = yaml.safe_load(OBJECTIVES.read_text())["variants"]
    engines = list(ENGINES.items())
    found = {}
    for number, (name, options) in enumerate(listed.items()):
        engine, engine_options = engines[number % len(engines)]
        kept = [option for option in options if not option.startswith(("run.steps=", REFRESH))]
        kept += [f"{REFRESH}2" for option in options if option.startswith(REFRESH)]
        found[f"{name}.{engine}"] = [*COMMON, *engine_options, *kept]
    return found


def commit_of(name: str) -> str:
    return git("rev-parse", "--verify", f"{name}^{{commit}}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def worktree(commit: str, out: Path) -> Path:
    """Return a folder with the files of `commit` and this tree's cached base models and data."""
    folder = out / commit[:12] / "tree"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        git("worktree", "add", "--detach", "--force", str(folder), commit)
        (folder / "recipes" / "tiny").symlink_to(ROOT / "recipes" / "tiny")
    return folder


def run(tree: Path, name: str, options: Sequence[str], out: Path) -> Path:
    """Run a case with the code in `tree`, unless its run is complete. Return the run folder.

    Raises SystemExit if the run fails.
    """
    folder = out / "runs" / name
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["exit_reason"] != "done":
        shutil.rmtree(folder, ignore_errors=True)
        own = [f"run.dir={out / 'runs'}", f"run.name={name}"]
        command = [sys.executable, "-m", "grpo", "train", RECIPE, *own, *options]
        environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tree}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return folder


def differences(a: Path, b: Path) -> list[str]:
    """Return the differences between two runs, one line each."""
    found = []
    first, second = (json.loads((run / "summary.json").read_text()) for run in (a, b))
    for key in ("weights_sha256", "accuracy_before", "accuracy_after", "accuracy_gain_interval", "steps"):
        if first.get(key) != second.get(key):
            found.append(f"summary.json: {key}: {first.get(key)} and {second.get(key)}")
    found += metric_differences(metrics_of(a), metrics_of(b))
    files = [sorted(path.name for path in (run / "samples").glob("*.parquet")) for run in (a, b)]
    if files[0] != files[1]:
        return [*found, f"samples: {files[0]} and {files[1]}"]
    for name in files[0]:
        found += column_differences(name, a / "samples" / name, b / "samples" / name)
    return found


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metric_differences(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metrics that differ, each with the first step where it differs."""
    if len(a) != len(b):
        return [f"metrics.jsonl: {len(a)} and {len(b)} lines"]
    found: dict[str, str] = {}
    for one, other in zip(a, b, strict=True):
        for name in [*one, *(name for name in other if name not in one)]:
            if not name.startswith(UNEQUAL_METRICS) and one.get(name) != other.get(name):
                found.setdefault(name, f"step {one['step']}: {name}: {one.get(name)} and {other.get(name)}")
    return list(found.values())


def column_differences(name: str, a: Path, b: Path) -> list[str]:
    """Return the columns of a samples file that differ."""
    first, second = pq.read_table(a), pq.read_table(b)
    found = []
    for column in [*first.column_names, *(c for c in second.column_names if c not in first.column_names)]:
        if column in UNEQUAL_COLUMNS:
            continue
        if column not in first.column_names or column not in second.column_names:
            found.append(f"{name}: only one has the column {column}")
        elif repr(first[column].to_pylist()) != repr(second[column].to_pylist()):  # NaN equals itself, -0.0 not 0.0
            found.append(f"{name}: column {column}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").split("\n\n", 1)[1],
    )  # fmt: skip
    parser.add_argument("base", nargs="?", help="the commit to compare with")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="a case, or how its name begins; default: all")
    parser.add_argument("--list", action="store_true", help="list the cases")
    runs = Path(tempfile.gettempdir()) / "grpo-equality"
    parser.add_argument("--out", type=Path, default=runs, help=f"where runs are kept ({runs})")
    parser.add_argument("--head", help="a commit in the place of this tree as it is")
    a = parser.parse_args()
    known = cases()
    if a.list or not a.base:
        print("\n".join(f"{name}: {' '.join(options[len(COMMON) :])}" for name, options in known.items()))
        return 0
    chosen = {n: o for n, o in known.items() if not a.cases or any(n.startswith(case) for case in a.cases)}
    if not chosen:
        parser.error(f"no case begins with {' or '.join(a.cases)}; see --list")
    base, out = commit_of(a.base), a.out.resolve()
    head = commit_of(a.head) if a.head else None
    here = tempfile.TemporaryDirectory(prefix="grpo-equality-") if head is None else None
    trees = [(worktree(base, out), out / base[:12])]
    trees.append((ROOT, Path(here.name)) if here else (worktree(str(head), out), out / str(head)[:12]))
    unequal: dict[str, list[str]] = {}
    for number, (name, options) in enumerate(chosen.items(), 1):
        found = differences(*(run(tree, name, options, folder) for tree, folder in trees))
        print(f"{number}/{len(chosen)} {name}: {'equal' if not found else f'{len(found)} differ'}", flush=True)
        for line in found[:10]:
            print(f"    {line}", flush=True)
        if found:
            unequal[name] = found
    if here:
        here.cleanup()
    print_result("equality", base=base, head=head or "this tree", cases=len(chosen), unequal=sorted(unequal))
    return 1 if unequal else 0


if __name__ == "__main__":
    raise SystemExit(main())
