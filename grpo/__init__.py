"""GRPO training with a vLLM sampler, a DeepSpeed learner and Ray between them. Start at `grpo.driver`."""

import os

# Ray reads these when it is imported, so they stand here. Clusters authenticate by token unless the user says so.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

__version__ = "0.1.0"
