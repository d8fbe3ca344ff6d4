"""Options and their defaults: build a frozen `Config` from a recipe (YAML) and `key=value` overrides.

    schema    all options, with types, defaults and meanings
    describe  descriptions of the options, for `grpo options`
    foreign   names of the options in other trainers; aliases uses it to answer such names
    load      YAML and overrides -> Config; the only importer of omegaconf, except for `MISSING` in the schema
    values    recipes and options as Python values
    validate  the batch algebra, ranges, and options that would have no effect

All other modules see plain frozen dataclasses. Every mistake is a `UserError` that names the option, the value and the
nearest valid value.
"""

from __future__ import annotations

from grpo.config.aliases import written
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
from grpo.config.validate import refuse_own_ray, validate
from grpo.config.validate_data import validate_gold
from grpo.config.values import Recipe, Reward, Value, override_texts

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
    "Recipe",
    "Reward",
    "RewardConfig",
    "RunConfig",
    "SamplerConfig",
    "SamplingConfig",
    "TrainSetConfig",
    "Value",
    "dump",
    "load",
    "load_for_evaluation",
    "options_text",
    "override_texts",
    "part_names",
    "read_dump",
    "refuse_flags",
    "refuse_own_ray",
    "refuse_unknown",
    "validate",
    "validate_gold",
    "written",
]
