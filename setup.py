"""Put recipes/ and reward_fns/ into the package, as grpo/recipes and grpo/reward_fns."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["grpo*"]), "grpo.recipes", "grpo.reward_fns"],
    package_dir={"grpo.recipes": "recipes", "grpo.reward_fns": "reward_fns"},
)
