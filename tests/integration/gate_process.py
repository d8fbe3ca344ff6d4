"""Loops on the real engines that are tampered with: gate_process.py RECIPE FOLDER; prints JSON. See test_gate.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(recipe: Path, folder: Path) -> dict[str, Any]:
    from grpo import config, driver
    from grpo.checks import check
    from grpo.cluster import engines as engine_group
    from grpo.cluster import session as cluster
    from grpo.metrics import guards
    from grpo.metrics.health import Health
    from grpo.rewards.pool import RewardPool
    from grpo.run.console import Console
    from grpo.run.folder import RunFolder
    from grpo.run.progress import Progress
    from grpo.run.saving import Saver
    from grpo.run.timeline import Timeline
    from grpo.sampler import settings

    import numpy as np  # isort: skip
    import ray  # isort: skip - after grpo, which sets its environment

    c = check.resolve_paths(config.load(recipe))
    plan = check.check(c, recipe, folder)

    class Tampered:
        """The engines, with something done to them in the third step."""

        def __init__(self, engines: engine_group.Engines, how: str) -> None:
            self._engines, self._how, self.steps = engines, how, 0

        def sample(self, requests: Any, settings: Any) -> Iterator[Any]:
            self.steps += 1
            if self.steps == 3 and self._how == "perturb":
                ray.get(self._engines.fleet.samplers[0].perturb_for_test.remote("norm", 1.05))
            for block in self._engines.sample(requests, settings):
                if self.steps == 3 and self._how == "swap":  # the completions of two prompts change places
                    index = block.index.copy()
                    index[block.index == 0], index[block.index == 1] = 1, 0
                    block = dataclasses.replace(block, index=np.asarray(index, dtype=np.int32))
                yield block

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engines, name)

    found: dict[str, Any] = {}
    with (
        RewardPool(c.rewards, files=plan.reward_files, workers=1, log_dir=folder) as scorer,
        cluster.session(c, folder),
    ):
        engines = engine_group.Engines(c, folder, print, Timeline(None))
        for how in ("nothing", "swap", "perturb"):
            (folder / how).mkdir()
            run = RunFolder(folder / how, c)
            tampered = Tampered(engines, how)
            loop = driver.Loop(
                config=c, prompts=plan.prompts, eval_prompts=(), engines=tampered, scorer=scorer, folder=run,
                reporter=Console(steps=c.run.steps, log=None),
                decode=lambda ids: plan.tokenizer.batch_decode(ids, skip_special_tokens=True),
                train_settings=settings.train_settings(c, plan.end_token_ids),
                eval_settings=settings.eval_settings(c, plan.end_token_ids),
                progress=Progress.start(c, plan.prompts),
                saver=Saver(c, run.path, engines=engines.state, fingerprints=dict, flush=lambda: None, say=print),
                stopping=lambda: False, timeline=Timeline(None), health=Health(c),
            )  # fmt: skip
            error = ""
            try:
                driver.train(loop)
            except guards.MismatchError as mismatch:
                error = str(mismatch)
            run.close()
            lines = [json.loads(line) for line in (folder / how / "metrics.jsonl").read_text().splitlines()]
            found[how] = {"error": error, "sampled": tampered.steps, "metrics": lines}
        engines.close()
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
