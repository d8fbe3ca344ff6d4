"""Sizes of models and data-sheet values of GPUs.

The shape of a model comes from the config.json of its folder. For hub ids it comes from `KNOWN`, which has the numbers
of their config.json.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.types import UserError

FAMILIES = ("qwen2", "qwen3", "llama")
"""Model types whose parameters are counted exactly here."""
VOCAB_PADDING = 64
"""vLLM's DEFAULT_VOCAB_PADDING_SIZE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense decoder with gated feed-forward layers and grouped-query attention."""

    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    """Embedding and vocabulary projection share one matrix."""

    @property
    def queries(self) -> int:
        """Return the width of a token's queries in a layer."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Return the width of a token's keys in a layer, which is also the width of its values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def body(self) -> int:
        """Return the number of parameters of the layers and the last norm."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        if self.family == "qwen2":
            attention += self.queries + 2 * self.keys  # biases
        if self.family == "qwen3":
            attention += 2 * self.head_dim  # norms of queries and keys
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.embedding * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Return the number of parameters that a token is multiplied with: all except the embedding, which is a
        lookup."""
        return self.body + self.embedding

    def over(self, parts: int) -> Shape:
        """Return the total shape on `parts` GPUs that share every layer. If there are more GPUs than key-value heads,
        each GPU has a copy of one head."""
        return replace(self, kv_heads=max(self.kv_heads, parts))

    def kv_bytes(self, itemsize: int) -> int:
        """Return the bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.keys * itemsize


def _known(sizes: str, *, family: str = "qwen2", tied: bool = False, head_dim: int = 128) -> Shape:
    vocab, hidden, intermediate, layers, heads, kv_heads = map(int, sizes.split())
    return Shape(
        family=family, vocab=vocab, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, tied=tied,
    )  # fmt: skip


_QWEN_1_5B = _known("151936 1536 8960 28 12 2", tied=True)
_QWEN_7B = _known("152064 3584 18944 28 28 4")

