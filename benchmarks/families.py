"""Try every causal language model that vLLM and transformers share: two steps with the real engines, or a refusal.

    python -m benchmarks.families                 # all that have no result yet; about 40 seconds each on two cores
    python -m benchmarks.families glm4 olmo2      # these again
    python -m benchmarks.families --table-only    # write the table anew from the results

Each family gets a tiny random model (`benchmarks.tiny_families`) and the recipe below. Results are kept in
docs/results/families.json after each family, and docs/results/families.md is written from them, so the benchmark
continues where it was interrupted. The last line is one JSON object that counts the outcomes:

    trained   two steps, and no logprob of sampler and learner apart by more than TOLERANCE
    refused   `grpo check` refuses it from its files
    stopped   the run refuses to go on: the weight check, or an engine that cannot load the model
    unmade    no tiny model can be made of it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.result import print_result
from benchmarks.tiny_families import SHARED, TOLERANCE, Unmade, save

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

HEAD = """Written by `python -m benchmarks.families`: two steps of a tiny random model of each causal language model
that vLLM and transformers share, on CPU in float32 ([docs/families.md](../families.md)). The difference is that of
logprobs of sampled tokens between sampler and learner."""

REWARD = """
def spread(completion, row):
    return completion.count("1") / 4 - completion.count("7") / 8 + len(completion) / 16
"""
"""A reward that tells the completions of a random model apart."""

RECIPE = """
model: {{path: {folder}/model, dtype: float32}}
data: {{train: "{folder}/train.jsonl", template: "{{question}}=", max_prompt_tokens: 6}}
sampling: {{max_tokens: 5}}
learner: {{tokens_per_microbatch: 256}}
algorithm: {{prompts_per_step: 4, group_size: 4}}
rewards: [{{file: "{folder}/spread.py"}}]
optimizer: {{lr: 0.001}}
run: {{steps: 2, dir: "{folder}/runs", name: run, tensorboard: false}}
cluster: {{reward_workers: 1}}
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one family."""

    outcome: Literal["trained", "refused", "stopped", "unmade"]
    why: str = ""
    """The sentence of a refusal, the last line of a run that stopped, or why no model can be made."""
    mismatch: float | None = None
    """Largest difference of a sampled token's logprobs between sampler and learner, of a trained one."""


def attempt(family: str, folder: Path) -> Result:
    """Return what becomes of a tiny random model of `family`; its model, recipe and run are written to `folder`."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from arithmetic import make_tokenizer

    try:
        save(family, folder / "model", make_tokenizer())
    except Unmade as error:
        return Result("unmade", str(error))
    (folder / "spread.py").write_text(REWARD)
    rows = [{"question": f"{a}+{b}"} for a in range(10, 30) for b in range(40, 44)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    checked = grpo("check", str(recipe))
    if checked.returncode == 2:
        return Result("refused", checked.stderr.strip().removeprefix("grpo: "))
    if checked.returncode:
        raise RuntimeError(f"grpo check of {family} ended with {checked.returncode}:\n{checked.stderr}")
    trained = grpo("train", str(recipe))
    run = folder / "runs" / "run"
    if trained.returncode:
        return Result("stopped", json.loads((run / "summary.json").read_text())["exit_reason"])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if line["step"]]
    mismatch = max(line["mismatch/max"] for line in steps)
    if len(steps) != 2 or not min(line["optim/grad_norm"] for line in steps) > 0:
        return Result("stopped", f"{len(steps)} steps, a gradient of 0 among them")
    if not 0 < mismatch < TOLERANCE:
        return Result("stopped", f"logprobs of sampler and learner differ by {mismatch:.2g}")
    return Result("trained", mismatch=mismatch)


def grpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo", *arguments], capture_output=True, text=True, timeout=800, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "1000"},
    )  # fmt: skip


def table(results: Mapping[str, Result]) -> str:
    """Return docs/results/families.md."""
    lines = [
        "# Families tried",
        "",
        HEAD,
        "",
        "| `model_type` | outcome | why, or largest difference |",
        "|---|---|---|",
    ]
    for family, result in sorted(results.items()):
        why = f"{result.mismatch:.1e}" if result.mismatch is not None else " ".join(result.why.split())[:300]
        lines.append(f"| `{family}` | {result.outcome} | {why.replace('|', '/')} |")
    missing = sorted(set(SHARED) - set(results))
    if missing:
        lines += ["", "Not tried yet: " + ", ".join(f"`{family}`" for family in missing) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all without a result")
    parser.add_argument("--table-only", action="store_true", help="try nothing")
    a = parser.parse_args()
    if unknown := sorted(set(a.families) - set(SHARED)):
        parser.error(f"vLLM and transformers do not share {', '.join(unknown)}; they share {', '.join(SHARED)}")
    kept = RESULTS / "families.json"
    results = {name: Result(**r) for name, r in json.loads(kept.read_text()).items()} if kept.exists() else {}
    todo = [] if a.table_only else a.families or [family for family in SHARED if family not in results]
    for number, family in enumerate(todo, 1):
        with tempfile.TemporaryDirectory(prefix="grpo-family-") as folder:
            result = attempt(family, Path(folder))
        results[family] = result = replace(result, why=result.why.replace(folder, ""))
        print(f"{number}/{len(todo)} {family}: {result.outcome} {result.why[:200]}", flush=True)
        kept.write_text(json.dumps({name: asdict(results[name]) for name in sorted(results)}, indent=1) + "\n")
    (RESULTS / "families.md").write_text(table(results))
    print_result(
        "families", families=len(SHARED), tried=len(results), **Counter(result.outcome for result in results.values())
    )  # fmt: skip


if __name__ == "__main__":
    main()
