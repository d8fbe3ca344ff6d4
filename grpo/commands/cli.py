"""The `grpo` command: wiring only.

Exit codes: 0 done; 2 a mistake of the user, reported in one sentence; 75 stopped and resumable (signal, full disk,
outage); 130 a run or job that is no longer followed but continues; 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import select
import sys
from collections.abc import Sequence

from grpo import config as config_module
from grpo.commands.parser import make_parser, split_resume_options
from grpo.commands.train import print_progress
from grpo.run.signals import interrupt_early
from grpo.types import ExitCode, UserError

NAMED_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip
"""Error numbers of files that cannot be written or read; reported in one line, without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    gc.set_threshold(50_000, 20, 20)  # with the default, a tenth of the time of all imports goes into collections
    open_closed_streams()
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    try:
        if any("=" not in text or text.startswith("-") for text in rest) or (rest and not hasattr(parsed, "overrides")):
            config_module.refuse_flags(rest)
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        interrupt_early()
        refuse_lost_folder()
        code = dispatch(parsed, [*getattr(parsed, "overrides", ()), *rest])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"grpo: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except OSError as error:
        if isinstance(error, BrokenPipeError) and stdout_closed():
            return ExitCode.DETACHED
        if error.errno not in NAMED_ERRORS:
            raise
        print(f"grpo: {error.filename}: {error.strerror}", file=sys.stderr)
        return ExitCode.INTERNAL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ExitCode.USAGE
    except RuntimeError as error:
        if "home directory" not in str(error):  # pathlib's message about an unknown user, as in ~nobody
            raise
        print(f"grpo: a path begins with ~ and the name of an unknown user: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except KeyboardInterrupt:
        print("grpo: interrupted before anything was started", file=sys.stderr)
        return ExitCode.INTERNAL


def open_closed_streams() -> None:
    """Reopen standard streams that the caller has closed (`>&-`), on the null device. Otherwise the first files to be
    opened would get their file descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, "r+" if number == 0 else "w", closefd=False))  # noqa: SIM115 - open until exit


def refuse_lost_folder() -> None:
    """Raise UserError if the working directory has been removed: libraries query it when they are imported."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working directory has been removed; change to one that exists") from error


def stdout_closed() -> bool:
    """Return whether the reader of stdout has closed the pipe, as `| head` does. If so, redirect stdout to the null
    device."""
    stdout = sys.stdout.fileno()
    pipe = select.poll()
    pipe.register(stdout, 0)  # errors are reported without being requested
    if not pipe.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def dispatch(parsed: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the requested command and return its exit code. A command is imported when it is run: torch, transformers,
    ray and pyarrow take seconds."""
    if parsed.command == "options":
        print(config_module.options_text(parsed.name))
        return ExitCode.DONE
    if parsed.command == "replay":
        from grpo.learner.replay import replay  # noqa: PLC0415

        print("\n".join(replay(parsed.dump)))
        return ExitCode.DONE
    if parsed.command == "compare":
        from grpo.run.compare import compare  # noqa: PLC0415

        print("\n".join(compare(parsed.a, parsed.b, parsed.step)))
        return ExitCode.DONE
    if parsed.command == "view":
        from grpo.commands.view import view_command  # noqa: PLC0415

        return view_command(parsed)
    if parsed.command == "plan":
        from grpo.commands.plan import plan_command  # noqa: PLC0415

        return plan_command(parsed, overrides)
    if parsed.command == "eval":
        from grpo.commands.evaluate import evaluate_command  # noqa: PLC0415

        return evaluate_command(parsed, overrides)
    if parsed.command in ("jobs", "status", "logs", "stop"):
        from grpo.commands.jobs import jobs_command  # noqa: PLC0415

        return jobs_command(parsed)
    asked, overrides = split_resume_options(overrides)
    if parsed.command == "submit" and parsed.queue:
        overrides.append("cluster.queue=true")
    recipe = config_module.find_recipe(parsed.recipe)
    config = config_module.load(recipe, overrides)
    if parsed.command == "check":
        if asked:
            raise UserError(f"{next(iter(asked))}= is for grpo train")
        from grpo.checks.environment import check_environment  # noqa: PLC0415

        check_environment(print_progress)  # before the command imports what it checks
        from grpo.commands.check import check_command  # noqa: PLC0415

        return check_command(config, recipe, ids=parsed.ids)
    if parsed.command == "submit":
        from grpo.commands.jobs import submit_command  # noqa: PLC0415

        return submit_command(config, recipe, asked, parsed)
    from grpo.commands.train import train_command  # noqa: PLC0415

    return train_command(config, recipe, asked)


if __name__ == "__main__":
    raise SystemExit(main())
