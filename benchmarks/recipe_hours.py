"""Hours that the recipes are reckoned to take: a rule of thumb from their options, nothing measured.

    python -m benchmarks.recipe_hours        # a line for each recipe

Samplers give SAMPLER_SHARE x SAMPLER_ROWS completions' tokens for each time that the weights are read from memory, at
most SAMPLER_CAP tokens a second; learner ranks reach LEARNER_SHARE of the GPU's bfloat16 peak, with 6 flops per
parameter and token, 2 more for checkpointing, for the old logprobs and for the reference each. The two take turns, as
they do here. All that is not counted (rewards, sync, waiting for the last completions) makes it REST times as long.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from grpo.config import Config, load

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SAMPLER_SHARE, SAMPLER_ROWS, SAMPLER_CAP = 0.15, 128, 15_000.0
LEARNER_SHARE = 0.3
REST = 1.2

GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
"""bfloat16 flops without sparsity and bytes of memory read, both in a second, by NVIDIA's data sheets."""

EVAL_ROWS = {
    "gsm8k": 1319, "gsm8k_test": 1319, "math500": 500, "aime24": 30, "amc23": 40, "minerva": 272, "olympiad": 674,
    "countdown_test": 512,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What a recipe does not say."""

    parameters: float
    prompt: int
    """Tokens of the mean prompt,"""
    completion: int
    """and of the mean completion over the whole run."""
    rounds: float = 1.0
    """How often a step samples, with the refills."""


ASSUMED = {
    "countdown_3b": Assumed(parameters=3.1e9, prompt=120, completion=500),
    "dapo_32b": Assumed(parameters=32.8e9, prompt=150, completion=5000, rounds=2.0),
    "dapo_7b": Assumed(parameters=7.6e9, prompt=150, completion=1500),
    "deepscaler_1.5b_8k": Assumed(parameters=1.8e9, prompt=120, completion=3500),
    "deepscaler_1.5b_16k": Assumed(parameters=1.8e9, prompt=120, completion=6000),
    "deepscaler_1.5b_24k": Assumed(parameters=1.8e9, prompt=120, completion=8000),
    "gsm8k_qwen2.5_0.5b": Assumed(parameters=0.5e9, prompt=120, completion=200),
    "gsm8k_qwen2.5_1.5b": Assumed(parameters=1.5e9, prompt=120, completion=200),
    "gsm8k_qwen2.5_7b": Assumed(parameters=7.6e9, prompt=120, completion=250),
    "math_drgrpo_7b": Assumed(parameters=7.6e9, prompt=120, completion=900),
    "math_simplerl_zoo_7b": Assumed(parameters=7.6e9, prompt=120, completion=1000),
    "tulu_rlvr_8b": Assumed(parameters=8.0e9, prompt=150, completion=350),
}


def gpus_of(recipe: Path) -> tuple[int, str]:
    """How many GPUs of which kind the recipe's header names: `# Hardware: 8 x H100 ...`."""
    found = re.search(r"^# Hardware: (\d+) x (\w+) ", recipe.read_text(), re.M)
    assert found, recipe
    return int(found[1]), found[2]


def hours(config: Config, gpu: str, assumed: Assumed) -> float:
    """Hours of a run on GPUs of this kind."""
    peak, bandwidth = GPUS[gpu]
    a, held_out = config.algorithm, config.data.eval
    rollouts = config.run.steps * a.prompts_per_step * a.group_size
    evaluations = 2 + (max(0, (config.run.steps - 1) // held_out.every) if held_out.every else 0)
    asked = sum(EVAL_ROWS[s.name or ""] * (s.samples_per_prompt or held_out.samples_per_prompt) for s in held_out.sets)
    sampled = (rollouts * assumed.rounds + evaluations * asked) * assumed.completion
    memory_bound = SAMPLER_SHARE * SAMPLER_ROWS * bandwidth * config.sampler_workers / (2 * assumed.parameters)
    rate = min(SAMPLER_CAP, memory_bound)
    flops_per_parameter = 6 + 2 * (
        config.learner.gradient_checkpointing + (config.optimizer_steps_per_step > 1) + (a.kl_coef > 0)
    )
    flops = flops_per_parameter * assumed.parameters * rollouts * (assumed.prompt + assumed.completion)
    sampling = sampled / (rate * config.cluster.samplers)
    learning = flops / (LEARNER_SHARE * peak * config.cluster.learner_ranks)
    return REST * (sampling + learning) / 3600


def reckoned(recipe: Path) -> str:
    """As it stands in the header: two digits."""
    value = hours(load(recipe), gpus_of(recipe)[1], ASSUMED[recipe.stem])
    return f"{float(f'{value:.2g}'):g}"


def main() -> None:
    for name in ASSUMED:
        recipe = RECIPES / f"{name}.yaml"
        count, gpu = gpus_of(recipe)
        print(f"{name:24} {count:4} x {gpu:6} {reckoned(recipe):>5} h")


if __name__ == "__main__":
    main()
