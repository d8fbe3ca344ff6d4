"""Try all causal language models that vLLM and transformers share, with a tiny random model of each.

    python -m benchmarks.families                 # all that have no result yet; five seconds each on two cores
    python -m benchmarks.families glm4 olmo2      # these families, even if they have a result
    python -m benchmarks.families --train glm4    # two steps of `grpo train` instead; 40 seconds each
    python -m benchmarks.families --table-only    # only write the table from the results

Without `--train`, the file checks of `grpo check` run first. Then the learner's model and a real sampler run in one
process, with the plain and the full check of a weight sync, before and after one optimizer step. Each family has a
separate process, forked from one that has imported the engines. Results are kept in docs/results/families.json after
each family, and docs/results/families.md is written from them, so the benchmark resumes where it was interrupted. The
last line is one JSON object that counts the outcomes:

    trained   two steps, and no logprobs of sampler and learner differ by more than TOLERANCE
    agrees    sampler and learner agree before and after the optimizer step, and with perturbed weights
    refused   `grpo check` refuses it from its files
    stopped   an engine fails, or the weight check ends the run
    unmade    no tiny model of it can be created
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeVar

from benchmarks.result import print_result
from benchmarks.tiny_families import SHARED, TOLERANCE, Unmade, save

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

HEAD = """Written by `python -m benchmarks.families` from tiny random models of the causal language models that vLLM and
transformers share, on CPU in float32 ([docs/families.md](../families.md)). *Agrees*: sampler and learner compute the
same logprobs before and after an optimizer step and with perturbed weights, by the check of every weight sync; the
figure is their largest difference in units of rounding noise (limit 2). *Trained*: two steps of `grpo train`; the
figure is the largest difference in nats. *Refused*: by `grpo check`, from files. *Stopped*: an engine fails, or the
weight check ends the run. *Unmade*: no tiny model can be made of it."""

PATIENCE_S = 300.0
"""Timeout of one family."""

REWARD = """
def spread(completion, row):
    return completion.count("1") / 4 - completion.count("7") / 8 + len(completion) / 16
