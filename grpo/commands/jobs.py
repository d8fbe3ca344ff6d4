"""`grpo submit`, `jobs`, `status`, `logs` and `stop`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from grpo.cluster import jobs
from grpo.config import Config
from grpo.types import UserError


def jobs_command(parsed: argparse.Namespace) -> int:
    """List the jobs of a cluster, or show, follow or stop one. Return the exit code."""
    if parsed.command == "jobs":
        return jobs.jobs(parsed.address)
    jobs.refuse_odd_name(parsed.job)
    if parsed.command == "status":
        return jobs.status(parsed.job, parsed.address)
    if parsed.command == "logs":
        return jobs.follow(parsed.job, parsed.address)
    return jobs.stop(parsed.job, parsed.address)


def submit_command(config: Config, recipe: Path, asked: Mapping[str, str], parsed: argparse.Namespace) -> int:
    """Submit a recipe as a job. Return the exit code. Raises UserError without an address."""
    if parsed.address is None and parsed.then != "nothing":
        raise UserError("grpo submit needs --address http://HEAD:8265; only --dry-run does without it")
    return jobs.submit(
        config, recipe, asked, address=parsed.address or "", env=parsed.env, then=parsed.then,
        driver_cpus=parsed.driver_cpus,
    )  # fmt: skip
