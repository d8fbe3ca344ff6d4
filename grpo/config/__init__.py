"""The one place for options and their defaults: a recipe (YAML) and `key=value` overrides become a frozen `Config`.

    schema    every option, its type, its default and what it means
    describe  the same in words, for `grpo options`
    foreign   what other trainers call them; aliases answers with it
    load      YAML and overrides -> Config; the only importer of omegaconf, with the schema's `MISSING`
    validate  the batch algebra, ranges, and options that would have no effect

Everyone else sees plain frozen dataclasses. Every mistake is a `UserError` that names the option, the value and the
nearest valid one.
"""

from __future__ import annotations

from grpo.config.describe import options_text
from grpo.config.load import dump, load, load_for_evaluation, read_dump, refuse_flags, refuse_unknown
from grpo.config.schema import (
    AlgorithmConfig,
    ClusterConfig,
    Config,
    CriticConfig,
    DataConfig,
    DatasetConfig,
    EvalConfig,
    EvalSetConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SamplingConfig,
    TrainSetConfig,
    part_names,
)
from grpo.config.validate import refuse_own_ray

__all__ = [
    "AlgorithmConfig",
    "ClusterConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DatasetConfig",
    "EvalConfig",
    "EvalSetConfig",
    "LearnerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RunConfig",
    "SamplerConfig",
    "SamplingConfig",
    "TrainSetConfig",
    "dump",
    "load",
    "load_for_evaluation",
    "options_text",
    "part_names",
    "read_dump",
    "refuse_flags",
    "refuse_own_ray",
    "refuse_unknown",
]
