"""Check the learner's models on paper (shapes without values), so that errors are known before an engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from grpo.config import Config
from grpo.data import hub_or_cache
from grpo.learner import heads
from grpo.suggest import one_line
from grpo.types import UserError


def check_models(config: Config) -> None:
    """Load the policy and the critic as the learner does, with the shapes of their weights but without their values.

    Raises UserError for a model that the learner would refuse or could not load.
    """
    with _quiet(), hub_or_cache() as remark:
        option = f"model.path={config.model.path}"
        try:
            heads.install(heads.load_policy(config, on_paper=True), config)
            if config.algorithm.advantage == "gae":
                option = f"critic.path={config.critic.path or config.model.path}"
                heads.load_critic(config, on_paper=True)
        except UserError:
            raise
        except Exception as error:  # a model's code may raise anything
            raise UserError(f"{option}{remark}: the learner cannot load it: {one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading reports off the console; the problems that matter are raised as errors."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
