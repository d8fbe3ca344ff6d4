"""One learner rank in a process of its own: python state_process.py RANK RANKS JOB.json; see test_learner_state.py.

Every case of the job trains two steps, captures, trains two more; another learner restores what was captured, of this
or of another job, and trains the same two.
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

    base = config_module.load(job["recipe"], [f"cluster.learner_ranks={ranks}"])
    device = setup.init_process_group(base, rank, FileStore(job["store"], ranks))
    rows = torch.load(job["rows"], weights_only=False)
    for number, case in enumerate(job["cases"]):
        config = dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, dtype=case.get("dtype", "float32")),
            learner=dataclasses.replace(base.learner, zero_stage=case["stage"], offload=case.get("offload", "none")),
            critic=dataclasses.replace(base.critic, optimizer=base.optimizer),
            algorithm=dataclasses.replace(base.algorithm, **case.get("algorithm", {})),
        )
        [*_, steps] = rank_steps(
            [rows[:4], rows[4:]], ranks=ranks, tokens_per_microbatch=40, aggregation="token_mean", constant_length=8,
            epochs=1, kl_coef=config.algorithm.kl_coef,
        )[rank:rank + 1]  # fmt: skip

        def state_of(learner):
            found = {f"policy.{name}": t.clone() for name, t in learner.synced.weights()}
            if learner.models.critic is not None:
                critic = weights_of(learner.models.critic, learner._config.learner.zero_stage)
                found |= {f"critic.{name}": t.clone() for name, t in critic}
            return found

        def numbers(result):
            both = dict(result.metrics) | dict(result.maxima) | dict(result.minima)
            return {name: value for name, value in both.items() if not name.startswith("time/")}

        folder = Path(job["out"]) / str(number)
        if rank == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        out = {}
        first = Learner(config, rank, device, folder)
        for _ in range(2):
            first.step(steps)
        out["state_bytes"] = first.state_bytes()
        counters = first.capture(folder / f"rank-{rank}.safetensors")
        out["straight"] = [numbers(first.step(steps)) for _ in range(2)]  # while the file is being written
        record = first.captured(wait=True)
        assert record.bytes == (folder / f"rank-{rank}.safetensors").stat().st_size
        out["straight_state"] = state_of(first)
        first.destroy()
        if rank == 0:
            (folder / "counters.json").write_text(json.dumps(counters))
        torch.distributed.barrier()
        source = Path(case["restore"]) if "restore" in case else folder
        rate = case.get("lr", config.optimizer.lr)
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=rate))
        second = Learner(config, rank, device, folder)
        second.restore(sorted(source.glob("*.safetensors")), json.loads((source / "counters.json").read_text()))
        second.capture(folder / f"again-{rank}.bin")  # what was restored, captured again
        second.captured(wait=True)
        out["resumed"] = [numbers(second.step(steps)) for _ in range(2)]
        out["resumed_state"] = state_of(second)
        second.destroy()
        if rank == 0:
            torch.save(out, folder / "out.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo's threads may be running when the process ends


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
