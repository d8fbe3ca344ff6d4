"""Two-digit addition: create the data and the tiny base model of `recipes/arithmetic_cpu.yaml`.

    python recipes/arithmetic.py            # writes recipes/tiny/arithmetic/, seconds to a minute on two cores
    python -m grpo.recipes.arithmetic       # the same where the package is installed

The folder is made below the working directory, where the recipe looks for it.

Each problem is `a+b=` with 10 <= a, b <= 99. The digits of the answer are reversed (units first), because carries
become known in that order. The 8,100 problems are split by hash into files that share no problem:

    pretrain.jsonl   the base model is trained on these, including the answers (next-token loss on the answer)
    train.jsonl      GRPO draws its prompts from these; the base model has never seen them
    eval.jsonl       held out from both; accuracy before and after is measured on these

The base model is a character-level Qwen2 of 0.79M parameters. It is trained from scratch until it answers about half of
the held-out development split (dev.jsonl) at temperature 1. It sometimes succeeds, so GRPO has something to reinforce.
The result is cached: the script does nothing if this version of the script created the folder.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SEED = 0
SPLITS = {"pretrain": 3600, "dev": 400, "train": 3300, "eval": 800}
TARGET_ACCURACY = 0.5  # of the development problems, sampled at temperature 1
MAX_BATCHES = 4000
BATCH = 256


def problems() -> dict[str, list[dict[str, object]]]:
    """Return all problems in four splits, ordered by a hash so that the split does not depend on a library's RNG."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    pairs.sort(key=lambda p: hashlib.sha256(f"{SEED}:{p[0]}+{p[1]}".encode()).digest())
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)[::-1], "sum": a + b} for a, b in pairs]
    out, start = {}, 0
    for name, count in SPLITS.items():
        out[name], start = rows[start : start + count], start + count
    assert start == len(rows)
    return out


def make_tokenizer(characters: str = "0123456789+=") -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character. `<eos>` is also the padding token."""
    vocab = {token: i for i, token in enumerate(["<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_model(vocab_size: int, layers: int = 3) -> Qwen2ForCausalLM:
    """Return a random model with 0.26M parameters per layer and tied embeddings.

    Head size 32 is the smallest that vLLM's CPU attention supports.
    """
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def encode(
    rows: list[dict[str, object]], tokenizer: PreTrainedTokenizerFast, completion: str = "{answer}", length: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [N, length], padded with EOS, and the target mask [N, length], true on completion and first EOS."""
    ids, mask = [], []
    for row in rows:
        prompt = tokenizer.encode(f"{row['question']}=")
        target = [*tokenizer.encode(completion.format(**row)), tokenizer.eos_token_id]
        pad = length - len(prompt) - len(target)
        ids.append(prompt + target + [tokenizer.eos_token_id] * pad)
        mask.append([False] * len(prompt) + [True] * len(target) + [False] * pad)
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the probability, at temperature 1, that all tokens under the mask are sampled correctly.

    It is the mean over problems of the product of those tokens' probabilities. It is exact, so that the end of
    pre-training does not depend on sampling noise.
    """
    logprobs = F.log_softmax(model(input_ids=ids[:, :-1]).logits, -1)
    picked = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    return (picked * mask[:, 1:]).sum(1).exp().mean().item()


def pretrain(
    model: Qwen2ForCausalLM,
    splits: dict[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    target: float = TARGET_ACCURACY,
    batch_size: int = BATCH,
    max_batches: int = MAX_BATCHES,
) -> tuple[int, float]:
    """Train with AdamW on the completions of the pre-training split, until the accuracy on the development split
    reaches `target` or for `max_batches`. Return the number of batches and the accuracy."""
    ids, mask = splits["pretrain"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(SEED)
    for batch in range(1, max_batches + 1):
        rows = torch.randint(len(ids), (batch_size,), generator=generator)
        logits = model(input_ids=ids[rows, :-1]).logits
        keep = mask[rows, 1:]
        loss = F.cross_entropy(logits[keep], ids[rows, 1:][keep])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if batch % 5 == 0:
            accuracy = sampled_accuracy(model, *splits["dev"])
            if batch % 100 == 0 or accuracy >= target:
                print(f"  batch {batch}: loss {loss.item():.3f}, development accuracy {accuracy:.3f}", flush=True)
            if accuracy >= target:
                break
    return batch, accuracy


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make other processes that make the folder `out` wait until the end of the block."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(out: Path, version: str, make: Callable[[Path], dict[str, object]]) -> None:
    """Fill the folder `out` by `make(staging folder)`, unless `version` created it. `make` returns facts to record."""
    with locked(out):
        stamp = out / "made_by.json"
        if stamp.exists() and json.loads(stamp.read_text())["script"] == version:
            print(f"base model and data are in {out} already", flush=True)
            return
        started = time.time()
        torch.manual_seed(SEED)
        staging = out.with_name(out.name + ".partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        facts = {"script": version, "seed": SEED, **make(staging)}
        (staging / "made_by.json").write_text(json.dumps(facts) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
        print(f"base model and data written to {out} in {time.time() - started:.0f} s", flush=True)


def version_of(*scripts: str) -> str:
    """Return a hash of the scripts' current text, by which `build` recognizes their version."""
    return hashlib.sha256(b"".join(Path(script).read_bytes() for script in scripts)).hexdigest()[:16]


def write_splits(folder: Path, splits: dict[str, list[dict[str, object]]]) -> None:
    """Write one .jsonl file per split."""
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: Path) -> dict[str, object]:
    """Write data and base model to `folder`. Return facts to record."""
    tokenizer = make_tokenizer()
    splits = problems()
    write_splits(folder, splits)
    model = make_model(len(tokenizer))
    count = sum(p.numel() for p in model.parameters())
    print(f"pre-training a {count / 1e6:.2f}M-parameter Qwen2 on {len(splits['pretrain'])} additions", flush=True)
    batches, accuracy = pretrain(model, {name: encode(rows, tokenizer) for name, rows in splits.items()})
    if accuracy < TARGET_ACCURACY:
        raise SystemExit(f"pre-training did not reach {TARGET_ACCURACY} in {batches} batches")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {"batches": batches, "development_accuracy": round(accuracy, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recipes", "tiny", "arithmetic"))
    build(parser.parse_args().out, version_of(__file__), make)


if __name__ == "__main__":
    sys.exit(main())
