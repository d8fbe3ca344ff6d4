"""Train the arithmetic recipe with each objective of benchmarks/objective_variants.yaml, and write a table.

    python -m benchmarks.objectives [--only NAME ...] [--seed 1] [--out DIR] [section.option=value ...]

Resumable: a variant is skipped if OUT/results.json has its result with the same options. Writes OUT/results.json
(accuracies, curve, overrides, seed and weights hash of each run) and OUT/README.md (the table). Runs stay in
runs/objectives/. The last line of output is one JSON object with the figures of all variants in OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.result import print_result

LIST = Path("benchmarks/objective_variants.yaml")
BAR = 0.85


def run(name: str, overrides: list[str], base: str, seed: int) -> dict[str, Any]:
    """Run one training and return its figures. Raises SystemExit if it fails."""
    command = [sys.executable, "-m", "grpo", "train", base, "run.dir=runs/objectives", f"run.seed={seed}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("run folder "))
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    trained = [
        line for line in steps if "policy/clip_fraction" in line
    ]  # a step whose groups all lack spread trains nothing
    return {
        "overrides": overrides,
        "seed": seed,
        "before": summary["accuracy_before"],
        "after": summary["accuracy_after"],
        "interval_of_gain": summary["accuracy_gain_interval"],
        "reward_curve": {line["step"]: round(line["reward/mean"], 4) for line in steps if line["step"] % 9 == 0},
        "clip_fraction": sum(line["policy/clip_fraction"] for line in trained) / len(trained),
        "ratio_max": max(line["policy/ratio_max"] for line in trained),
        "contributing": sum(line["gradient/contributing"] for line in steps)
        / sum(line["gradient/sampled"] for line in steps),
        "optimizer_steps": steps[-1]["optim/optimizer_steps"],
        "wall_s": summary["wall_s"],
        "weights_sha256": summary["weights_sha256"],
    }


def table(results: dict[str, dict[str, Any]], common: list[str]) -> str:
    """Return the results as a Markdown page."""
    columns = (
        "variant", "options", "before", "reward while training, every 9 steps", "after", "gain (95 %)", "clipped",
        "contributing", "optimizer steps",
    )  # fmt: skip
    rows = [
        "# Objectives on the arithmetic recipe",
        "",
        "`python -m benchmarks.objectives`, all from the same base with",
        f"`{' '.join(common)}`;",
        f"accuracy is avg@4 on held-out problems. The bar is {BAR} for losses and advantages (but `pass_at_k`, whose",
        "gradient fades once groups solve). `clipped`: share of token uses that the clip acted on, 0 where a loss has",
        "none; `contributing`: share that had a gradient.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for name, r in results.items():
        low, high = r["interval_of_gain"]
        cells = (
            name,
            "`" + (" ".join(o.removeprefix("algorithm.") for o in r["overrides"][len(common) :]) or "defaults") + "`",
            f"{r['before']:.3f}",
            " ".join(f"{v:.2f}" for v in r["reward_curve"].values()),
            f"{r['after']:.3f}" + ("" if r["after"] >= BAR else " (below)"),
            f"{low:.3f} to {high:.3f}",
            f"{r['clip_fraction']:.4f}",
            f"{r['contributing']:.3f}",
            f"{r['optimizer_steps']:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def report(results: dict[str, dict[str, Any]], base: str) -> None:
    """Print one JSON object with recipe, bar, and the seed, accuracies (shares of 1) and wall time of each variant."""
    kept = ("seed", "before", "after", "clip_fraction", "contributing", "optimizer_steps", "wall_s")
    variants = {
        name: {
            **{key: result[key] for key in kept},
            "gain_low": result["interval_of_gain"][0],
            "gain_high": result["interval_of_gain"][1],
        }
        for name, result in results.items()
    }
    below = [name for name, result in results.items() if result["after"] < BAR]
    print_result("objectives", recipe=base, bar=BAR, below_bar=below, variants=variants)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/objectives"))
    parser.add_argument("overrides", nargs="*", help="besides those of the list")
    a = parser.parse_args()
    wanted = yaml.safe_load(LIST.read_text())
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    common = [*wanted["common"], *a.overrides]
    for name, overrides in wanted["variants"].items():
        same = name in results and results[name]["overrides"] == [*common, *overrides]
        if same or (a.only and name not in a.only):
            continue
        results[name] = run(name, [*common, *overrides], wanted["base"], a.seed)
        results = {known: results[known] for known in wanted["variants"] if known in results}
        file.write_text(json.dumps(results, indent=1) + "\n")
        (a.out / "README.md").write_text(table(results, common))
        print(
            f"{name}: {results[name]['before']:.3f} -> {results[name]['after']:.3f}, {results[name]['wall_s']:.0f} s",
            flush=True,
        )
    report(results, wanted["base"])


if __name__ == "__main__":
    main()
