"""Learners that leave the memory to a sampler and take it back: python turns_process.py JOB.json. See test_turns.py.

Every case is one configuration; for each, what became of its weights when they were published to a new sampler, when
they were offloaded while perturbed, and after steps between offloads, beside the same steps without.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch
    from torch.distributed import FileStore
    from torch.multiprocessing.reductions import StorageWeakRef

    from grpo import config as config_module
    from grpo.batching import rank_steps
    from grpo.learner import heads
    from grpo.learner.probe import read_probe
    from grpo.learner.zero import setup
    from grpo.learner.zero.engine import Learner
    from grpo.sync.probe import Probe, Spread
    from grpo.sync.transaction import SyncEnd, publish
    from grpo.sync.transport import SharedMemorySender, read_shared_memory
    from grpo.sync.weights import Bucket, SyncReport, checksum

    rows = torch.load(job["rows"], weights_only=False)
    first = config_module.load(job["recipe"], job["cases"][0])
    device = setup.init_process_group(first, 0, FileStore(job["store"], 1))

    def steps_of(config: Any) -> Any:
        return rank_steps(
            [rows], ranks=1, tokens_per_microbatch=config.learner.tokens_per_microbatch, aggregation="token_mean",
            constant_length=8, epochs=1, kl_coef=config.algorithm.kl_coef,
        )[0]  # fmt: skip

    def weights(learner: Learner) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in learner.synced.weights()}

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()

    class PlainSampler:
        """A sampler of transformers' own model, whose weights are those of the folder until it receives others."""

        lost = None

        def __init__(self, config: Any, learner: Learner) -> None:
            self._model = heads.load_policy(config)
            self._head = heads.install(self._model, config)
            self._slots = dict(self._model.named_parameters())
            self._learner = learner
            self._version, self._consumed = -1, dict[str, int]()
            self.released: list[bool] = []
            """For each sync: whether the storage of the learner's weights was gone when the KV cache came."""

        def sleep(self) -> None:
            for slot in self._slots.values():
                slot.data.fill_(float("nan"))

        def wake(self, part: str) -> None:
            if part == "weights":
                weights = self._learner.models.policy.module.parameters()
                self._storages = [StorageWeakRef(p.untyped_storage()) for p in weights]
            else:
                gc.collect()
                self.released.append(all(storage.expired() for storage in self._storages))

        def begin_sync(self, version: int) -> None:
            self._version, self._consumed = version, {}

        def load_bucket(self, bucket: Bucket) -> None:
            at = bucket.transport
            for name, tensor in read_shared_memory(at["files"]["here"], at["nbytes"], at["tensors"]):
                self._slots[name].data.copy_(tensor)
                self._consumed[name] = checksum(tensor)

        def loaded(self) -> None: ...

        def died(self) -> bool:
            return False

        def finish_sync(self, probe: Probe) -> list[SyncReport]:
            exact = Spread(q90=0.0, rms=0.0)
            found = read_probe(self._model, self._model, self._head, probe, device, noise=exact).logprobs
            return [SyncReport(policy_version=self._version, consumed=self._consumed, unfilled_slots=(),
                               unmapped_tensors=(), probe_logprobs=found)]  # fmt: skip

        def holds(self, weights: dict[str, torch.Tensor]) -> bool:
            return all(torch.equal(self._slots[name], tensor) for name, tensor in weights.items())

    def published(config: Any, learner: Learner, before: dict[str, torch.Tensor], *, turns: bool) -> dict[str, bool]:
        """Publish, with a full check, to a sampler that has just replaced another: the learner is in host memory."""
        if turns:
            learner.models.offload()
        sampler = PlainSampler(config, learner)
        end = SyncEnd(learner=learner.synced, samplers=sampler, sender=SharedMemorySender("here"), sending=[0], rank=0,
                      ranks=1, takes_turns=turns)  # fmt: skip
        probe = Probe(token_ids=((1, 2, 3, 4, 5), tuple(range(1, 13))))
        publish(end, 1, probe, dtype=config.model.dtype, full_check=True)
        learner.models.reload()
        return {
            "published": sampler.holds(before) and same(before, weights(learner)),
            "released": len(sampler.released) >= 2 and all(sampler.released),
        }

    def run(config: Any, folder: Path, *, turns: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        learner = Learner(config, 0, device, folder)
        said: dict[str, Any] = {"optimizer": type(learner.models.policy.basic_optimizer).__name__}
        learner.step(steps_of(config))
        before = weights(learner)
        said |= published(config, learner, before, turns=turns)
        places = [p.data_ptr() for p in learner.models.policy.module.parameters()]
        with learner.synced.perturbation(0, 1) as perturb:
            perturb(0.1)
            moved = weights(learner)
            said["perturbed"] = not same(before, moved)
            if turns:
                learner.models.offload()
                said["elsewhere"] = all(
                    p.data_ptr() != place
                    for p, place in zip(learner.models.policy.module.parameters(), places, strict=True)
                )
                learner.models.reload()
                said["kept"] = same(moved, weights(learner))
        said["restored"] = same(before, weights(learner))
        if turns:
            learner.models.offload()  # a checkpoint and a model are written by a learner that has been away
            learner.models.reload()
        state = learner.capture(folder / "state.safetensors")
        learner.captured(wait=True)
        learner.step(steps_of(config))
        after = weights(learner)
        learner.destroy()
        other = Learner(config, 0, device, folder)
        if turns:
            other.models.offload()
            other.models.reload()
        other.restore([folder / "state.safetensors"], state)
        said["resumed"] = same(before, weights(other))
        other.step(steps_of(config))
        said["continued"] = same(after, weights(other))
        other.destroy()
        return after, said

    found = []
    for number, overrides in enumerate(job["cases"]):
        config = config_module.load(job["recipe"], overrides)
        folder = Path(job["out"]) / str(number)
        folder.mkdir(parents=True)
        after, said = run(config, folder, turns=config.takes_turns)
        if config.takes_turns:
            (folder / "twin").mkdir()
            twin, _ = run(config, folder / "twin", turns=False)
            said["like_its_twin"] = same(after, twin)
        found.append({"overrides": overrides, **said})
    torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
