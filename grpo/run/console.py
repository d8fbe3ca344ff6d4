"""Console output: a live table on a terminal, a few short lines per step elsewhere.

All of it also goes to log.txt, there without line breaks.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from grpo.metrics.measures import HEADLINE

WIDTH = 120
"""Maximum columns of a line, unless COLUMNS is set."""
INDENT = 4


class Reader(RichConsole):
    """Standard output. If it is a pipe whose reader exits, as `| head` does, the run continues with log.txt only."""

    def on_broken_pipe(self) -> None:
        """Discard all further output. Rich would end the process silently."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Progress of one run. Use as a context manager, so that the terminal is restored however the run ends."""

    def __init__(self, *, steps: int, log: Path | None) -> None:
        self._rich = Reader(highlight=False, soft_wrap=True)
        self._log = log.open("a", encoding="utf-8") if log else None
        self._steps = steps
        self._lock = threading.Lock()
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("run", total=steps)
        self._live: Live | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._log:
            self._log.close()

    def say(self, text: str) -> None:
        """Print `text` and append it to log.txt."""
        self._rich.print(wrapped(text), markup=False)
        self._write(text)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the ten headline metrics of a finished step."""
        shown = {name: metrics[name] for name in HEADLINE if name in metrics}
        line = " ".join(f"{name} {value:.4g}" for name, value in shown.items())
        text = f"step {step}/{self._steps}: {line}; {where_the_gradient_went(metrics)}"
        self._write(text)
        if not self._rich.is_terminal:
            self._rich.print(wrapped(text), markup=False)
            return
        table = Table(box=None, show_header=False)
        for name, value in shown.items():
            table.add_row(name, f"{value:.4g}")
        uses = Table(box=None, show_header=False)
        for name, value in metrics.items():
            if name.startswith("gradient/"):
                uses.add_row(name, f"{value:.0f}", f"{value / max(1.0, metrics['gradient/sampled']):.1%}")
        self._progress.update(self._task, completed=step)
        if self._live is None:
            self._live = Live(console=self._rich, refresh_per_second=4)
            self._live.start()
        self._live.update(Stack(self._progress, Columns([table, uses], padding=(0, 4))))
        if step == self._steps:
            self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _write(self, text: str) -> None:
        if not self._log:
            return
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with self._lock:  # the heartbeat writes from another thread
                self._log.write(f"{stamp} {text}\n")
                self._log.flush()
        except OSError as error:  # the run continues and is still shown here
            self._log = None
            self._rich.print(f"log.txt ends here: {error.strerror}", markup=False)


def columns() -> int:
    """Return the columns of a line: COLUMNS if it is set, else the width of the terminal, at most WIDTH."""
    there = shutil.get_terminal_size((WIDTH, 24)).columns
    return there if os.environ.get("COLUMNS") else min(WIDTH, there)


def wrapped(text: str) -> str:
    """Return `text` wrapped between words. A word longer than a line, such as a path, stays whole.

    After a label ("placed     ...", "step 1/9: ..."), continuation lines are indented to the end of the label.
    """
    lines, width = [], columns()
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
            continue
        label = re.match(r"[\w ]{1,20}?  +(?=\S)|step \d+/\d+: ", line)
        indent = " " * (len(label[0]) if label else INDENT)
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, expand_tabs=False,
            replace_whitespace=False,
        )  # fmt: skip
    return "\n".join(lines)


def where_the_gradient_went(metrics: Mapping[str, float]) -> str:
    """Return the use of a step's sampled tokens as one line. Uses without tokens are left out."""
    names = [name for name in metrics if name.startswith("gradient/") and name != "gradient/sampled"]
    parts = [f"{metrics[name]:.0f} {name.removeprefix('gradient/')}" for name in names if metrics[name]]
    return f"{metrics['gradient/sampled']:.0f} token uses = {' + '.join(parts) or '0'}"
