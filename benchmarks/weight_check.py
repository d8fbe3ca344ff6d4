"""Measure which wrong weights the check of a weight sync detects, with a real vLLM sampler and injected faults.

    python -m benchmarks.weight_check recipes/tiny/smollm2/base --dtype bfloat16
    python -m benchmarks.weight_check MODEL --fault stale:layers.7. --fault swap:A.weight,B.weight
    python -m benchmarks.weight_check MODEL --power       # the effect of each tensor alone, if it is stale

The learner is the model in transformers, the sampler vLLM in the same process. Weights pass through the sync's own
buckets, checksums and verification. A fault is injected between the checksum and the engine, where only the probe can
detect it. The two syncs that the plain check compares differ by one AdamW step at a learning rate of 1e-6.

    stale:TEXT     tensors with TEXT in their names always keep their first values
    late:TEXT      tensors with TEXT in their names always hold the values of the previous sync
    swap:A,B       two tensors of the same shape are exchanged
    roll:NAME      the rows of a tensor are shifted by one, as with wrongly counted padding
    packed-head    the packed copy that a tied vocabulary projection computes with is not updated after a reload

Each fault is tested with the plain check of every sync, and with the full check that runs at the start and every
`run.verify_every` steps (`grpo.sync.weights.prove`). Figures are differences between sampler and learner, in units of
the learner's rounding noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.result import print_result

if TYPE_CHECKING:
    import torch

    from grpo.config import Config
    from grpo.sync.probe import Probe, Reading, Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Results of the checks for one fault."""

    fault: str
    plain_q90: float
    """90 % quantile of the difference in the plain check, divided by the noise; limit 2."""
    plain_rms: float
    """Root mean square of the difference in the plain check, divided by the noise; limit 5."""
    plain: bool
    """True if the plain check rejects the sync."""
    full: str
    """Group of parameters at which the full check rejects the sync, or "" if it does not."""
    full_q90: float
    """Largest 90 % quantile, divided by the noise, in the full check up to the group that is rejected."""

    @property
    def caught(self) -> bool:
        return self.plain or bool(self.full)


