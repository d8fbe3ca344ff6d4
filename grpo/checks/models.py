"""Checks that the run's model can be trained: by its family, by vLLM, and by loading the learner without weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.checks import families
from grpo.config import Config, dump
from grpo.learner.paper import check_models
from grpo.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_trained(config: Config, settings: PreTrainedConfig, say: Callable[[str], None]) -> None:
    """Check that the model can be trained. `settings`: the model's config.json; `say` is called before slow checks.

    Raises UserError with the error that the run would fail with when its engines start.
    """
    families.refuse(config, settings)
    check_served(config, settings, say)
    check_models(config)


def check_served(config: Config, settings: PreTrainedConfig, say: Callable[[str], None]) -> None:
    """Check that vLLM can serve the model. Skipped if tests train its family and no `sampler.engine` options are set.

    Raises UserError with vLLM's objection.
    """
    if settings.model_type in families.TRAINED and not config.sampler.engine:
        return
    say(f"asking vLLM whether it can serve {config.model.path} ({settings.model_type})")
    with tempfile.TemporaryDirectory(prefix="grpo-check-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump(config), encoding="utf-8")
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        if not config.on_gpu:
            quiet["CUDA_VISIBLE_DEVICES"] = ""
        # a separate process, since vLLM takes seconds to import and changes the behaviour of transformers. It imports
        # this package from its location, and nothing from the working directory, whose files may have any names; nor
        # does the process that vLLM starts to inspect a model for the first time
        places = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        quiet |= {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "grpo.sampler.vllm.paper", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | quiet)
    if done.returncode:
        last = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"model.path={config.model.path}: the check whether vLLM can serve it failed: {last}")
    objection = json.loads(done.stdout.splitlines()[-1])
    if objection is not None:
        raise UserError(with_cause(str(objection), done.stdout + done.stderr))


def with_cause(objection: str, log: str) -> str:
    """Return vLLM's objection. If it only points to vLLM's log, append the last error of the log."""
    errors = re.findall(r"\b(\w+Error: .+)", log)
    return f"{objection}: {errors[-1].strip()}" if "check the logs" in objection and errors else objection
