"""The arguments of the commands."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from grpo import __version__
from grpo.types import UserError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The parser's list of commands."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="grpo",
        description="Train language models with GRPO: vLLM samples, DeepSpeed trains, Ray runs the processes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Options are set as section.option=value. To list them: grpo options\n"
            "To show the arguments of a command: grpo COMMAND --help\n"
            "\n"
            "examples:\n"
            "  grpo check arithmetic_cpu\n"
            "  grpo train arithmetic_cpu run.steps=10 algorithm.group_size=8\n"
            "  grpo options algorithm"
        ),
    )
    parser.add_argument("--version", action="version", version=f"grpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    words = "check a recipe and run it"
    examples = (
        "train arithmetic_cpu run.steps=20",
        "train arithmetic_cpu run.name=a run.save_every=20 resume=auto",
        "train arithmetic_cpu resume=runs/a run.steps=200",
    )
    command = add_command(commands, "train", words, *examples, notes=(
        "resume=auto resumes the run with this name from its last checkpoint, or starts it. resume=PATH resumes from a",
        "checkpoint, or from the last checkpoint of a run folder. allow=option,... permits options that differ from",
        "those of the checkpoint.",
    ))  # fmt: skip
    add_recipe(command)
    words = "run all checks that need no running engine, and print the plan"
    command = add_command(commands, "check", words, "check arithmetic_cpu sampling.max_tokens=64")
    add_recipe(command)
    command.add_argument("--ids", action="store_true", help="also show the token ids of the first prompt")
    add_looking_commands(commands)
    add_job_commands(commands)
    words = "print options with type, default and meaning: all, those of a section with examples, or one"
    command = add_command(commands, "options", words, "options", "options algorithm", "options kl_coef")
    command.add_argument(
        "name", nargs="?", default="", metavar="SECTION|OPTION", help="show only this section or option"
    )
    return parser


def add_command(
    commands: Commands, name: str, words: str, *examples: str, notes: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add a command with its purpose, `notes`, and `examples` to copy. Return its parser."""
    lines = [*notes, *([""] if notes else []), "examples:", *(f"  grpo {example}" for example in examples)]
    return commands.add_parser(
        name,
        help=words,
        description=words,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(command: argparse.ArgumentParser, overrides: str | None = None) -> None:
    """Add the arguments for a recipe and its overrides."""
    command.add_argument("recipe", help="a YAML file, or the name of a built-in recipe")
    command.add_argument("overrides", nargs="*", metavar="section.option=value", help=overrides)


def add_looking_commands(commands: Commands) -> None:
    """Add the commands that do not train: eval, compare, replay and plan."""
    words = "evaluate a model on held-out data: avg@k, pass@k, maj@k with intervals; cached and resumable"
    examples = (
        "eval runs/a data.eval.samples_per_prompt=16",
        "eval Qwen/Qwen2.5-0.5B-Instruct --data test.jsonl --reward math_answer",
    )
    command = add_command(commands, "eval", words, *examples)
    command.add_argument("model", help="a folder in Hugging Face layout, a hub id, or a run folder (its final model)")
    command.add_argument("overrides", nargs="*", metavar="section.option=value")
    words = "recipe with data, template, rewards and settings (default: the recipe of the run)"
    command.add_argument("--recipe", type=Path, help=words)
    words = "data set, instead of data.eval.sets; may be repeated"
    command.add_argument("--data", action="append", default=[], metavar="PATH", help=words)
    words = "reward file, or name of a built-in reward, instead of rewards; may be repeated"
    command.add_argument("--reward", action="append", default=[], metavar="FILE", help=words)
    command.add_argument("--out", type=Path, default=Path("evals"), help="folder for evaluations (default: evals)")
    words = "compare two runs, or two evaluations: options, graders, held-out accuracy, metrics"
    command = add_command(commands, "compare", words, "compare runs/a runs/b", "compare runs/a runs/b --step 50")
    command.add_argument("a", type=Path, help="a run folder, or a folder that grpo eval wrote")
    command.add_argument("b", type=Path, help="the other one")
    words = "compare the evaluations after this step (default: the last of each run)"
    command.add_argument("--step", type=int, help=words)
    add_view_command(commands)
    words = "repeat an update that was not finite, and find the first value that is not finite"
    command = add_command(commands, "replay", words, "replay runs/a/nonfinite/step-000012-1")
    command.add_argument("dump", type=Path, help="a folder in nonfinite/ of a run folder")
    words = "estimate memory on each GPU, seconds of a step and hours of a run, without a GPU or a download"
    notes = ("The exit code is 0 if the run fits, and 2 if it does not. docs/scale.md explains the estimate.",)
    command = add_command(commands, "plan", words, "plan gsm8k_qwen2.5_7b --gpu h100 --gpus-per-node 4", notes=notes)
    add_recipe(command)
    words = "kind of GPU, such as h100 or a100-80 (default: the GPU of this machine)"
    command.add_argument("--gpu", metavar="NAME", help=words)
    for flag, metavar, what in (
        ("--gpu-memory", "GB", "memory of the GPU"),
        ("--tflops", "N", "bfloat16 Tflop/s of the GPU, without sparsity"),
        ("--bandwidth", "TB/s", "memory bandwidth of the GPU"),
    ):
        command.add_argument(
            flag, type=float, metavar=metavar, help=f"{what}, if its name is unknown or to override it"
        )
    command.add_argument("--nodes", type=int, default=1, help="number of machines (default: 1)")
    command.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each machine (default: 8)")
    words = "mean length of prompts (default: 150)"
    command.add_argument("--prompt-tokens", type=float, metavar="N", help=words)
    words = "mean length of completions over the run (default: sampling.max_tokens / 3)"
    command.add_argument("--completion-tokens", type=float, metavar="N", help=words)


def add_view_command(commands: Commands) -> None:
    """Add the command that shows runs in a browser."""
    words = "show runs in a browser, also while they train: curves, alarms, groups, completions, tokens"
    examples = (
        "view runs/a",
        "view runs/a runs/b --port 9000",
        "view runs/a --text",
        "view runs/a --html a.html",
        "view runs/a --json '/api/runs/0/samples/step-000010?filter=reward < 0.5'",
    )
    notes = (
        "The server listens on 127.0.0.1 and only reads. Open the address that it prints; Ctrl-C ends it. From another",
        "machine, forward the same port: ssh -L 8270:127.0.0.1:8270 HOST. docs/view.md explains pages and endpoints.",
    )
    command = add_command(commands, "view", words, *examples, notes=notes)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of runs")
    words = "port (default: the first free one from 8270; 0: any free one)"
    command.add_argument("--port", type=int, metavar="N", help=words)
    other = command.add_mutually_exclusive_group()
    words = (
        "print the answer of an endpoint as JSON, and start no server (default: /api/runs/0; /api/describe lists them)"
    )
    other.add_argument("--json", nargs="?", const="/api/runs/0", metavar="PATH", help=words)
    words = "write one HTML page that can be sent, and start no server"
    other.add_argument("--html", type=Path, metavar="FILE", help=words)
    words = (
        "print to the terminal: the run, or a step, group or completion (step-000010, step-000010/3, step-000010/3/0)"
    )
    other.add_argument("--text", nargs="?", const="", metavar="PLACE", help=words)
    words = "for --html: number of the step, or name of the samples file (default: the last step and evaluation)"
    command.add_argument("--step", metavar="STEP", help=words)


def add_job_commands(commands: Commands) -> None:
    """Add the commands for jobs on a cluster (docs/cluster.md): submit, jobs, status, logs and stop."""
    words = "run a recipe as a job of a Ray cluster, and exit with the code of the job"
    examples = (
        "submit recipe.yaml run.dir=/shared/runs run.name=a resume=auto --address http://HEAD:8265",
        "submit recipe.yaml run.dir=/shared/runs --env HF_TOKEN --queue --no-follow --address http://HEAD:8265",
    )
    command = add_command(commands, "submit", words, *examples)
    add_recipe(command, "options, resume= and allow=, as for grpo train")
    words = "environment variable of the job; NAME alone takes the local value"
    command.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help=words)
    words = "CPUs that Ray reserves on a node for the driver and its reward workers (default: none, on the head node)"
    command.add_argument("--driver-cpus", type=float, default=0.0, metavar="N", help=words)
    then = command.add_mutually_exclusive_group()
    words = "exit after the job has been submitted"
    then.add_argument("--no-follow", dest="then", action="store_const", const="end", default="follow", help=words)
    words = "check and pack the recipe, and submit nothing; needs no --address"
    then.add_argument("--dry-run", dest="then", action="store_const", const="nothing", help=words)
    words = "on Ctrl-C, SIGTERM and SIGUSR1, stop the job as grpo stop does"
    then.add_argument(
        "--stop-on-signal", dest="then", action="store_const", const="follow, stop on signals", help=words
    )
    words = "wait on the cluster until it has room for all engines (cluster.queue=true)"
    command.add_argument("--queue", action="store_true", help=words)
    words = "list the runs that were submitted to a cluster: status, run, recipe, times, exit code"
    every = [command, add_command(commands, "jobs", words, "jobs --address http://HEAD:8265")]
    for name, words in (
        ("status", "print the status of a job"),
        ("logs", "print the output of a job until it ends, and exit with its code"),
        ("stop", "stop a job after its step has been finished and saved, and wait until it has ended"),
    ):
        every.append(add_command(commands, name, words, f"{name} grpo-0123456789abcdef --address http://HEAD:8265"))
        every[-1].add_argument("job", help="name of the job, as grpo submit prints it")
    for number, command in enumerate(every):  # submit, the first, does without it in a dry run
        words = "address of the job server on the head node"
        command.add_argument("--address", required=number > 0, metavar="http://HEAD:8265", help=words)


def split_resume_options(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split `resume=` and `allow=`, which are not options of a recipe, from the overrides.

    Raises UserError if one of them is misspelled, and for `allow=` without `resume=`.
    """
    asked = {
        name: value for name, _, value in (text.partition("=") for text in overrides) if name in ("resume", "allow")
    }
    for text in overrides:
        name = text.partition("=")[0]
        near = difflib.get_close_matches(name, ("resume", "allow"), n=1, cutoff=0.75)
        if near and name not in asked:
            raise UserError(f"override {text!r}: did you mean {near[0]}=?")
    if "allow" in asked and "resume" not in asked:
        raise UserError("allow= is only for a resumed run: add resume=auto or resume=PATH")
    return asked, [text for text in overrides if text.partition("=")[0] not in asked]