class PlainLearner:
    """A transformers model with the learner interface of the full check, `grpo.sync.weights.ProbedLearner`."""

    def __init__(self, config: Config) -> None:
        from grpo.learner import heads

        self.model = heads.load_policy(config).eval()
        self.head = heads.install(self.model, config)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters by their names in transformers."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors to send: the parameters by their names in the model's folder."""
        from grpo.learner.heads import as_in_folder

        pairs = (as_in_folder(self.model, name, tensor).items() for name, tensor in self.parameters().items())
        return dict(itertools.chain.from_iterable(pairs))

    def parameter_count(self) -> int:
        return len(self.parameters())

    def read_probe(self, probe: Probe, noise: Spread | None = None) -> Reading:
        from grpo.learner.probe import read_probe

        return read_probe(self.model, self.model, self.head, probe, self.model.device, noise)

    @contextmanager
    def perturbation(self, group: int, groups: int) -> Iterator[Callable[[float], None]]:
        from grpo.learner.probe import Perturbation
        from grpo.sync.probe import group_members

        parameters = list(self.model.parameters())
        chosen = group_members(group, groups, len(parameters))
        perturbation = Perturbation(parameters, chosen, self.model.config.vocab_size, rank=0)
        try:
            yield perturbation.apply
        finally:
            perturbation.undo()

    def mean(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def optimizer_step(self, probe: Probe) -> None:
        """Run one AdamW step at a learning rate of 1e-6 on the probe's own tokens, with float32 master weights."""
        import torch

        from grpo.learner.heads import unpack

        masters = [parameter.detach().float().clone().requires_grad_() for parameter in self.model.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=1e-6, weight_decay=0.0)
        for ids in probe.token_ids:
            tokens = torch.tensor([ids])
            with self.head.targets(tokens[:, 1:], 1.0):
                logprobs, _ = unpack(self.model(input_ids=tokens[:, :-1], use_cache=False).logits)
            (-logprobs.sum()).backward()
        for master, parameter in zip(masters, self.model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, self.model.parameters(), strict=True):
                parameter.copy_(master)


class Bench:
    """A sampler that can be given wrong weights, and the learner whose weights it should hold."""

    def __init__(self, path: str, dtype: str, rows: Sequence[Sequence[int]], *, prefix_caching: bool = True) -> None:
        from grpo.config import (
            AlgorithmConfig,
            Config,
            DataConfig,
            ModelConfig,
            RunConfig,
            SamplerConfig,
            SamplingConfig,
        )
        from grpo.sampler.vllm.engine import Sampler
        from grpo.sync.probe import PERTURBED_GROUPS, TOKENS, make_probe
        from grpo.sync.transport import SharedMemorySender
        from grpo.types import Prompt

        prompts = [
            Prompt(prompt_id="", token_ids=tuple(ids), text="", row={}, messages=None, dataset="", where="")
            for ids in rows
        ]
        config = Config(
            model=ModelConfig(path=path, dtype="float32" if dtype == "float32" else "bfloat16"),
            sampling=SamplingConfig(max_tokens=8),
            data=DataConfig(train=[], max_prompt_tokens=TOKENS),
            algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2),
            run=RunConfig(steps=1),
            sampler=SamplerConfig(max_num_seqs=64, prefix_caching=prefix_caching),
        )
        self.probe = make_probe(prompts, longest=config.max_row_tokens - 1)
        self.groups = PERTURBED_GROUPS[config.model.dtype]
        self.learner = PlainLearner(config)
        self._sampler = Sampler(config, "shared_memory", 0)
        self._sampler.init_transfer({"node": "here"})
        self._sender = SharedMemorySender("here")
        self._version = 0
        [recorder] = self._sampler._engine.collective_rpc(lambda worker: worker._recorder)
        load = recorder._load
        recorder._load = lambda pairs: load([(name, self._given(name, tensor)) for name, tensor in pairs])
        self._fault = ("", "")
        self.first = {name: tensor.clone() for name, tensor in self.learner.weights().items()}
        self._start = {name: tensor.clone() for name, tensor in self.learner.parameters().items()}
        self._before = self.first
        self.readings: list[tuple[float, float]] = []
        """(q90, rms) of each transfer's difference, in units of the noise."""

    def _given(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor that the engine gets instead of one that has passed its checksum."""
        kind, what = self._fault
        if kind in ("stale", "late") and what in name:
            return (self.first if kind == "stale" else self._before)[name]
        if kind == "swap" and name in what.split(","):
            one, other = what.split(",")
            return self.learner.weights()[other if name == one else one]
        if kind == "roll" and name == what:
            return tensor.roll(1, 0)
        return tensor

    def transfer(self, reading: Reading) -> Spread:
        """Sync the learner's weights once. Raises WeightSyncError if the plain check rejects the sync."""
        from grpo.sync.probe import LIMIT_Q90, LIMIT_RMS, spread
        from grpo.sync.weights import buckets_of, verify

        self._version += 1
        sent: dict[str, int] = {}
        self._sampler.begin_sync(self._version)
        for bucket in buckets_of(self.learner.weights().items()):
            packed = self._sender.pack(bucket)
            sent |= {spec.name: value for spec, value in zip(packed.tensors, packed.checksums, strict=True)}
            self._sampler.load_bucket(packed)
        report = self._sampler.finish_sync(self.probe)
        self._before = {name: tensor.clone() for name, tensor in self.learner.weights().items()}
        apart = spread(report.probe_logprobs, reading.logprobs)
        limit = reading.noise.allowed()
        self.readings.append((LIMIT_Q90 * apart.q90 / limit.q90, LIMIT_RMS * apart.rms / limit.rms))
        return verify(report=report, policy_version=self._version, sent=sent, learner=reading, sampler="sampler 0")

    def power(self) -> dict[str, float]:
        """Return, for each tensor, the effect in the full check if only that tensor kept its values: the difference of
        the learner's own logprobs (90 % quantile), in units of the noise."""
        import torch

        from grpo.sync.probe import GROUP_SIZE, group_members, spread
        from grpo.sync.weights import strongest

        parameters = dict(self.learner.model.named_parameters())
        groups = max(1, min(self.groups, len(parameters) // GROUP_SIZE))
        before = self.learner.read_probe(self.probe)
        with self.learner.perturbation(groups // 2, groups) as perturb:
            strength = strongest(self.learner, before, self.probe, perturb)
        found = {}
        for group in range(groups):
            members = [list(parameters)[i] for i in group_members(group, groups, len(parameters))]
            kept = {name: parameters[name].detach().clone() for name in members}
            with self.learner.perturbation(group, groups) as perturb, torch.no_grad():
                perturb(strength)
                moved = self.learner.read_probe(self.probe)
                for name, first in kept.items():
                    perturbed = parameters[name].detach().clone()
                    parameters[name].copy_(first)
                    stale = self.learner.read_probe(self.probe, moved.noise)
                    parameters[name].copy_(perturbed)
                    found[name] = spread(stale.logprobs, moved.logprobs).q90 / moved.noise.q90
        return found

    def examine(self, fault: str) -> Row:
        """Run a correct sync of the first weights, then the plain and the full check with `fault`."""
        import torch

        from grpo.sampler.vllm import transfer
        from grpo.sync.weights import WeightSyncError, prove

        with torch.no_grad():
            for name, tensor in self.learner.parameters().items():
                tensor.copy_(self._start[name])
        self._fault = ("", "")
        self.transfer(self.learner.read_probe(self.probe))
        self.learner.optimizer_step(self.probe)
        kind, _, what = fault.partition(":")
        self._fault = (kind, what)
        repack = transfer.repack_lm_head
        if kind == "packed-head":
            transfer.repack_lm_head = lambda model: None
        before, plain, refused = self.learner.read_probe(self.probe), False, ""
        try:
            self.transfer(before)
        except WeightSyncError:
            plain = True
        (plain_q90, plain_rms), self.readings = self.readings[-1], []
        try:
            prove(learner=self.learner, before=before, probe=self.probe, groups=self.groups, transfer=self.transfer)
        except WeightSyncError as error:
            if "does not use them" not in str(error):
                raise
            refused = f"{len(self.readings) - 1}"
        finally:
            transfer.repack_lm_head = repack
        return Row(
            fault=fault, plain_q90=plain_q90, plain_rms=plain_rms, plain=plain, full=refused,
            full_q90=max(q90 for q90, _ in self.readings),
        )  # fmt: skip


def usual_faults(names: Sequence[str]) -> list[str]:
    """Return faults of each kind for a model of the Llama family with these parameters."""
    layers = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("model.layers."))
    low, middle, high = (f"model.layers.{i}" for i in (1, layers // 2, layers - 1))
    tied = "lm_head.weight" not in names
    return [
        "none", f"stale:{low}.", f"stale:{middle}.", f"stale:{high}.",
        "packed-head" if tied else "stale:lm_head", *([] if tied else ["roll:lm_head.weight"]),
        f"swap:{middle}.self_attn.k_proj.weight,{middle}.self_attn.v_proj.weight",
        f"swap:{middle}.self_attn.q_proj.weight,{high}.self_attn.q_proj.weight",
        f"swap:{low}.mlp.gate_proj.weight,{low}.mlp.up_proj.weight",
        f"swap:{high}.mlp.gate_proj.weight,{high}.mlp.up_proj.weight",
        "roll:model.embed_tokens.weight", f"late:{middle}.mlp.down_proj.weight",
        f"late:{middle}.self_attn.q_proj.weight", "late:model.norm.weight",
    ]  # fmt: skip


def token_rows(path: str) -> list[list[int]]:
    """Return token rows for the probe: the training prompts in the model's parent folder, or random ids."""
    import json

    from transformers import AutoConfig, AutoTokenizer

    data = Path(path).parent / "one_step_train.jsonl"
    if data.exists():
        tokenizer = AutoTokenizer.from_pretrained(path)
        with data.open() as file:
            chats = [json.loads(next(file))["messages"] for _ in range(64)]
        return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    draw, size = random.Random(0), AutoConfig.from_pretrained(path).vocab_size
    return [[draw.randrange(size) for _ in range(40)] for _ in range(64)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").split("\n\n", 1)[1],
    )  # fmt: skip
    parser.add_argument("model", help="a folder in Hugging Face layout")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--fault", action="append", help="KIND:WHAT as above, once for each; default: one of each kind")
    parser.add_argument("--power", action="store_true", help="of each tensor, by the learner alone: a minute or two")
    a = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    bench = Bench(a.model, a.dtype, token_rows(a.model))
    names = list(bench.learner.weights())
    rows = []
    print(f"{'fault':74} {'plain q90':>9} {'rms':>6} {'full q90':>8}  caught by", flush=True)

    def examine(fault: str) -> None:
        started = time.monotonic()
        row = bench.examine(fault)
        by = "plain" if row.plain else f"full, group {row.full}" if row.full else "-"
        print(
            f"{fault:74} {row.plain_q90:9.2f} {row.plain_rms:6.2f} {row.full_q90:8.2f}  {by}"
            f"  ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
        rows.append(row)

    for fault in a.fault or usual_faults(names):
        examine(fault)
    power = bench.power() if a.power else {}
    for name, times in sorted(power.items(), key=lambda item: item[1])[:10]:
        print(f"stale alone: {name:60} {times:6.2f} times the noise")
    report(a.model, a.dtype, sum(len(ids) - 1 for ids in bench.probe.token_ids), rows, power)


def report(model: str, dtype: str, tokens: int, rows: Sequence[Row], power: Mapping[str, float]) -> None:
    """Print the figures as the last line."""
    figures = [
        {name: None if value == math.inf else value for name, value in dataclasses.asdict(row).items()}
        | {"caught": row.caught}
        for row in rows
    ]
    print_result(
        "weight_check", model=model, dtype=dtype, probe_tokens=tokens, rows=figures,
        stale_alone={name: round(times, 3) for name, times in power.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
