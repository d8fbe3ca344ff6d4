"""Sizes of models and data-sheet values of GPUs.

The config of a model is the config.json of its folder, for hub ids an entry of `KNOWN`. transformers builds the model
without weights, and its parameters are counted.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from grpo.suggest import one_line
from grpo.types import Json, UserError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip
VOCAB_PADDING = 64
"""vLLM's DEFAULT_VOCAB_PADDING_SIZE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense decoder with gated feed-forward layers and grouped-query attention."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    body: int
    """Parameters of the layers and the last norm."""
    embedding: int
    head: int
    """Parameters of the vocabulary projection. 0: it is tied to the embedding."""
    kv_head: int
    """Parameters of the keys and values of one key-value head, in all layers; included in `body`."""

    @property
    def queries(self) -> int:
        """Return the width of a token's queries in a layer."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Return the width of a token's keys in a layer, which is also the width of its values."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        return self.body + self.embedding + self.head

    @property
    def multiplied(self) -> int:
        """Return the number of parameters that a token is multiplied with; the embedding is a lookup."""
        return self.body + (self.head or self.embedding)

    def over(self, parts: int) -> Shape:
        """Return the total shape on `parts` GPUs that share every layer. If there are more GPUs than key-value heads,
        each GPU has a copy of one head."""
        more = max(0, parts - self.kv_heads) * self.kv_head
        return replace(self, kv_heads=max(self.kv_heads, parts), body=self.body + more)

    def kv_bytes(self, itemsize: int) -> int:
        """Return the bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.keys * itemsize


KNOWN: dict[str, dict[str, Json]] = {
    hub_id: {"model_type": family, "tie_word_embeddings": tied, **dict(zip(SIZES, sizes, strict=True))}
    for hub_id, family, tied, *sizes in (
        ("Qwen/Qwen2.5-0.5B", "qwen2", True, 151936, 896, 4864, 24, 14, 2),
        ("Qwen/Qwen2.5-1.5B", "qwen2", True, 151936, 1536, 8960, 28, 12, 2),
        ("Qwen/Qwen2.5-Math-1.5B", "qwen2", True, 151936, 1536, 8960, 28, 12, 2),
        ("Qwen/Qwen2.5-3B", "qwen2", True, 151936, 2048, 11008, 36, 16, 2),
        ("Qwen/Qwen2.5-7B", "qwen2", False, 152064, 3584, 18944, 28, 28, 4),
        ("Qwen/Qwen2.5-Math-7B", "qwen2", False, 152064, 3584, 18944, 28, 28, 4),
        ("Qwen/Qwen2.5-32B", "qwen2", False, 152064, 5120, 27648, 64, 40, 8),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2", False, 151936, 1536, 8960, 28, 12, 2),
        ("meta-llama/Llama-3.1-8B", "llama", False, 128256, 4096, 14336, 32, 32, 8),
        ("allenai/Llama-3.1-Tulu-3-8B-DPO", "llama", False, 128264, 4096, 14336, 32, 32, 8),
    )
}
"""What counts in the config.json of a hub id. The Instruct models of Qwen2.5 have the sizes of their base models."""


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
            f"{option}={path} is a run folder without a model: model/ is written at the end of the run, and into every "
            "checkpoint with run.save_model=true"
        )
    raise UserError(f"{option}={path} has no config.json, and no folder inside it has one: it is not a model folder")


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

    Raises UserError if the model is unknown, or if the formulas of a plan do not apply to it.
    """
    file = Path(path).expanduser() / "config.json"
    if file.is_file():
        return _count(str(file), _read(file))
    refuse_outer_folder("model.path", path)
    if (name := path.removesuffix("-Instruct")) in KNOWN:
        return _count(path, KNOWN[name])
    near = difflib.get_close_matches(path, KNOWN, n=1, cutoff=0.0)[0]
    raise UserError(
        f"model.path={path}: no folder with a config.json, and no model whose sizes are known here; give one of the "
        f"same size, e.g. model.path={near}; known are {', '.join(KNOWN)}"
    )


def _read(file: Path) -> dict[str, Json]:
    """Read a config.json. Raises UserError if it is damaged, or of a quantized model."""
    try:
        settings: Json = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} must hold a mapping, as save_pretrained writes it, not {json.dumps(settings)[:40]}")
    if "model_type" not in settings:
        raise UserError(f"{file} lacks model_type")
    if settings.get("quantization_config"):
        raise UserError(f"{file}: quantization_config is not planned: weights are counted whole, in model.dtype")
    return settings


def _refuse_sizes(where: str, settings: dict[str, Json], names: dict[str, str]) -> None:
    """Raise UserError for sizes that no model has. `names`: the attribute map of the config's class."""
    found: dict[str, int] = {}
    for name in (*SIZES, "head_dim"):
        stored = names.get(name, name)
        value = settings.get(stored)
        if value is None and name in ("num_key_value_heads", "head_dim"):
            continue
        if stored not in settings:
            raise UserError(f"{where} lacks {stored}")
        if type(value) is not int or value < 1:  # true is an int
            raise UserError(f"{where}: {stored}={json.dumps(value)} must be a whole number, at least 1")
        found[name] = value
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    if hidden % heads and "head_dim" not in found:
        raise UserError(f"{where}: num_attention_heads={heads} must divide hidden_size={hidden}: there is no head_dim")
    if heads % (kv_heads := found.get("num_key_value_heads", heads)):
        raise UserError(f"{where}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")


