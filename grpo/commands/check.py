"""`grpo check`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from grpo.checks import check
from grpo.cluster import session as cluster
from grpo.commands.train import print_progress
from grpo.config import Config
from grpo.run import folder as run_folder
from grpo.run.console import wrapped
from grpo.types import ExitCode


def check_command(config: Config, recipe: Path, *, ids: bool) -> ExitCode:
    """Check a recipe and the cluster, and print the plan. `ids`: with the token ids of the first prompt."""
    run_folder.choose(config, str(recipe))  # refuses a name that is in use
    config = check.resolve_paths(config)
    with tempfile.TemporaryDirectory(prefix="grpo-check-") as log_dir:
        plan = check.check(config, recipe, Path(log_dir), say=print_progress, ids=ids)
    with cluster.session(config, None):
        pass
    print(wrapped("\n".join([*plan.lines, "ok         nothing has been started"])))
    return ExitCode.DONE
