"""`grpo view`."""

from __future__ import annotations

import argparse
import sys
from urllib.parse import parse_qsl, urlsplit

from grpo.types import ExitCode, UserError
from grpo.view import api
from grpo.view.visible import visible


def view_command(parsed: argparse.Namespace) -> ExitCode:
    """Serve runs in a browser, or write what is asked for: JSON, HTML or text. Return the exit code."""
    if parsed.step is not None and parsed.html is None:
        raise UserError("--step is for --html")
    if parsed.port is not None and not 0 <= parsed.port < 2**16:
        raise UserError(f"--port {parsed.port}: it must be a number from 0 to {2**16 - 1}")
    try:
        show(parsed)
    except UserError as error:  # it may name a file of the run, whose name may have control characters
        raise UserError(visible(str(error))) from error
    return ExitCode.DONE


def show(parsed: argparse.Namespace) -> None:
    """Serve or write what is asked for."""
    opened = api.open_paths(parsed.runs)
    if parsed.json is not None:
        print_json(opened, parsed.json)
    elif parsed.html is not None:
        from grpo.view.export import html_page  # noqa: PLC0415 - each form imports only what it needs

        page = html_page(opened, parsed.step)
        parsed.html.write_text(page, encoding="utf-8")
        print(f"{parsed.html}: {len(page.encode()) / 1e6:.1f} MB")
    elif parsed.text is not None:
        from rich.console import Console  # noqa: PLC0415

        from grpo.view.text import print_place  # noqa: PLC0415

        print_place(opened, parsed.text, Console(highlight=False, markup=False, emoji=False))
    else:
        from grpo.view.server import serve  # noqa: PLC0415

        try:
            serve(opened, parsed.port, say=lambda url: print(f"grpo view: {url}\nCtrl-C ends it", flush=True))
        except KeyboardInterrupt:
            print(file=sys.stderr)


def print_json(opened: api.Runs, asked: str) -> None:
    """Print the answer of an endpoint. `asked`: its path and query."""
    url = urlsplit(asked)
    for part in api.parts_of(api.answer(opened, url.path, dict(parse_qsl(url.query, keep_blank_values=True)))):
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()
