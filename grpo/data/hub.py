"""Distinguish paths from hub ids, and bound the wait for an unreachable hub."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from grpo.suggest import suggest

PROBE_TIMEOUT_S = 5.0
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")


def is_path(name: str) -> bool:
    """Return whether `name` can only be a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.endswith(FILE_ENDINGS) or name.count("/") > 1


def nearest_path(path: Path) -> str:
    """Return `; did you mean ...?` for a path that does not exist, from the names in its folder."""
    parent = path.parent
    if not parent.is_dir():
        return f"; its folder {parent} does not exist either"
    return suggest(path.name, {other.name: str(other) for other in sorted(parent.iterdir())})


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Load hub ids from the hub inside this context, or only from the local cache when the hub does not answer.

    The libraries retry a dead connection for half a minute before they look into their cache. So one request with a
    short deadline probes the hub first. It uses their own client, so that proxies and HF_ENDPOINT apply. Yields a
    remark for the error message: empty when the hub answered.
    """
    if constants.is_offline_mode():
        yield " (offline mode is set, so only the local cache was searched)"
        return
    if _hub_answers():
        yield ""
        return
    switches = [module for module in (constants, sys.modules.get("datasets.config")) if module is not None]
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield f" ({constants.ENDPOINT} does not answer, so only the local cache was searched)"
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


@functools.cache
def _hub_answers() -> bool:
    """Probe the hub, once per process. Any HTTP response counts: the real request reports a rejection."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_TIMEOUT_S)
    except (HTTPError, OSError):
        return False
    return True
