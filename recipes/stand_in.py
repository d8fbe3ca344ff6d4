"""Run any recipe for two steps on a laptop, with tiny stand-ins for its model and data sets.

    python recipes/stand_in.py recipes/dapo_7b.yaml     # makes recipes/tiny/stand_in/ once, then runs the recipe

The model is a Qwen2 of 0.1M parameters with random weights and a vocabulary of bytes, so that it accepts any text. A
few answers are single tokens with raised probability, so that some completions are correct and groups have spread. The
data rows were written for this file and have the columns of the data sets on the hub. `overrides` replaces only large
settings: model, data, lengths, batches, engines, steps. Objective, templates, columns, filters, graders, schedule,
evaluation and saving are the recipe's. Nothing can be learned here.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo.commands import cli
from grpo.config import EvalSetConfig, SamplerConfig, TrainSetConfig, find_recipe, load
from grpo.data import is_path

sys.path.insert(0, str(Path(__file__).parent))  # run by -m, Python would search the working directory instead
from arithmetic import locked

TINY = Path("recipes", "tiny", "stand_in").absolute()
"""Below the working directory, as what the other scripts make."""
STEPS, TOKENS, PROMPT_TOKENS = 2, 12, 2048
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ANSWERS = [
    *(f"{form}{n}{end}" for n in (1, 2, 3) for form, end in (("\\boxed{", "}"), ("#### ", ""), ("Answer: ", ""))),
    "thinking</think>", "<answer>1 + 2 + 3</answer>", "<answer>6 - 2 * 1</answer>",
]  # fmt: skip
"""Tokens that are, or complete, an answer to the rows below."""
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QUESTIONS = [
    (f"{who} has {a} {what} and {does}. How many {what} are there now?", str(answer))
    for who, a in (("Ada", 1), ("Ben", 2), ("Cleo", 3), ("Dan", 4))
    for what in ("apples", "books", "cups", "dice", "eggs")
    for does, answer in ((f"gives {a - 1} away", 1), (f"gets {3 - a} more" if a < 3 else f"loses {a - 3}", 3))
]
PLAIN = [{"question": q, "answer": a} for q, a in QUESTIONS]
MATH = [
    {"problem": q, "solution": f"It is \\boxed{{{a}}}.", "answer": a, "level": 1 + i % 5, "subject": "Algebra"}
    for i, (q, a) in enumerate(QUESTIONS)
]
DATA: dict[str, list[dict[str, Any]]] = {
    "openai/gsm8k:main": [{"question": q, "answer": f"Counting gives {a}.\n#### {a}"} for q, a in QUESTIONS],
    "nlile/hendrycks-MATH-benchmark": MATH,
    "EleutherAI/hendrycks_math:algebra": [
        {"problem": row["problem"], "level": f"Level {row['level']}", "type": "Algebra", "solution": row["solution"]}
        for row in MATH
    ],
    "agentica-org/DeepScaleR-Preview-Dataset": [
        {"problem": q, "answer": a, "solution": ""} for q, a in QUESTIONS
    ],
    "BytedTsinghua-SIA/DAPO-Math-17k": [
        {
            "data_source": "math_dapo", "prompt": [{"role": "user", "content": q}], "ability": "MATH",
            "reward_model": {"ground_truth": a, "style": "rule"}, "extra_info": {"index": str(i)},
        }
        for i, (q, a) in enumerate(QUESTIONS)
    ],
    "open-r1/DAPO-Math-17k-Processed:all": [
        {
            "prompt": q, "solution": a, "data_source": "math_dapo", "ability": "MATH",
            "source_prompt": [{"role": "user", "content": q}], "reward_model": {"ground_truth": a, "style": "rule"},
        }
        for q, a in QUESTIONS
    ],
    "Jiayi-Pan/Countdown-Tasks-3to4": [
        {"nums": list(nums), "target": target}
        for three, target in (((1, 2, 3), 6), ((1, 2, 6), 4))
        for nums in itertools.permutations(three)
    ],
    "HuggingFaceH4/MATH-500": MATH,
    "HuggingFaceH4/aime_2024": [{"problem": q, "solution": "", "answer": a} for q, a in QUESTIONS],
    "math-ai/amc23": PLAIN,
    "math-ai/minervamath": PLAIN,
    "Hothan/OlympiadBench:OE_TO_maths_en_COMP": [{"question": q, "final_answer": [a]} for q, a in QUESTIONS],
}  # fmt: skip
"""Data set on the hub -> rows with its columns. The last quarter of the rows is used for evaluation."""


def stand_in_for(path: str, part: str) -> Path:
    """Return the file that replaces the data set `path`. `part`: train or eval. Local files are replaced by a file with
    the columns question and answer."""
    name = "local" if path not in DATA and is_path(path) else path
    if name not in (*DATA, "local"):
        raise SystemExit(
            f"there is no stand-in for the data set {path}; add rows with its columns to {Path(__file__).name}"
        )
    return TINY / "data" / f"{name.replace('/', '--').replace(':', '--')}-{part}.jsonl"


def overrides(recipe: Path) -> list[str]:
    """Return the options that make `recipe` small: paths, lengths, batches, engines and steps. Others are unchanged."""
    c = load(recipe)
    minibatches = min(4, c.algorithm.minibatches_per_step)
    ranks = min(2, c.cluster.learner_ranks)
    out = [
        f"model.path={TINY / 'model'}", "model.dtype=float32", "model.float32_head=false",
        f"data.max_prompt_tokens={PROMPT_TOKENS}", f"sampling.max_tokens={TOKENS}",
        f"learner.tokens_per_microbatch={2 * (PROMPT_TOKENS + TOKENS)}", f"cluster.learner_ranks={ranks}",
        "cluster.device=cpu", "cluster.sleep=null", "cluster.learner_cpus=0.5", "cluster.sampler_cpus=0.5",
        "cluster.samplers=1", "cluster.tensor_parallel=1", "cluster.reward_nodes=0",
        "sampler.max_num_seqs=64", "sampler.kv_cache_gib=null",
        f"sampler.gpu_memory_utilization={SamplerConfig().gpu_memory_utilization}",
        f"algorithm.minibatches_per_step={minibatches}", f"algorithm.prompts_per_step={max(4, minibatches)}",
        f"algorithm.group_size={min(4, c.algorithm.group_size)}",
        f"run.steps={STEPS}", f"run.name=stand_in_{recipe.stem}", "run.tensorboard=false", "cluster.reward_workers=1",
    ]  # fmt: skip
    if c.algorithm.constant_length:
        out.append(f"algorithm.constant_length={TOKENS}")
    if c.algorithm.length_penalty_tokens:
        out.append(f"algorithm.length_penalty_tokens={TOKENS // 2}")
    if c.run.save_every:
        out.append("run.save_every=1")
    for i, train in enumerate(c.data.train):
        option = f"data.train[{i}]"
        out += [f"{option}.path={stand_in_for(train.path, 'train')}", f"{option}.split={TrainSetConfig().split}"]
    for i, held_out in enumerate(c.data.eval.sets):
        option = f"data.eval.sets[{i}]"
        out += [
            f"{option}.path={stand_in_for(held_out.path, 'eval')}", f"{option}.split={EvalSetConfig().split}",
            f"{option}.limit=2", f"{option}.samples_per_prompt={min(2, held_out.samples_per_prompt or 2)}",
        ]  # fmt: skip
    if c.data.eval.sets:
        out.append("data.eval.samples_per_prompt=1")
        out.append(f"data.eval.every={min(1, c.data.eval.every)}")
    if c.data.eval.max_tokens:
        out.append(f"data.eval.max_tokens={TOKENS}")
    return out


def make() -> Path:
    """Create model and data in TINY within seconds, unless this version of the file has created them. Return TINY."""
    with locked(TINY):
        return _make()


def _make() -> Path:
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    stamp = TINY / "made_by.txt"
    if stamp.exists() and stamp.read_text() == version:
        return TINY
    staging = TINY.with_name(f"{TINY.name}.{os.getpid()}.partial")
    (staging / "data").mkdir(parents=True)
    for path, rows in {**DATA, "local": PLAIN}.items():
        cut = len(rows) * 3 // 4
        for part, some in (("train", rows[:cut]), ("eval", rows[cut:])):
            file = staging / "data" / stand_in_for(path if path in DATA else "./local.jsonl", part).name
            file.write_text("".join(json.dumps(row) + "\n" for row in some))
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(staging / "model")
    tokenizer.save_pretrained(staging / "model")
    (staging / "made_by.txt").write_text(version)
    shutil.rmtree(TINY, ignore_errors=True)
    staging.rename(TINY)
    return TINY


def make_wide() -> Path:
    """Return the folder of a random model as wide as a real one. Create it if it is missing, within seconds.

    115M parameters in bfloat16: hidden size 640, 12 layers, 10 heads that share 2 key-value heads, an untied vocabulary
    of 49,153. It exposes errors that occur only beyond toy size. Heads can be split in two, and so can the vocabulary
    with padding.
    """
    folder = TINY.with_name("wide")
    with locked(folder):
        return _make_wide(folder)


def _make_wide(folder: Path) -> Path:
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    stamp = folder / "made_by.txt"
    if stamp.exists() and stamp.read_text() == version:
        return folder
    staging = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_153, hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10,
            num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.05,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).to(torch.bfloat16)  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms are initialized to 1, from which those of trained models differ
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / "made_by.txt").write_text(version)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return folder


def make_tokenizer() -> Qwen2Tokenizer:
    """Return Qwen's tokenizer without merges: a token per byte, the chat template's special tokens, and ANSWERS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token=None, eos_token=END, pad_token=END
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START, STOP]})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ANSWERS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Return a model with random weights.

    The rows of ANSWERS and of the end token in the vocabulary projection are scaled up, so that these tokens are common
    in some contexts. Head size 32 is the smallest that vLLM's CPU attention supports.
    """
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids([END, *ANSWERS])] *= 20
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=find_recipe)
    parser.add_argument("more", nargs="*", help="further overrides, as section.option=value")
    given = parser.parse_args()
    make()
    return cli.main(["train", str(given.recipe), *overrides(given.recipe), *given.more])


if __name__ == "__main__":
    sys.exit(main())
