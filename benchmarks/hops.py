"""Count the files that a newcomer opens to follow one step: from a row to the optimizer, from the command to the loss.

    python -m benchmarks.hops [--recipe recipes/arithmetic_cpu.yaml] [section.option=value ...]

Trains two steps and records the Python functions of `grpo/` that are called, in all threads of the driver, the sampler,
the learner and the reward workers (`benchmarks.call_recorder`). The second step is followed.

    row_to_prompt              files with a function that returned a row or a prompt before the loop began
    prompt_to_optimizer_step   files with a function that was called in the followed step before the learner's step had
                               returned, and of which an argument or the returned value was or contained a record: a
                               prompt, request, completion, reward, rollout, group, training row or batch, or a tensor,
                               array or sequence of numbers (not parameters). `self` counts if it is a record itself.
                               What a step does later (sync, metrics, samples file, console, checkpoint) is not on the
                               way to its optimizer step.
    row_to_optimizer_step      files in either of the two. Files in ASIDE, which only measure, check or log, are left
                               out of all three.
    cli_to_loss                files of the shortest chain of calls from `main` of the command line to `policy_term`. A
                               remote call leads to the actor's method of that name.
    called_in_step             all files with a function that was called in the followed step, measuring and all

At most two elements of a container and 30 values of a function are searched for a record. Prints each file with its
functions. The last line is one JSON object with the counts, files and the chain.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import call_recorder
from benchmarks.call_recorder import REST, ROWS, SET_UP
from benchmarks.result import print_result

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/arithmetic_cpu.yaml"
OPTIONS = ("run.steps=2", "run.tensorboard=false", "data.eval.sets[0].limit=32")
START = "grpo/commands/cli.py:main"
LOSS = "grpo/objective/losses.py:policy_term"
ACTORS = "grpo/cluster/actors.py:"
ASIDE = (
    "grpo/metrics/", "grpo/learner/tally.py:", "grpo/learner/token_columns.py:", "grpo/rewards/golds.py:",
    "grpo/run/samples.py:",
)  # fmt: skip
"""Files that read the records to measure, check or log them: nothing of theirs reaches the optimizer. The samples of an
earlier step may still be written, in the background, while the followed one runs."""
ROLES = {
    "driver": "grpo/driver.py:",
    "sampler": "grpo/sampler/vllm/engine.py:",
    "learner": "grpo/learner/step.py:",
    "reward worker": "grpo/rewards/worker.py:",
}
"""Process -> a file of which it calls functions in the followed step."""


@dataclass(slots=True, kw_only=True)
class Calls:
    """What the processes of a run have recorded. A function is `<file>:<qualified name>`."""

    edges: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Function -> functions that it called."""
    called: set[str] = field(default_factory=set)
    """Functions called in the followed step."""
    sources: dict[str, str] = field(default_factory=dict)
    """Function that returned a row or a prompt before the loop -> its class."""
    carriers: dict[str, str] = field(default_factory=dict)
    """Function that had a record on the way to the optimizer step -> its class."""
    roles: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    """Number of processes of each role."""


def read_calls(processes: Iterable[Iterable[str]]) -> Calls:
    """Return the calls that the lines of all processes record, with remote calls as calls of the actors' methods."""
    found, remote = Calls(), defaultdict[str, set[str]](set)
    for lines in processes:
        own: set[str] = set()
        for line in map(json.loads, lines):
            stage, caller = line["stage"], line.get("caller")
            if "function" in line:
                (found.sources if stage == SET_UP else found.carriers)[line["function"]] = line["record"]
            elif "remote" in line:
                remote[line["remote"]].add(caller or "")
            else:
                found.edges[caller or ""].add(line["callee"])
                own |= {line["callee"]} if stage in (ROWS, REST) else set()
        found.called |= own
        for role, prefix in ROLES.items():
            found.roles[role] += any(function.startswith(prefix) for function in own)
    for function in found.called:
        if function.startswith(ACTORS):
            for caller in remote[function.rpartition(".")[2]]:
                found.edges[caller].add(function)
    return found


def chain(edges: Mapping[str, Iterable[str]], start: str, end: str) -> list[str]:
    """Return the shortest chain of calls from `start` to a function whose name begins with `end`; [] if none."""
    before: dict[str, str] = {start: ""}
    waiting = deque([start])
    while waiting:
        function = waiting.popleft()
        if function.startswith(end):
            found = [function]
            while before[found[-1]]:
                found.append(before[found[-1]])
            return found[::-1]
        for callee in sorted(edges.get(function, ())):
            if callee not in before:
                before[callee] = function
                waiting.append(callee)
    return []


def files_of(functions: Iterable[str]) -> list[str]:
    """Return the files of functions, each once, in the order of the functions."""
    return list(dict.fromkeys(function.partition(":")[0] for function in functions))


def record(recipe: str, options: Sequence[str]) -> Calls:
    """Train two steps with the recorder in every process. Raises SystemExit if it fails or a role has no records."""
    with tempfile.TemporaryDirectory(prefix="grpo-hops-") as name:
        folder = Path(name)
        (folder / "stage").write_bytes(bytes([SET_UP]))
        (folder / "site").mkdir()
        shutil.copy(call_recorder.__file__, folder / "site" / "sitecustomize.py")
        command = [sys.executable, "-m", "grpo", "train", recipe, f"run.dir={folder / 'runs'}", *OPTIONS, *options]
        environment = os.environ | {
            "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "HOPS_FOLDER": name, "HOPS_ROOT": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        calls = read_calls(file.read_text().splitlines() for file in folder.glob("*.jsonl"))
    missing = [role for role, count in calls.roles.items() if not count]
    if missing:
        raise SystemExit(f"no calls were recorded in the {' and the '.join(missing)}")
    return calls


def show(title: str, functions: Mapping[str, str]) -> list[str]:
    """Print the files of functions, each with its functions and their records. Return the files."""
    files = sorted(files_of(functions))
    print(f"{title}: {len(files)} files")
    for file in files:
        own = [f"{f.partition(':')[2]} ({functions[f]})" for f in sorted(functions) if f.startswith(f"{file}:")]
        print(f"    {file:40} {', '.join(own)}")
    return files


def report(recipe: str, calls: Calls) -> None:
    """Print the files of each figure, then the JSON object."""
    aside = {f: kind for f, kind in (calls.sources | calls.carriers).items() if f.startswith(ASIDE)}
    before = show("row_to_prompt", {f: kind for f, kind in calls.sources.items() if f not in aside})
    step = show("prompt_to_optimizer_step", {f: kind for f, kind in calls.carriers.items() if f not in aside})
    left_out = show("left out, they measure, check or log", aside)
    way = chain(calls.edges, START, LOSS)
    print(f"cli_to_loss: {len(files_of(way))} files, {len(way)} functions")
    print("".join(f"    {function}\n" for function in way), end="")
    both = sorted({*before, *step})
    print_result(
        "hops", recipe=recipe, row_to_optimizer_step=len(both), row_to_prompt=len(before),
        prompt_to_optimizer_step=len(step), cli_to_loss=len(files_of(way)),
        called_in_step=len(files_of(calls.called)), processes=calls.roles, row_files=both, left_out_files=left_out,
        loss_chain=way, called_files=sorted(files_of(calls.called)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("options", nargs="*", metavar="section.option=value")
    parsed = parser.parse_args()
    report(parsed.recipe, record(parsed.recipe, parsed.options))


if __name__ == "__main__":
    main()
