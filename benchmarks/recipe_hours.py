"""Hours of the recipes as estimated by `grpo plan`, with assumed lengths for each recipe. Nothing is measured.

python -m benchmarks.recipe_hours                # a line for each recipe
python -m benchmarks.recipe_hours --write        # update the headers and docs/recipes.md after a change of the plan

The last line is one JSON object with the figures.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result import Figure, print_result
from grpo.config import Config, load
from grpo.planning.estimate import Lengths, estimate
from grpo.planning.shapes import GPUS, shape_of

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"

NAMES = {"A100": "a100-80", "H100": "h100", "H200": "h200"}
"""GPU name in a header -> GPU name of `grpo plan`."""

EVAL_ROWS = {
    "gsm8k": 1319, "gsm8k_test": 1319, "math500": 500, "aime24": 30, "amc23": 40, "minerva": 272, "olympiad": 674,
    "countdown_test": 512,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """Assumptions about a recipe."""

    prompt: int
    """Mean tokens of a prompt."""
    completion: int
    """Mean tokens of a completion over the whole run."""
    rounds: float = 1.0
    """Sampling rounds per step, including refills."""
    model: str | None = None
    """Known model of the same size, if `model.path` is created before the run."""


R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
ASSUMED = {
    "countdown_3b": Assumed(prompt=120, completion=500),
    "dapo_32b": Assumed(prompt=150, completion=5000, rounds=2.0),
    "dapo_7b": Assumed(prompt=150, completion=1500, model="Qwen/Qwen2.5-Math-7B"),
    "deepscaler_1.5b_8k": Assumed(prompt=120, completion=3500),
    "deepscaler_1.5b_16k": Assumed(prompt=120, completion=6000, model=R1),
    "deepscaler_1.5b_24k": Assumed(prompt=120, completion=8000, model=R1),
    "gsm8k_qwen2.5_0.5b": Assumed(prompt=120, completion=200),
    "gsm8k_qwen2.5_1.5b": Assumed(prompt=120, completion=200),
    "gsm8k_qwen2.5_7b": Assumed(prompt=120, completion=250),
    "math_drgrpo_7b": Assumed(prompt=120, completion=900),
    "math_simplerl_zoo_7b": Assumed(prompt=120, completion=1000),
    "tulu_rlvr_8b": Assumed(prompt=150, completion=350),
}


def gpus_of(recipe: Path) -> tuple[int, str]:
    """Return the number and kind of GPUs in the recipe's header: `# Hardware: 8 x H100 ...`."""
    found = re.search(r"^# Hardware: (\d+) x (\w+) ", recipe.read_text(), re.M)
    assert found, recipe
    return int(found[1]), found[2]


def evaluated(config: Config) -> tuple[int, int]:
    """Return the number of evaluations in the run, and of completions in each."""
    held_out = config.data.eval
    times = 2 + (max(0, (config.run.steps - 1) // held_out.every) if held_out.every else 0)
    asked = sum(EVAL_ROWS[s.name or ""] * (s.samples_per_prompt or held_out.samples_per_prompt) for s in held_out.sets)
    return times, asked


def hours(config: Config, gpu: str, gpus: int, assumed: Assumed) -> float:
    """Return the hours of a run on `gpus` GPUs, eight per machine. `gpu`: name in a header."""
    shape = shape_of(assumed.model or config.model.path)
    lengths = Lengths(prompt=assumed.prompt, completion=assumed.completion, longest=config.sampling.max_tokens)
    evaluations, completions = evaluated(config)
    return estimate(
        config, shape, GPUS[NAMES[gpu]], lengths, nodes=-(-gpus // 8), gpus_per_node=8, evaluations=evaluations,
        evaluated=completions, rounds=assumed.rounds,
    ).hours  # fmt: skip


def reckoned(recipe: Path) -> str:
    """Return the estimated hours of `recipe` with two digits, as in its header."""
    count, gpu = gpus_of(recipe)
    value = hours(load(recipe), gpu, count, ASSUMED[recipe.stem])
    return f"{float(f'{value:.2g}'):g}"


def main() -> None:
    page = ROOT / "docs" / "recipes.md"
    recipes: dict[str, Figure] = {}
    for name in ASSUMED:
        recipe = RECIPES / f"{name}.yaml"
        (count, gpu), found = gpus_of(recipe), reckoned(recipe)
        lengths = ASSUMED[name]
        print(
            f"{name:24} {count:4} x {gpu:6} {found:>5} h, prompts of {lengths.prompt} and completions of "
            f"{lengths.completion} tokens"
        )
        recipes[name] = {"gpus": count, "gpu": gpu, "hours": float(found)}
        if "--write" in sys.argv:
            recipe.write_text(re.sub(r"^# Hours: [\d.]+,", f"# Hours: {found},", recipe.read_text(), flags=re.M))
            row = re.compile(rf"^(\| `{re.escape(name)}` \|.*\|) [\d.]+ \|$", re.M)
            page.write_text(row.sub(rf"\g<1> {found} |", page.read_text()))
    print_result("recipe_hours", recipes=recipes)


if __name__ == "__main__":
    main()
