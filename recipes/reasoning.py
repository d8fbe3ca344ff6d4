"""Four-digit addition with visible working: create the data and base model of `recipes/reasoning_cpu.yaml`.

    python recipes/reasoning.py            # writes recipes/tiny/reasoning/, one to two minutes on two idle cores

The prompt is `4827+3596=`. The completion adds column by column, units first, and then writes the answer:

    7+6=13 2+9+1=12 8+5+1=14 4+3+1=8 ####8423

The third term of a column is the carry. The reward (`reward_fns/gsm8k.py`) reads only the number after `####`, not the
working. The splits share no pair of numbers, in either order:

    pretrain.jsonl   the base model is trained on these, working and answer (next-token loss on the completion)
    train.jsonl      GRPO draws its prompts from these
    eval.jsonl       held out from both; accuracy before and after is measured on these

The base is a character-level Qwen2 of 1.05M parameters. It is trained from scratch until it completes two fifths of the
development split correctly at temperature 1, working and answer. The working is needed: the same model, trained for the
same number of batches on the answers alone (`--answers-only`), reaches an accuracy of 0.0004. After correct working the
base gives the correct answer with probability 0.90 (`made_by.json`).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # run by -m, Python would search the working directory instead
import arithmetic

DIGITS = 4
SPLITS = {"pretrain": 20000, "dev": 128, "train": 8000, "eval": 500}
COMPLETION = "{working} ####{answer}"
CHARACTERS = "0123456789+= #"
PROMPT_TOKENS = 2 * DIGITS + 2
COMPLETION_TOKENS = 6 + 9 * (DIGITS - 1) + 5 + DIGITS + 1 + 1  # columns, the marker, the answer, the end
LAYERS = 4
TARGET_ACCURACY = 0.4  # share of the development problems with correct working and answer at temperature 1
MAX_BATCHES = 2000
BATCH = 64


def working(a: int, b: int) -> str:
    """Return the columns of a + b, units first: `7+6=13 2+9+1=12`. A carry is the third term of a column."""
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return " ".join(columns)


def number(text: str) -> int:
    """Return a number of DIGITS digits drawn by hash, so that the data does not depend on a library's RNG."""
    low = 10 ** (DIGITS - 1)
    return low + int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % (9 * low)


def problems() -> dict[str, list[dict[str, object]]]:
    """Return the four splits. Each pair of numbers occurs only once, in either order."""
    pairs: dict[tuple[int, ...], tuple[int, int]] = {}
    i = 0
    while len(pairs) < sum(SPLITS.values()):
        a, b = number(f"{arithmetic.SEED}:{i}:a"), number(f"{arithmetic.SEED}:{i}:b")
        pairs.setdefault(tuple(sorted((a, b))), (a, b))
        i += 1
    rows = iter({"question": f"{a}+{b}", "working": working(a, b), "answer": str(a + b)} for a, b in pairs.values())
    return {name: [next(rows) for _ in range(count)] for name, count in SPLITS.items()}


def make(folder: Path, *, untrained: bool = False) -> dict[str, object]:
    """Write data and base model to `folder`. Return facts to record."""
    splits = problems()
    arithmetic.write_splits(folder, splits)
    tokenizer = arithmetic.make_tokenizer(CHARACTERS)
    model = arithmetic.make_model(len(tokenizer), LAYERS)
    facts: dict[str, object] = {}
    if not untrained:
        tensors = {name: encode(rows, COMPLETION) for name, rows in splits.items()}
        parameters = sum(p.numel() for p in model.parameters())
        print(f"pre-training a {parameters / 1e6:.2f}M-parameter Qwen2 on {SPLITS['pretrain']} additions", flush=True)
        batches, accuracy = arithmetic.pretrain(
            model, tensors, target=TARGET_ACCURACY, batch_size=BATCH, max_batches=MAX_BATCHES
        )
        if accuracy < TARGET_ACCURACY:
            raise SystemExit(f"pre-training did not reach {TARGET_ACCURACY} in {batches} batches")
        ids, mask = tensors["dev"]
        behind = mask & ((ids == tokenizer.convert_tokens_to_ids("#")).cumsum(1) == 4)
        facts = {
            "batches": batches,
            "development_accuracy": round(accuracy, 4),
            "answer_accuracy_behind_right_working": round(arithmetic.sampled_accuracy(model, ids, behind), 4),
        }
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return facts


def encode(rows: list[dict[str, object]], completion: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `arithmetic.encode` of `rows`, at this task's length."""
    tokenizer = arithmetic.make_tokenizer(CHARACTERS)
    return arithmetic.encode(rows, tokenizer, completion, PROMPT_TOKENS + COMPLETION_TOKENS)


def answers_only(batches: int) -> float:
    """Return the accuracy of the same model after `batches` batches of the same problems without the working."""
    torch.manual_seed(arithmetic.SEED)
    model = arithmetic.make_model(len(arithmetic.make_tokenizer(CHARACTERS)), LAYERS)
    tensors = {name: encode(rows, "####{answer}") for name, rows in problems().items()}
    return arithmetic.pretrain(model, tensors, target=1.0, batch_size=BATCH, max_batches=batches)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recipes", "tiny", "reasoning"))
    parser.add_argument("--untrained", action="store_true", help="the model as it is initialised, in seconds")
    parser.add_argument("--answers-only", action="store_true", help="also train on the answers alone and say how well")
    a = parser.parse_args()
    version = arithmetic.version_of(arithmetic.__file__, __file__) + ("-untrained" if a.untrained else "")
    arithmetic.build(a.out, version, functools.partial(make, untrained=a.untrained))
    if a.answers_only:
        facts = json.loads((a.out / "made_by.json").read_text())
        print(f"{facts['batches']} batches on the answers alone: accuracy {answers_only(facts['batches']):.4f}")


if __name__ == "__main__":
    sys.exit(main())
