"""One learner rank in a process of its own: python learner_process.py RANK RANKS JOB.json; see test_learner.py.

Every job line is one DeepSpeed configuration; its result is the parameters after one step on the recorded batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path


def main(rank: int, ranks: int, job: dict) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch
    from torch.distributed import FileStore

    from grpo import config as config_module
    from grpo.batching import rank_steps
    from grpo.learner.zero import setup
    from grpo.learner.zero.engine import Learner
    from grpo.learner.zero.weights import weights_of

    def unscale(learner):
        """Make the backward passes what they would be without the world-size factor."""

        def backward(model, loss, *, last):
            learner.models.policy.set_gradient_accumulation_boundary(last)
            learner.models.policy.backward(loss)

        learner.step_engine.backward = backward

    base = config_module.load(job["recipe"], [f"cluster.learner_ranks={ranks}"])
    device = setup.init_process_group(base, rank, FileStore(job["store"], ranks))
    rows = torch.load(job["rows"], weights_only=False)
    for number, case in enumerate(job["cases"]):
        learner_section = dataclasses.replace(
            base.learner, zero_stage=case["stage"], tokens_per_microbatch=case["budget"], offload=case["offload"]
        )
        critic = base.critic
        if case["algorithm"].get("advantage") == "gae":
            critic = dataclasses.replace(critic, optimizer=base.optimizer)
        config = dataclasses.replace(
            base,
            learner=learner_section,
            critic=critic,
            algorithm=dataclasses.replace(base.algorithm, aggregation=case["aggregation"], **case["algorithm"]),
        )
        learner = Learner(config, rank, device, Path(job["runs"]) / str(number))
        if case["unscaled"]:
            unscale(learner)
        taken = [
            dataclasses.replace(row, advantage=float("nan")) if row.rollout_index in case["poisoned"] else row
            for row in (rows[i] for i in case["rows"] or range(len(rows)))
        ]
        half = len(taken) // 2
        steps = rank_steps(
            [taken] if case["minibatches"] == 1 else [taken[:half], taken[half:]], ranks=ranks,
            tokens_per_microbatch=case["budget"], aggregation=case["aggregation"], constant_length=8,
            epochs=case["epochs"], kl_coef=config.algorithm.kl_coef,
        )  # fmt: skip
        for _ in range(case["driver_steps"]):
            result = learner.step(steps[rank])
        state = {name: tensor.clone() for name, tensor in learner.synced.weights()}
        critic = (
            None
            if learner.models.critic is None
            else dict(weights_of(learner.models.critic, config.learner.zero_stage))
        )
        critic = critic and {name: tensor.clone() for name, tensor in critic.items()}
        if case["save"]:
            learner.save(Path(case["save"]))
        if rank == 0:
            out = {
                "critic": critic,
                "state": state, "grad_norm": result.metrics["optim/grad_norm"], "metrics": dict(result.metrics),
                "maxima": dict(result.maxima),
            }  # fmt: skip
            torch.save(out, f"{job['out']}-{number}.pt")
        learner.destroy()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo's threads may be running when the process ends


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
