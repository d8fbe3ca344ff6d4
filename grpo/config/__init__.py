"""Options and their defaults: build a frozen `Config` from a recipe (YAML) and `key=value` overrides.

    schema    all options: beside each its type, default, meaning, bounds, use, and treatment on resume and submit;
              schema_data and schema_algorithm have the sections of these names
    declare   what a field of the schema can declare
    options   the declarations by the full names of the options
    describe  descriptions of the options, for `grpo options`
    foreign   names of the options in other trainers, from foreign.yaml; aliases uses it to answer such names
    load      YAML and overrides -> Config; besides `MISSING`, only it and dump import omegaconf
    dump      Config -> YAML and back
    python    recipes and options as Python values
    rules     the declared bounds, and options that would have no effect
    validate  the batch algebra and other rules between options

All other modules see plain frozen dataclasses. Every mistake is a `UserError` that names the option, the value and the
nearest valid value.
"""

from __future__ import annotations

from grpo.config.aliases import written
from grpo.config.declare import OnResume, OnSubmit
from grpo.config.describe import meaning_text, options_text
from grpo.config.dump import dump, read_dump
from grpo.config.load import find_recipe, load, load_for_evaluation, refuse_flags, refuse_unknown
from grpo.config.options import declaration, general, leaves, values
from grpo.config.python import Recipe, Reward, Value, override_texts
from grpo.config.schema import (
    ClusterConfig,
    Config,
    LearnerConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SamplingConfig,
    part_names,
)
from grpo.config.schema_algorithm import AlgorithmConfig, CriticConfig, OptimizerConfig
from grpo.config.schema_data import DataConfig, DatasetConfig, EvalConfig, EvalSetConfig, TrainSetConfig
from grpo.config.validate import refuse_own_ray, validate
from grpo.config.validate_data import validate_gold

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
    "OnResume",
    "OnSubmit",
    "OptimizerConfig",
    "Recipe",
    "Reward",
    "RewardConfig",
    "RunConfig",
    "SamplerConfig",
    "SamplingConfig",
    "TrainSetConfig",
    "Value",
    "declaration",
    "dump",
    "find_recipe",
    "general",
    "leaves",
    "load",
    "load_for_evaluation",
    "meaning_text",
    "options_text",
    "override_texts",
    "part_names",
    "read_dump",
    "refuse_flags",
    "refuse_own_ray",
    "refuse_unknown",
    "validate",
    "validate_gold",
    "values",
    "written",
]