KNOWN = {
    "Qwen/Qwen2.5-0.5B": _known("151936 896 4864 24 14 2", tied=True, head_dim=64),
    "Qwen/Qwen2.5-1.5B": _QWEN_1_5B,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN_1_5B,
    "Qwen/Qwen2.5-3B": _known("151936 2048 11008 36 16 2", tied=True),
    "Qwen/Qwen2.5-7B": _QWEN_7B,
    "Qwen/Qwen2.5-Math-7B": _QWEN_7B,
    "Qwen/Qwen2.5-32B": _known("152064 5120 27648 64 40 8"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _known("151936 1536 8960 28 12 2"),
    "meta-llama/Llama-3.1-8B": _known("128256 4096 14336 32 32 8", family="llama"),
    "allenai/Llama-3.1-Tulu-3-8B-DPO": _known("128264 4096 14336 32 32 8", family="llama"),
}
"""Shapes by hub id: vocabulary, hidden, intermediate, layers, heads and key-value heads from its config.json. The
Instruct models of Qwen2.5 have the shapes of their base models."""


def split_problems(
    tensor: int, pipeline: int, *, heads: int, kv_heads: int, intermediate: int, vocab: int, layers: int
) -> list[str]:
    """Return the reasons why vLLM cannot split a model over `cluster.tensor_parallel` x `cluster.pipeline_parallel`
    workers, with the nearest valid values. An unknown size is 0."""

    def obstacle(parts: int) -> str:
        padded = -(-vocab // VOCAB_PADDING) * VOCAB_PADDING
        if heads % parts:
            return f"does not divide the model's {heads} attention heads"
        if kv_heads % parts and parts % kv_heads:
            return f"neither divides the model's {kv_heads} key-value heads nor is a multiple of them"
        if intermediate % parts:
            return f"does not divide the model's feed-forward width of {intermediate}"
        if padded % parts:
            return f"does not divide the model's vocabulary, padded to {padded}"
        return ""

    out = []
    if obstacle(tensor):
        works = [parts for parts in range(1, max(tensor, heads) + 1) if not obstacle(parts)]
        nearest = min(works, key=lambda parts: abs(parts - tensor))
        out.append(f"cluster.tensor_parallel={tensor} {obstacle(tensor)}; nearest: {nearest}")
    if 0 < layers < pipeline:
        out.append(f"cluster.pipeline_parallel={pipeline} is more than the model's {layers} layers; nearest: {layers}")
    return out


def refuse_outer_folder(option: str, path: str) -> None:
    """Raise UserError for a folder that is not a model itself, such as a run folder, naming the model folder inside it
    if there is one."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    inside = model_inside(folder)
    if inside is not None:
        raise UserError(f"{option}={path} has no config.json, the model is in a folder inside it: {option}={inside}")
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"{option}={path} is a run's folder without a model: model/ is written at the run's end, and into every "
            "checkpoint with run.save_model=true"
        )
    raise UserError(f"{option}={path} has no config.json, and no folder inside it has one: it is not a model's folder")


def model_inside(folder: Path) -> Path | None:
    """Return the model folder inside the folder of a run, a checkpoint or a cache, or None.

    The final model of a run takes precedence over the models of its checkpoints. Of several models, the one with the
    highest number is returned.
    """
    for pattern in ("model", "checkpoints/*/model", "snapshots/*", "*", "*/*"):
        found = [file.parent for file in folder.glob(f"{pattern}/config.json")]
        if found:
            return max(
                found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name + path.parent.name)]
            )
    return None


def shape_of(path: str) -> Shape:
    """Return the shape of the model at `path`, a folder or a hub id.

    Raises UserError if the model is unknown, or if its family is not in FAMILIES.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return _read(folder / "config.json")
    refuse_outer_folder("model.path", path)
    found = KNOWN.get(path.removesuffix("-Instruct"))
    if found is None:
        near = difflib.get_close_matches(path, KNOWN, n=1, cutoff=0.0)[0]
        raise UserError(
            f"model.path={path}: no folder with a config.json, and no model whose sizes are known here; give one of "
            f"the same size, e.g. model.path={near}; known are {', '.join(KNOWN)}"
        )
    return found


def _read(file: Path) -> Shape:
    settings = _planned(file)

    def size(name: str) -> int:
        value = settings[name]
        if type(value) is not int or value < 1:  # true is an int
            raise UserError(f"{file}: {name}={json.dumps(value)} must be a whole number, at least 1")
        return value

    try:
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = heads if settings.get("num_key_value_heads") is None else size("num_key_value_heads")
        own = settings.get("head_dim") is not None
        if hidden % heads and not own:
            raise UserError(
                f"{file}: num_attention_heads={heads} must divide hidden_size={hidden}: there is no head_dim"
            )
        if heads % kv_heads:
            raise UserError(f"{file}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
        return Shape(
            family=settings["model_type"],
            vocab=size("vocab_size"),
            hidden=hidden,
            intermediate=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size("head_dim") if own else hidden // heads,
            tied=settings.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"{file} lacks {error.args[0]}") from error


def _planned(file: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises UserError if it is damaged, or if the parameters of such a model are not counted here.
    """
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} must hold a mapping, as save_pretrained writes it, not {json.dumps(settings)[:40]}")
    if "model_type" not in settings:
        raise UserError(f"{file} lacks model_type")
    if settings["model_type"] not in FAMILIES:
        raise UserError(f"{file}: model_type={settings['model_type']} is not planned; there are {', '.join(FAMILIES)}")
    for name in ("attention_bias", "mlp_bias"):
        if settings.get(name):
            raise UserError(f"{file}: {name}=true is not planned: its parameters are not counted")
    if settings.get("quantization_config"):
        raise UserError(f"{file}: quantization_config is not planned: weights are counted whole, in model.dtype")
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Data-sheet values of one GPU of a server."""

    flops: float
    """bfloat16 operations per second, without sparsity."""
    memory: float
    """Bytes of memory according to the name of the GPU (GB). What the card has beyond that is left to CUDA, NCCL and
    fragmentation."""
    bandwidth: float
    """Memory bandwidth, in bytes per second."""
    link: float
    """Bandwidth to another GPU of the same node, one way, in bytes per second."""
    network: float = 50e9
    """Bandwidth to a GPU of another node, one way, in bytes per second: one port of 400 Gbit/s per GPU, or 200 in A100
    servers."""
    parts: int = 1
    """Number of GPUs that this one stands for; they share every layer."""


PCIE = 32e9
"""Bandwidth of a PCIe 4 slot, one way, in bytes per second. Assumed as `link` of a GPU given by its data sheet."""
SLOW_NETWORK = 25e9
"""Bandwidth of a 200 Gbit/s port, in bytes per second. Assumed as `network` of a GPU given by its data sheet."""
GPUS = {
    "a100-40": Gpu(flops=312e12, memory=40e9, bandwidth=1.555e12, link=300e9, network=25e9),
    "a100-80": Gpu(flops=312e12, memory=80e9, bandwidth=2.039e12, link=300e9, network=25e9),
    "a800": Gpu(flops=312e12, memory=80e9, bandwidth=2.039e12, link=200e9, network=25e9),
    "l40s": Gpu(flops=362e12, memory=48e9, bandwidth=0.864e12, link=32e9, network=25e9),
    "h100": Gpu(flops=989e12, memory=80e9, bandwidth=3.35e12, link=450e9),
    "h800": Gpu(flops=989e12, memory=80e9, bandwidth=3.35e12, link=200e9),
    "h200": Gpu(flops=989e12, memory=141e9, bandwidth=4.8e12, link=450e9),
}
"""SXM modules, except for the L40S, which is a PCIe card. From NVIDIA's data sheets; docs/scale.md names each."""


LARGEST = {"--gpu-memory": 2000, "--tflops": 50_000, "--bandwidth": 100}
"""Maximum values. A larger number must be in another unit."""


def gpu_of(
    name: str | None, *, memory: float | None = None, tflops: float | None = None, bandwidth: float | None = None
) -> tuple[str, Gpu]:
    """Return (name, GPU): a known GPU, one given by its data sheet, or without a name the one in this machine.

    Args:
        memory: in GB. Like the next two, it overrides the value of a known GPU.
        tflops: in bfloat16, without sparsity.
        bandwidth: in TB per second.

    Raises UserError with the known GPUs and the missing numbers.
    """
    sheet = {"--gpu-memory": memory, "--tflops": tflops, "--bandwidth": bandwidth}
    for flag, value in sheet.items():
        if value is not None and not 0 < value <= LARGEST[flag]:
            unit = {"--gpu-memory": "GB", "--tflops": "Tflop/s", "--bandwidth": "TB/s, and 1000 GB/s are 1"}[flag]
            raise UserError(f"{flag} {value:g} must be above 0 and at most {LARGEST[flag]}: it is in {unit}")
    seen = _seen() if name is None and None in sheet.values() else None
    if seen is not None:
        name = known_as(*seen) or seen[0]
    known = GPUS.get((name or "").lower())
    if known is None and seen is not None:
        memory = memory or round(seen[1] / 1e9)
    size, flops, speed = (memory or 0) * 1e9, (tflops or 0) * 1e12, (bandwidth or 0) * 1e12
    missing = [flag for flag, value in zip(sheet, (size, flops, speed), strict=True) if not value]
    if known is None and missing:
        raise UserError(_not_known(name, seen, missing))
    base = known or Gpu(memory=size, flops=flops, bandwidth=speed, link=PCIE, network=SLOW_NETWORK)
    given = replace(base, memory=size or base.memory, flops=flops or base.flops, bandwidth=speed or base.bandwidth)
    return (name or "GPU").lower() if known else name or "GPU", given


def _not_known(name: str | None, seen: tuple[str, float] | None, missing: list[str]) -> str:
    """Return the error message for an unknown GPU."""
    near = [known for known in GPUS if name and known.startswith(name.lower())]
    near = near or difflib.get_close_matches((name or "").lower(), GPUS, n=1, cutoff=0.7)
    what = f"--gpu {name}" if seen is None and name else f"the GPU here is {name}" if name else "--gpu is missing"
    why = "it is not known" if name else "torch sees no GPU on this machine"
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return (
        f"{what}: {why}{hint}; known are {', '.join(GPUS)}; for another one give {', '.join(missing)} of its data sheet"
    )


def known_as(name: str, memory: float) -> str | None:
    """Return our name of the GPU that torch calls `name` and that has `memory` bytes; None if it is unknown."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    if "pcie" in words:  # slower than the SXM modules of the table
        return None
    fits = [known for known, gpu in GPUS.items() if known.split("-")[0] in words and 0.9 < memory / gpu.memory < 1.15]
    return fits[0] if fits else None


def _seen() -> tuple[str, float] | None:
    """Return (name, bytes of memory) of the first GPU in this machine, or None."""
    import torch  # noqa: PLC0415 - takes seconds to import

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return str(found.name), float(found.total_memory)
