"""Run GRPO and its variants on the reasoning recipe with several seeds each, and write tables and a figure.

    python -m benchmarks.reasoning [--variants NAME ...] [--seeds N ...] [--out docs/results] [--table-only]

The runs are those of benchmarks/reasoning_variants.yaml, one after another. Resumable: a run whose summary is in
OUT/reasoning/<variant>-<seed>/ is skipped, and an interrupted run resumes from its last checkpoint. After each run the
tables (OUT/reasoning.md) and the figure (OUT/reasoning.svg) are written again. They are made only from the files in
OUT/reasoning/: config.yaml, summary.json and metrics.jsonl with the metrics of KEPT. On the page, only the text between
a table's marks is replaced. Whole runs stay in runs/reasoning/. The last line of output is one JSON object with the
figures of all variants that have runs in OUT/reasoning/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import curves
from benchmarks.result import Figure, print_result
from grpo import config as config_module
from grpo.run.folder import steps_done

LIST = Path("benchmarks/reasoning_variants.yaml")
RUNS = Path("runs/reasoning")
KEPT = (
    "step", "eval/accuracy", "eval/pass_at_k", "reward/mean", "group/mixed_fraction", "completion/tokens_mean",
    "completion/truncated_fraction", "policy/entropy", "policy/kl_old", "policy/ratio_max", "policy/clip_fraction",
    "optim/grad_norm", "optim/lr", "optim/optimizer_steps", "gradient/sampled", "gradient/contributing", "mismatch/max",
    "refill/replaced_groups", "refill/missing_groups", "tokens/sampled", "progress/rollouts", "time/step_s",
)  # fmt: skip
EMPTY_PAGE = """# Reasoning

<!-- variants -->
<!-- end of variants -->

![held-out accuracy by step](reasoning.svg)

<!-- runs -->
<!-- end of runs -->
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Records of a completed run."""

    variant: str
    seed: int
    config_hash: str
    summary: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]
    """Lines of metrics.jsonl. The first is the evaluation before the first step."""

    @property
    def gain(self) -> float:
        return float(self.summary["accuracy_gain"])

    @property
    def after(self) -> float:
        return float(self.summary["accuracy_after"])

    def total(self, name: str) -> float:
        """Return the sum of a metric over the steps."""
        return sum(line[name] for line in self.lines if name in line)

    @property
    def seconds(self) -> str:
        """Wall time of the whole command. For an interrupted run only the seconds of its steps are known."""
        steps, wall = self.total("time/step_s"), float(self.summary["wall_s"])
        return f"{wall:.0f}" if wall >= steps else f"above {steps:.0f} (resumed)"

    @property
    def accuracy(self) -> list[tuple[float, float]]:
        """Held-out accuracy by step."""
        return [(line["step"], line["eval/accuracy"]) for line in self.lines if "eval/accuracy" in line]


def config_hash(dumped: str) -> str:
    """Return the hash of a resolved config. It is equal for runs that differ only in seeds, engine and cluster options,
    and output options."""
    tree = yaml.safe_load(dumped)
    tree["run"] = {"steps": tree["run"]["steps"]}
    del tree["data"]["seed"], tree["cluster"], tree["sampler"], tree["learner"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def kept(folder: Path, wanted: Mapping[str, Any]) -> list[Run]:
    """Return the runs in `folder`, ordered by `wanted`'s variants and by seed.

    Raises SystemExit if a folder belongs to no variant, or if its seed differs from its name.
    """
    runs = []
    for path in folder.glob("*/summary.json"):
        variant, _, seed = path.parent.name.rpartition("-")
        dumped = (path.parent / "config.yaml").read_text()
        if variant not in wanted or str(yaml.safe_load(dumped)["run"]["seed"]) != seed:
            raise SystemExit(f"{path.parent} holds no run of a variant in {LIST} with that seed")
        lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads(path.read_text())
        runs.append(Run(variant=variant, seed=int(seed), config_hash=config_hash(dumped), summary=summary, lines=lines))
    order = list(wanted)
    return sorted(runs, key=lambda run: (order.index(run.variant), run.seed))


def keep(source: Path, target: Path, dumped: str) -> None:
    """Copy a run's config, KEPT metrics and summary. The summary is written last: it marks the copy as complete."""
    target.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    short = [{name: float(f"{line[name]:.6g}") for name in KEPT if name in line} for line in lines]
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))
    (target / "config.yaml").write_text(dumped)
    (target / "summary.json").write_bytes((source / "summary.json").read_bytes())


