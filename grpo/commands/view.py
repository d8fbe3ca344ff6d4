"""`grpo view`."""

from __future__ import annotations

import argparse
import sys
from urllib.parse import parse_qsl, urlsplit

from grpo.types import ExitCode
from grpo.view import api


def view_command(parsed: argparse.Namespace) -> ExitCode:
    """Serve runs in a browser, or write what is asked for: JSON, HTML or text. Return the exit code."""
    opened = api.open_paths(parsed.runs)
    if parsed.json is not None:
        return print_json(opened, parsed.json)
    from grpo.view.server import serve  # noqa: PLC0415 - the other forms do not need the server

    try:
        serve(opened, parsed.port, say=lambda url: print(f"grpo view: {url}\nCtrl-C ends it", flush=True))
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return ExitCode.DONE


def print_json(opened: api.Runs, asked: str) -> ExitCode:
    """Print the answer of an endpoint. `asked`: its path and query."""
    url = urlsplit(asked)
    found = api.answer(opened, url.path, dict(parse_qsl(url.query, keep_blank_values=True)))
    out = sys.stdout.buffer
    for part in api.parts_of(found):
        out.write(part)
    out.flush()
    return ExitCode.DONE
