"""A wait that passes its deadline, on an actor that hangs: prints what `grpo` says of it. See test_stacks.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from grpo import config
from grpo.cluster import actors
from grpo.cluster import session as cluster
from grpo.cluster.watch import ActorWatch
from grpo.types import EngineFailure

import ray  # isort: skip - grpo sets what it reads when it is imported


class Stuck:
    def __init__(self, log: str) -> None:
        actors._log_to(log)

    def process(self) -> tuple[str, int]:
        return actors._process()

    def hang(self) -> None:
        self.somewhere_deep()

    def somewhere_deep(self) -> None:
        time.sleep(600)


def main(recipe: str, logs: Path) -> None:
    with cluster.session(config.load(Path(recipe), []), logs):
        actor = ray.remote(Stuck).remote(str(logs / "stuck-0.log"))
        watch = ActorWatch(logs)
        watch.add(actor, "stuck-0")
        try:
            watch.wait([actor.hang.remote()], "the hang", 3.0)
        except EngineFailure as error:
            print(error)
        ray.kill(actor)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