"""
"""A reward that differs between the completions of a random model."""

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
    """Result of one family."""

    outcome: Literal["trained", "agrees", "refused", "stopped", "unmade"]
    why: str = ""
    """Reason why it did not pass."""
    difference: float | None = None
    """If trained: largest difference of a sampled token's logprob between sampler and learner, in nats. If it agrees:
    90 % quantile of the probe's differences, maximum over the syncs, in units of the learner's rounding noise (limit
    2)."""


def write_recipe(family: str, folder: Path) -> Path:
    """Write a tiny random model of `family` and a recipe for it to `folder`. Raises Unmade."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from arithmetic import make_tokenizer

    save(family, folder / "model", make_tokenizer())
    (folder / "spread.py").write_text(REWARD)
    rows = [{"question": f"{a}+{b}"} for a in range(10, 30) for b in range(40, 44)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


def examine(family: str, folder: Path) -> Result:
    """Return whether a sampler and a learner in this process agree on a tiny random model of `family`.

    The option that a refusal names as the nearest is set, and the family examined with it.
    """
    import transformers

    from benchmarks.weight_check import Bench
    from grpo.config import load

    recipe, options = write_recipe(family, folder), []
    while (refusal := forked(refusal_of, recipe, options)) is not None:
        nearest = re.search(r"nearest: (\S+\.\S+=\w+)", refusal)
        if nearest is None or nearest[1] in options:
            return Result("refused", refusal)
        options.append(nearest[1])
    config = load(recipe, options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
    questions = [json.loads(line)["question"] for line in (folder / "train.jsonl").read_text().splitlines()[:64]]
    bench = Bench(
        config.model.path, config.model.dtype, [tokenizer(f"{question}=")["input_ids"] for question in questions],
        prefix_caching=config.sampler.prefix_caching,
    )  # fmt: skip
    for module in bench.learner.model.modules():  # vLLM decorates transformers' own classes where it serves them
        module.do_not_compile = True
    row = bench.examine("none")
    if row.caught:
        return Result("stopped", f"the weight check: {row.plain_q90:.2g} and {row.full_q90:.2g} times the noise")
    return Result("agrees", f"with {' '.join(options)}" if options else "", max(row.plain_q90, row.full_q90))


def refusal_of(recipe: Path, options: Sequence[str]) -> str | None:
    """Return why `grpo check` refuses the recipe's model."""
    import transformers

    from grpo.checks import families
    from grpo.config import load
    from grpo.learner.paper import check_models
    from grpo.sampler.vllm.paper import objection_to
    from grpo.types import UserError

    config = load(recipe, options)
    try:
        families.refuse(config, transformers.AutoConfig.from_pretrained(config.model.path))
        if (objection := objection_to(config)) is None:
            check_models(config)
        return objection
    except UserError as error:
        return str(error)


def forked(call: Callable[..., T], *arguments: object) -> T:
    """Return the result of `call` in a fork of this process. Raises its error, and RuntimeError if the fork does not
    answer."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(there, call, *arguments))
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE_S):
            raise RuntimeError(f"no answer within {PATIENCE_S:g} s")
        value, error = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    result: T = value
    return result


def answer(there: Connection, call: Callable[..., T], *arguments: object) -> None:
    """Send the result or the error of `call`. Errors other than Unmade are sent as a RuntimeError with their text."""
    try:
        there.send((call(*arguments), None))
    except Unmade as error:
        there.send((None, error))
    except Exception as error:  # noqa: BLE001 - any error of an engine is a result
        there.send((None, RuntimeError(f"{type(error).__name__}: {error}")))


def outcome_of(family: str, folder: Path) -> Result:
    """Return the result of `examine`, run in a fork."""
    try:
        return forked(examine, family, folder)
    except Unmade as error:
        return Result("unmade", str(error))
    except RuntimeError as error:
        return Result("stopped", str(error))


def attempt(family: str, folder: Path) -> Result:
    """Run `grpo check` and `grpo train` on a tiny random model of `family`. Return the result."""
    try:
        recipe = write_recipe(family, folder)
    except Unmade as error:
        return Result("unmade", str(error))
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
    return Result("trained", difference=mismatch)


def grpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo", *arguments], capture_output=True, text=True, timeout=800, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "1000"},
    )  # fmt: skip


def import_engines() -> None:
    """Import the slow modules once for all forks."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from vllm.model_executor.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()


def table(results: Mapping[str, Result]) -> str:
    """Return the text of docs/results/families.md."""
    lines = [
        "# Families tried",
        "",
        HEAD,
        "",
        "| `model_type` | outcome | why, or largest difference |",
        "|---|---|---|",
    ]
    for family, result in sorted(results.items()):
        why = " ".join(result.why.split())[:300]
        if result.difference is not None:
            why = f"{result.difference:.2g} {why}".strip()
        lines.append(f"| `{family}` | {result.outcome} | {why.replace('|', '/')} |")
    missing = sorted(set(SHARED) - set(results))
    if missing:
        lines += ["", "Not tried yet: " + ", ".join(f"`{family}`" for family in missing) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all without a result")
    parser.add_argument("--train", action="store_true", help="two steps of `grpo train`")
    parser.add_argument("--table-only", action="store_true", help="try nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: docs/results")
    a = parser.parse_args()
    if unknown := sorted(set(a.families) - set(SHARED)):
        parser.error(f"vLLM and transformers do not share {', '.join(unknown)}; they share {', '.join(SHARED)}")
    kept = a.results / "families.json"
    results = {name: Result(**r) for name, r in json.loads(kept.read_text()).items()} if kept.exists() else {}
    todo = [] if a.table_only else a.families or [family for family in SHARED if family not in results]
    if todo and not a.train:
        import_engines()
    for number, family in enumerate(todo, 1):
        with tempfile.TemporaryDirectory(prefix="grpo-family-") as folder:
            result = attempt(family, Path(folder)) if a.train else outcome_of(family, Path(folder))
        results[family] = result = replace(result, why=result.why.replace(folder, ""))
        print(f"{number}/{len(todo)} {family}: {result.outcome} {result.why[:200]}", flush=True)
        kept.write_text(json.dumps({name: asdict(results[name]) for name in sorted(results)}, indent=1) + "\n")
    (a.results / "families.md").write_text(table(results))
    print_result(
        "families", families=len(SHARED), tried=len(results), **Counter(result.outcome for result in results.values())
    )  # fmt: skip


if __name__ == "__main__":
    main()
