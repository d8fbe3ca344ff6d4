"""A sampler and a plain model in one process: sync_process.py MODEL FIXED; prints JSON. See test_sync_into_vllm.py.

FIXED "head" compares a bfloat16 sampler's float32 head with both ways of computing the projection.
FIXED "load" only compares what vLLM loaded from the folder by itself.
FIXED "ipc" sends through the GPUs' buffer, with CUDA's driver replaced by one that hands the memory over.
FIXED 0 takes out the re-packing of `lm_head` after a reload, to see that the sync's verification notices.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace


def main(model_path: str, fixed: str) -> dict[str, object]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "2"}
    import torch
    from transformers import AutoModelForCausalLM

    from grpo.config import AlgorithmConfig, Config, DataConfig, ModelConfig, RunConfig, SamplerConfig, SamplingConfig
    from grpo.learner.heads import LogprobHead
    from grpo.learner.probe import read_probe
    from grpo.sampler.vllm import transfer
    from grpo.sampler.vllm.engine import Sampler
    from grpo.sync import transport
    from grpo.sync.probe import Probe, Reading, spread
    from grpo.sync.transport import IpcSender, SharedMemorySender
    from grpo.sync.weights import WeightSyncError, buckets_of, verify
    from grpo.types import SampleRequest, SamplingSettings

    if fixed == "0":
        transfer.repack_lm_head = lambda model: None
    config = Config(
        model=ModelConfig(
            path=model_path, dtype="bfloat16" if fixed == "head" else "float32", float32_head=fixed == "head"
        ),
        sampling=SamplingConfig(max_tokens=8),
        data=DataConfig(train=[], max_prompt_tokens=24),
        algorithm=AlgorithmConfig(prompts_per_step=1, group_size=2),
        run=RunConfig(steps=1),
        sampler=SamplerConfig(max_num_seqs=400),
    )
    if fixed == "ipc":
        memory: list[torch.Tensor] = []

        def export(flat: torch.Tensor) -> tuple[None, tuple[int, ...]]:
            memory.append(flat)
            return None, (len(memory) - 1, *[0] * 14)

        transport.reduce_tensor = export
        transport.rebuild_cuda_tensor = lambda number, *_: memory[number]
        torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="GPU-0")
    sampler = Sampler(config, "ipc" if fixed == "ipc" else "shared_memory", 0)
    sampler.init_transfer({} if fixed == "ipc" else {"node": "here"})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=config.model.dtype)
    probe = Probe(token_ids=((1, 2, 3, 4, 5), tuple(range(1, 13))))
    sender = IpcSender("GPU-0", torch.device("cpu")) if fixed == "ipc" else SharedMemorySender("here")

    head = LogprobHead(model.get_output_embeddings(), float32_head=fixed == "head")

    def reading() -> Reading:
        return read_probe(model, model, head, probe, model.device)

    def distance() -> float:
        return spread(sampler.probe_logprobs(probe), reading().logprobs).q90

    if fixed == "head":
        weight = model.get_output_embeddings().weight
        hidden = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        with torch.no_grad():
            model_of = sampler._engine.collective_rpc(lambda worker: worker.model_runner.get_model())
            logits = model_of[0].compute_logits(hidden)[:, : len(weight)]
            exact = hidden.float() @ weight.float().t()
            rough = (hidden @ weight.t()).float()
        return {"sampler": float((logits - exact).abs().max()), "rounding": float((rough - exact).abs().max())}
    if fixed == "load":
        return {"loaded": distance()}

    def sync(version: int, skip: str | None = None, extra: bool = False, corrupt: bool = False, limit: int = 1 << 14):
        sent = {}
        sampler.begin_sync(version)
        tensors = [(name, p) for name, p in model.named_parameters() if name != skip]
        if extra:
            tensors.append(("model.layers.0.nothing.weight", torch.zeros(2)))
        for bucket in buckets_of(tensors, limit=limit):
            packed = sender.pack(bucket)
            sent |= {spec.name: value for spec, value in zip(packed.tensors, packed.checksums, strict=True)}
            sampler.load_bucket(packed)
        if corrupt:
            sent["model.norm.weight"] += 1
        return verify(
            report=sampler.finish_sync(probe), policy_version=version, sent=sent, learner=reading(),
            sampler="sampler 0",
        ).q90  # fmt: skip

    def move(factor: float) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor).add_(0.01)

    result: dict[str, object] = {"first": sync(0)}
    settings = SamplingSettings(temperature=0.0, max_tokens=8, end_token_ids=(0,), stop=())
    request = SampleRequest(index=0, token_ids=tuple(range(1, 18)), seeds=(1,))

    def greedy() -> list[int]:
        [block] = sampler.sample([request], settings, 10.0)
        return [round(x, 3) for x in block.sampler_logprobs.tolist()]

    def outcome(**kwargs) -> str:
        try:
            return f"ok {sync(**kwargs):.1e}"
        except WeightSyncError as error:
            return str(error)

    greedy()  # fills the prefix cache under the first weights
    move(1.1)
    result["moved"] = outcome(version=1)
    if fixed == "ipc":
        sender.pack([("other", torch.randn(1 << 14))])  # what comes next into the buffer must not reach the sampler
        result["exports"], result["used"] = len(memory), distance()
    if fixed == "1":
        after = greedy()
        sampler._engine.reset_prefix_cache()
        result["cache_dropped"] = after == greedy()
        for parameter in [name for name, _ in model.named_parameters()]:
            with torch.no_grad():
                dict(model.named_parameters())[parameter].mul_(1.3).add_(0.05)
            if (said := outcome(version=2)) and not said.startswith("ok"):
                result[f"tensor {parameter}"] = said
        result["extra"] = outcome(version=3, extra=True)
        result["skipped"] = outcome(version=3, skip="model.norm.weight")
        result["corrupt"] = outcome(version=3, corrupt=True)
        result["recovered"] = outcome(version=4)
        sampler.perturb_for_test("norm", 1.01)
        result["perturbed"] = distance()
        crowd = [
            SampleRequest(index=i, token_ids=tuple(1 + (i * 7 + j) % 12 for j in range(24)), seeds=(i,))
            for i in range(400)
        ]
        random = SamplingSettings(temperature=1.0, max_tokens=2, end_token_ids=(), stop=())
        result["crowd"] = [sum(block.token_ids.size for block in sampler.sample(crowd, random, 10.0)) for _ in range(2)]
    return result


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1], sys.argv[2])))
