"""GRPO training with a vLLM sampler and a DeepSpeed learner, connected by Ray. Start reading at `grpo.driver`.

    run = grpo.train("recipe.yaml", {"run.steps": 10}, rewards=[function])
    grpo.evaluate(run)

Only the names in `__all__` are promised. They are imported when they are used, so that `import grpo` takes no time.
"""

import os

# Ray reads these variables on import. Clusters authenticate by token unless the user configures otherwise.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# type checkers take it for true; typing itself is not imported, which a typing.py in the working directory would shadow
TYPE_CHECKING = False
if TYPE_CHECKING:
    from grpo.lifecycle.api import Run, UserError, evaluate, load_config, train

__version__ = "0.1.0"
__all__ = ["Run", "UserError", "evaluate", "load_config", "train"]

if not TYPE_CHECKING:  # so that a type checker knows the names above and no others

    def __getattr__(name: str):
        """Import a promised name."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from grpo.lifecycle import api  # noqa: PLC0415 - it takes seconds

        globals()[name] = getattr(api, name)
        return globals()[name]

    def __dir__() -> list[str]:
        """Return the names in the module, for completion in notebooks."""
        return sorted({*globals(), *__all__})
