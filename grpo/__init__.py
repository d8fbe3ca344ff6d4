"""GRPO training with a vLLM sampler and a DeepSpeed learner, connected by Ray. Start reading at `grpo.driver`."""

import os

# Ray reads these variables on import. Clusters authenticate by token unless the user configures otherwise.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

__version__ = "0.1.0"