def _count(where: str, settings: dict[str, Json]) -> Shape:
    """Return the shape of the model of a config.json, from transformers' modules without weights.

    A second model has twice the key-value heads: what it has in addition are the parameters of keys and values.
    Raises UserError for sizes that no model has, and for models to which the formulas of a plan do not apply.
    """
    import torch  # noqa: PLC0415 - these take seconds to import
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # noqa: PLC0415

    kind = settings["model_type"]
    refused = f"{where}: model_type={kind} is not planned"
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING, n=1, cutoff=0.0)[0]
        raise UserError(f"{refused}: transformers has no such model; nearest: {near}")
    _refuse_sizes(where, settings, CONFIG_MAPPING[kind].attribute_map)
    try:
        config = CONFIG_MAPPING[kind].from_dict(settings)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        wider = CONFIG_MAPPING[kind].from_dict({**settings, "num_key_value_heads": 2 * kv_heads})
        with torch.device("meta"):
            model, more = (AutoModelForCausalLM.from_config(c, attn_implementation="eager") for c in (config, wider))
        embedding, projection = model.get_input_embeddings().weight, model.get_output_embeddings()
        head = 0 if projection.weight is embedding else sum(p.numel() for p in projection.parameters())
    except Exception as error:  # a model's code may raise anything
        raise UserError(f"{refused}: transformers does not build it: {one_line(error)}") from error
    kv_head = (more.num_parameters() - model.num_parameters()) // kv_heads
    # parameters for each key or value, besides those for the hidden state: a bias is 1, a norm of the keys 0.5
    beyond = kv_head / (2 * config.num_hidden_layers * head_dim) - config.hidden_size
    if any(p.dim() > 2 for p in model.parameters()) or not 0 <= beyond <= 1.5 or config.get_text_config() is not config:
        raise UserError(
            f"{refused}: a plan is for text models with dense layers that all have keys and values of "
            "num_key_value_heads, not for experts, convolutions, states or compressed keys"
        )
    return Shape(
        vocab=config.vocab_size, hidden=config.hidden_size, intermediate=config.intermediate_size,
        layers=config.num_hidden_layers, heads=config.num_attention_heads, kv_heads=kv_heads, head_dim=head_dim,
        body=model.num_parameters() - embedding.numel() - head, embedding=embedding.numel(), head=head, kv_head=kv_head,
    )  # fmt: skip


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
