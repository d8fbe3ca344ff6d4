"""Learners that leave the memory to a sampler and take it back: python turns_process.py JOB.json. See test_turns.py.

Every case is one configuration; for each, what became of its weights when they were offloaded while perturbed, and
after steps between offloads, beside the same steps without.
"""

from __future__ import annotations

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

    from grpo import config as config_module
    from grpo.batching import rank_steps
    from grpo.learner.zero import setup
    from grpo.learner.zero.engine import Learner

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

    def run(config: Any, folder: Path, *, turns: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        learner = Learner(config, 0, device, folder)
        said: dict[str, Any] = {"optimizer": type(learner.models.policy.basic_optimizer).__name__}
        learner.step(steps_of(config))
        before = weights(learner)
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