def train(name: str, recipe: str, options: Sequence[str], target: Path) -> None:
    """Make one run, or the rest of an interrupted one. Skip it if `target` has its summary.

    Raises SystemExit if it fails, or if the records in `target` were made with another config.
    """
    options = [*options, f"run.dir={RUNS}", f"run.name={name}", "run.save_every=10", "run.keep_last=1"]
    config = config_module.load(recipe, options)
    dumped = config_module.dump(config)
    if (target / "summary.json").exists():
        then, now = config_hash((target / "config.yaml").read_text()), config_hash(dumped)
        if then != now:
            raise SystemExit(f"{target} was made with config {then}, which is {now} now; remove it to run it again")
        return
    if (steps_done(RUNS / name) or 0) < config.run.steps:
        print(f"{name}: training", flush=True)
        command = [sys.executable, "-m", "grpo", "train", recipe, *options, "resume=auto"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    keep(RUNS / name, target, dumped)


def interval(values: Sequence[float]) -> str:
    """Return mean and range as text."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def by_variant(runs: Sequence[Run], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield one row per variant: means over its seeds, and the difference to the first variant on the same seeds."""
    first = {run.seed: run for run in runs if run.variant == next(iter(wanted))}
    columns = (
        "variant", "seeds", "after, mean (range)", "gain, mean (range)", "less GRPO's, same seeds, mean (range)",
        "tokens sampled", "wall s", "optimizer steps", "clipped",
    )  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for name, variant in wanted.items():
        mine = [run for run in runs if run.variant == name]
        if not mine:
            continue
        paired = [run.after - first[run.seed].after for run in mine if run.seed in first]
        walls = [float(run.summary["wall_s"]) for run in mine if "resumed" not in run.seconds]
        clipped = [line["policy/clip_fraction"] for run in mine for line in run.lines if "policy/clip_fraction" in line]
        cells = (
            variant["title"],
            str(len(mine)),
            interval([run.after for run in mine]),
            interval([run.gain for run in mine]),
            interval(paired) if paired and mine[0] not in first.values() else "",
            f"{statistics.mean(run.total('tokens/sampled') for run in mine) / 1e6:.2f} M",
            f"{statistics.mean(walls):.0f}" if walls else "",
            f"{statistics.mean(run.lines[-1]['optim/optimizer_steps'] for run in mine):.0f}",
            f"{statistics.mean(clipped):.4f}",
        )
        yield f"| {' | '.join(cells)} |"


def by_run(runs: Sequence[Run], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield one row per run."""
    columns = ("variant", "seed", "before", "after", "gain", "95 % interval", "tokens sampled", "wall s", "config")
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for run in runs:
        low, high = run.summary["accuracy_gain_interval"]
        cells = (
            wanted[run.variant]["title"],
            str(run.seed),
            f"{run.summary['accuracy_before']:.3f}",
            f"{run.after:.3f}",
            f"{run.gain:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{run.total('tokens/sampled'):,.0f}",
            run.seconds,
            f"`{run.config_hash}`",
        )
        yield f"| {' | '.join(cells)} |"


def page(text: str, runs: Sequence[Run], wanted: Mapping[str, Any]) -> str:
    """Return the page `text` with both tables replaced. Raises SystemExit if the marks of a table are missing."""
    for name, rows in (("variants", by_variant(runs, wanted)), ("runs", by_run(runs, wanted))):
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        if not (start and end):
            raise SystemExit(f"the page must have the lines <!-- {name} --> and <!-- end of {name} -->, in this order")
        text = "".join((before, start, *(f"{row}\n" for row in rows), end, after))
    return text


def figure(runs: Sequence[Run], wanted: Mapping[str, Any]) -> str:
    """Return the figure of held-out accuracy by step, with mean and range over the seeds of each variant."""
    series = {}
    for name, variant in wanted.items():
        mine = [run.accuracy for run in runs if run.variant == name]
        if mine:
            series[f"{variant['title']} ({len(mine)} seeds)"] = mine
    return curves.svg(series, x="step", y="held-out accuracy")


def report(runs: Sequence[Run], wanted: Mapping[str, Any], recipe: str) -> None:
    """Print one JSON object with the recipe and, for each variant, the seeds, the held-out accuracies (shares of 1) and
    the mean difference to the first variant on the same seeds."""
    first = {run.seed: run for run in runs if run.variant == next(iter(wanted))}
    variants: dict[str, Figure] = {}
    for name in wanted:
        mine = [run for run in runs if run.variant == name]
        paired = [run.after - first[run.seed].after for run in mine if run.seed in first]
        if mine:
            variants[name] = {
                "seeds": [run.seed for run in mine],
                "after": [run.after for run in mine],
                "after_mean": statistics.mean(run.after for run in mine),
                "gain_mean": statistics.mean(run.gain for run in mine),
                "after_less_first_mean": statistics.mean(paired) if paired else None,
                "tokens_sampled_mean": statistics.mean(run.total("tokens/sampled") for run in mine),
                "step_s_sum_mean": statistics.mean(run.total("time/step_s") for run in mine),
            }
    print_result("reasoning", recipe=recipe, runs=len(runs), variants=variants)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    wanted = yaml.safe_load(LIST.read_text())
    variants = wanted["variants"]
    parser.add_argument("--variants", nargs="+", choices=list(variants), default=list(variants), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="instead of each variant's own")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--table-only", action="store_true", help="no runs: table and figure of what is kept")
    a = parser.parse_args()
    folder = a.out / "reasoning"

    def write() -> None:
        runs = kept(folder, variants)
        target = a.out / "reasoning.md"
        target.write_text(page(target.read_text() if target.exists() else EMPTY_PAGE, runs, variants))
        (a.out / "reasoning.svg").write_text(figure(runs, variants))

    if not a.table_only:
        subprocess.run([sys.executable, "recipes/reasoning.py"], check=True)
        for name in a.variants:
            for seed in a.seeds or variants[name]["seeds"]:
                options = [*variants[name]["options"], f"run.seed={seed}", f"data.seed={seed}"]
                train(f"{name}-{seed}", wanted["base"], options, folder / f"{name}-{seed}")
                write()
    write()
    report(kept(folder, variants), variants, wanted["base"])


if __name__ == "__main__":
    main()
